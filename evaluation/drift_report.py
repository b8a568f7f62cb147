"""`fpo features RUN`: what training did to the features, and how well the cache told it before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpo.evaluation.drift import (
    Drift,
    Encoder,
    agreement,
    drift_in_speech,
    drift_on_pairs,
    encoders,
)
from fpo.evaluation.feature_report import feature_columns, sae_name
from fpo.evaluation.gaps import Estimate, Gaps, feature_gaps
from fpo.evaluation.held_out import finite
from fpo.evaluation.labels import Names, feature_names
from fpo.evaluation.pairs import read_pairs
from fpo.evaluation.sampling import Sampling
from fpo.progress import progress_bar, say
from fpo.recipe import Recipe
from fpo.scoring.hookpoints import canonical_hookpoint
from fpo.stage2_align.checkpoints import whole_checkpoint
from fpo.stage2_align.policy import policy_tokenizer
from fpo.stage2_align.run import write_whole
from fpo.stage2_align.samples import first_prompts
from fpo.store import Cache

FEATURES_FILE = "features.json"
WORSE_FIT = 1.5
"""Where the SAE misses so many times as much of the policy as of the reference, drifts may be the misfit's."""
POINTS = 1000
"""Features of a figure: those that fire most often."""


class DriftQuestion(NamedTuple):
    """What is asked of a run."""

    top: int
    """Features of each kind that are named."""
    samples: int = 0
    """Held-out prompts that both models complete; 0 leaves speech out."""
    sampling: Sampling = Sampling(256, temperature=1.0)
    labels: str | None = None
    """Where features are named, as `feature_names` has it."""


def drift_report(
    recipe: Recipe,
    train: Cache,
    held_out: Cache,
    run: Path,
    checkpoint: int | None,
    question: DriftQuestion,
) -> dict[str, Any]:
    """
    The drift of every hookpoint's features, in JSON types; also in the run's folder, for a run as it ended.

    train     what it was trained from, whose gaps are held against the drift
    held_out  what both models read
    Raises as `encoders`; CacheMissing where the training cache has no features at one of the recipe's hookpoints.
    """
    folder = run if checkpoint is None else whole_checkpoint(run, checkpoint)
    say("loading policy and reference ...")
    policy, reference = encoders(recipe, held_out, folder)
    with progress_bar(held_out.n_groups, "groups", "drift") as bar:
        drifts = drift_on_pairs(recipe, held_out, policy, reference, bar.update)
    spoken = _spoken(recipe, held_out, policy, reference, question)
    pairs = read_pairs(train)
    points = []
    for drift, speech in zip(drifts, spoken, strict=True):
        spec = feature_columns(train, canonical_hookpoint(drift.hookpoint))[0]
        train.read_columns([spec])
        (gaps,) = feature_gaps(train, 0, int(spec["d_sae"]), [pairs])
        names = feature_names(question.labels, sae_name(train, spec))
        points.append(_hookpoint(drift, speech, gaps, question, names))
    found: dict[str, Any] = finite({"run": run.name, "checkpoint": checkpoint, "hookpoints": points})
    if checkpoint is None:
        write_whole(run / FEATURES_FILE, json.dumps(found, indent=2) + "\n")
    return found


def _spoken(
    recipe: Recipe, held_out: Cache, policy: Encoder, reference: Encoder, question: DriftQuestion
) -> list[Estimate] | list[None]:
    if not question.samples:
        return [None] * len(policy.saes)
    prompts = [ids.tolist() for _, ids in first_prompts(held_out, question.samples)]
    with progress_bar(len(prompts), "prompts", "speak") as bar:
        return drift_in_speech(policy, reference, policy_tokenizer(recipe), prompts, question.sampling, bar.update)


def _hookpoint(
    drift: Drift, speech: Estimate | None, gaps: Gaps, question: DriftQuestion, names: Names
) -> dict[str, Any]:
    tested = np.flatnonzero(gaps.tested)
    by_side = {"chosen": drift.chosen, "rejected": drift.rejected} | ({} if speech is None else {"speech": speech})
    leading = drift.chosen if speech is None else speech
    shown = _surest(leading, question.top)
    often = tested[np.argsort(-gaps.n_fired[tested], kind="stable")[:POINTS]]
    return {
        "hookpoint": drift.hookpoint,
        "groups": drift.n_groups,
        "prompts": drift.n_prompts,
        "spoken": question.samples if speech is not None else 0,
        "fit": {"policy": drift.policy_fit._asdict(), "reference": drift.reference_fit._asdict()},
        "misfit": drift.policy_fit.fvu > WORSE_FIT * drift.reference_fit.fvu,
        "gap_against": {name: agreement(gaps.gap.value[tested], one.value[tested]) for name, one in by_side.items()},
        "features": [_feature(int(feature), drift, by_side, gaps, names) for feature in shown],
        "points": [
            {
                "feature": int(feature),
                "gap": float(gaps.gap.value[feature]),
                **{name: float(one.value[feature]) for name, one in by_side.items()},
            }
            for feature in often
        ],
    }


def _feature(feature: int, drift: Drift, by_side: Mapping[str, Estimate], gaps: Gaps, names: Names) -> dict[str, Any]:
    row: dict[str, Any] = {"feature": feature, "label": names.label(feature), "link": names.link(feature)}
    for name, one in by_side.items():
        value, reach = float(one.value[feature]), float(one.reach[feature])
        row |= {name: value, f"{name}_low": value - reach, f"{name}_high": value + reach}
    chosen, rejected = (float(side) for side in drift.reference[:, feature])
    # A top k may have left it out of every completion: then the cache knows nothing of it.
    known = bool(gaps.n_fired[feature])
    gap, reach = float(gaps.gap.value[feature]), float(gaps.gap.reach[feature])
    return {
        **row,
        "fires": float(drift.fires[feature]),
        "reference_chosen": chosen,
        "reference_rejected": rejected,
        "gap": gap if known else None,
        "gap_low": gap - reach if known else None,
        "gap_high": gap + reach if known else None,
    }


def _surest(drift: Estimate, top: int) -> NDArray[np.int64]:
    """The features that moved most surely: `top` that grew, then as many that shrank."""
    z = np.where(np.isfinite(drift.z), drift.z, 0.0)
    grown, shrunk = np.argsort(-z, kind="stable")[:top], np.argsort(z, kind="stable")[:top]
    return np.concatenate([grown[z[grown] > 0], shrunk[z[shrunk] < 0]])
