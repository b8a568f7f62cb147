"""`fpo evaluate`: held-out metrics of a run, with what stands behind the means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from fpo.evaluation.held_out import PairNotes, report
from fpo.evaluation.own_samples import own_samples
from fpo.evaluation.sampling import Sampling
from fpo.evaluation.speakers import opened
from fpo.objectives import Pairing
from fpo.progress import say
from fpo.recipe import Recipe
from fpo.scoring import adapter_folder, load_model, model_folder
from fpo.stage1_cache.identity import CacheIdentity
from fpo.stage2_align import evaluate_run
from fpo.stage2_align.evaluation import evaluation_file
from fpo.stage2_align.run import write_whole
from fpo.stage2_align.samples import first_prompts
from fpo.store import Cache


class Speaking(NamedTuple):
    """Of what the policy says itself: how many held-out prompts it completes, and how."""

    prompts: int
    sampling: Sampling


def evaluate(
    recipe: Recipe,
    cache: Cache,
    run: Path,
    checkpoint: int | None = None,
    by: str | None = None,
    speaking: Speaking | None = None,
) -> dict[str, Any]:
    """
    The held-out metrics (`eval_...`), and in JSON types what stands behind them; also in the run's evaluation file.

    by        column of the held-out data that says what subset a row belongs to
    speaking  None leaves the policy's own samples out, and the reference, which they need
    Raises as `evaluate_run`; DataError where there is no such column, ModelError where the reference is not at hand.
    """
    subsets = None if by is None else CacheIdentity(recipe, held_out=True).column(by)
    kind = recipe.objective.units
    notes = PairNotes(cache, kind)
    paired = kind in get_args(Pairing)
    found: dict[str, Any] = dict(
        evaluate_run(recipe, cache, run, checkpoint, notes.note if paired else lambda measurement, batch: None)
    )
    if paired:
        found |= report(notes.pairs(), subsets)
    if speaking is not None:
        found["own_samples"] = _spoken(recipe, cache, run, checkpoint, speaking)
    write_whole(evaluation_file(run, checkpoint), json.dumps(found, indent=2) + "\n")
    return found


def _spoken(recipe: Recipe, cache: Cache, run: Path, checkpoint: int | None, speaking: Speaking) -> dict[str, Any]:
    say("loading policy and reference ...")
    policy, ours = opened(str(run), checkpoint), recipe.reference
    adapters = [adapter_folder(ours.adapter)] if ours.adapter else []
    reference = load_model(model_folder(ours.model, ours.revision), ours.dtype, adapters)
    reference.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [ids.tolist() for _, ids in first_prompts(cache, speaking.prompts)]
    return own_samples(policy, reference, prompts, speaking.sampling)
