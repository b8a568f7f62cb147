"""`fpo evaluate`: held-out metrics of a run's policy, from the cache of the held-out pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from fpo.errors import RecipeError, RunError
from fpo.progress import progress_bar, say
from fpo.recipe import Recipe, load_recipe
from fpo.scoring import Scores, mixed_precision
from fpo.stage2_align.checkpoints import whole_checkpoint
from fpo.stage2_align.held_out import Note, check_held_out, held_out_metrics, held_out_stream
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import policy_layout, policy_model
from fpo.stage2_align.run import RECIPE_FILE, read_run
from fpo.store import Cache, is_url

# What a run was trained with; anything else of its recipe says which held-out pairs, or where things lie now.
_TRAINED_WITH = ("objective", "policy", "training")
_SPEED = "training.per_device_eval_batch_size"


def evaluated_recipe(run: Path, overrides: list[str] | None = None) -> Recipe:
    """
    The run's own recipe, for other held-out pairs with `data...` overridden. What a moved path leads to is held
    against the digests that the run records. Raises RunError where there is no run, RecipeError for an override
    of what the run was trained with.
    """
    read_run(run)
    for override in overrides or []:
        field = override.partition("=")[0]
        if field.split(".")[0] in _TRAINED_WITH and field != _SPEED:
            raise RecipeError(
                f"--set {override}: a run is evaluated as it was trained; only data, cache, paths and {_SPEED} may "
                "differ (fpo align --set trains another run)"
            )
    return load_recipe(run / RECIPE_FILE, overrides)


def evaluated_store(run: Path, option: str | None) -> str:
    """`--store`, else the store that the run was trained from. Raises RunError where that is gone."""
    known: str = read_run(run)["store"]
    if option is None and not is_url(known) and not Path(known).is_dir():
        raise RunError(f"{run}: the store of this run, {known}, is no longer there; say where it is with --store")
    return option or known


def evaluation_file(run: Path, checkpoint: int | None) -> Path:
    """Where the held-out metrics of a run, or of one of its checkpoints, stand."""
    return run / ("evaluation.json" if checkpoint is None else f"evaluation-{checkpoint}.json")


def evaluate_run(
    recipe: Recipe, cache: Cache, run: Path, checkpoint: int | None = None, note: Note = lambda measurement, batch: None
) -> dict[str, float]:
    """
    The objective's loss and metrics over every pair of `cache`, by the run's policy, or as it was after step
    `checkpoint`; also written to the run folder, see `evaluation_file`.

    recipe  see `evaluated_recipe`
    note    is given each batch with what was measured of it
    Raises RunError where there is no finished run, or no such checkpoint; DataError where the groups are no pairs.
    """
    facts = read_run(run)
    policy, file = run, evaluation_file(run, checkpoint)
    if checkpoint is not None:
        policy = whole_checkpoint(run, checkpoint)
    elif not facts["complete"]:
        raise RunError(
            f"{run}: this run is not finished; continue it with fpo align {run / RECIPE_FILE} --output {run} "
            "--resume, or evaluate a checkpoint of it with --checkpoint N"
        )
    check_held_out(recipe, cache, run, facts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = ObjectiveMeter.of(recipe).to(device)
    say("loading the policy ...")
    model = policy_model(recipe, meter, policy)
    model.to(device)
    stream = held_out_stream(recipe, cache)
    stream.layout = policy_layout(model, cache)

    def score(**packed: torch.Tensor) -> Scores:
        with mixed_precision(device, recipe.policy_arithmetic().autocast):
            scores: Scores = model(**packed)
        return scores

    with progress_bar(cache.n_groups, "pairs", "evaluate") as bar:
        metrics = held_out_metrics(score, meter, stream, device, bar.update, note)
    broken = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if broken is not None:
        raise RunError(f"{policy}: {broken} is {metrics[broken]} on the held-out pairs; the policy is broken")
    try:
        file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from None
    return metrics
