"""
Held-out groups: what a policy is worth on groups that it was not trained on. `fpo evaluate` and evaluation in training
are this code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fpo.errors import RunError
from fpo.recipe import Recipe
from fpo.scoring import Packed, Scores
from fpo.stage2_align.measure import Measurement, ObjectiveMeter, batch_metrics
from fpo.stage2_align.run import columns_of
from fpo.stage2_align.stream import Batch, PairStream, check_groups, on_device
from fpo.stage2_align.sums import MetricSums
from fpo.store import Cache

Note = Callable[[Measurement, Batch], object]
"""What is given each batch with what was measured of it."""

# As Trainer has it.
DEFAULT_BATCH = 8


def check_held_out(recipe: Recipe, cache: Cache, run: Path, facts: dict[str, Any]) -> None:
    """
    RunError where the held-out cache was scored by another reference than the run's, or the objective reads another
    SAE of it; DataError where its groups are no pairs.

    facts  of run.json
    """
    if facts["reference"] != cache.recipe["scorer"]["reference"]:
        raise RunError(
            f"{run}: this run was trained against another reference than the one that scored the held-out cache "
            f"{cache.key[:12]}\n"
            f"  the run's has the weights {facts['reference']['weights'][:12]}, in {facts['reference']['dtype']}"
        )
    theirs, ours = ([column["spec"] for column in columns] for columns in (facts["columns"], columns_of(cache)))
    if theirs != ours:
        raise RunError(
            f"{run}: this run was trained against another SAE, hookpoint, top_k or other top logits than the held-out "
            f"cache {cache.key[:12]} has\n  the run's: {theirs}\n  the cache's: {ours}"
        )
    check_groups(cache, recipe.objective)


def held_out_stream(recipe: Recipe, cache: Cache, rank: int = 0, world: int = 1) -> PairStream:
    """Every group of a cache once, this process's slice of each batch; always in the same order."""
    return PairStream(
        cache,
        seed=0,
        per_device=recipe.training.get("per_device_eval_batch_size", DEFAULT_BATCH),
        rank=rank,
        world=world,
        objective=recipe.objective,
    )


@torch.no_grad()
def held_out_metrics(
    score: Callable[..., Scores],
    meter: ObjectiveMeter,
    stream: PairStream,
    device: torch.device,
    scored: Callable[[int], object] = lambda groups: None,
    note: Note = lambda measurement, batch: None,
) -> dict[str, float]:
    """
    The objective's loss and metrics, each the mean over all groups of the stream's cache: the same in every process,
    and for any number of them. Draws no random number.

    score   the policy, called in the arithmetic of its training
    scored  is told how many more groups this process has scored
    note    is given each batch with what was measured of it
    """
    sums = MetricSums()
    for batch in stream:
        assert batch is not None
        here = on_device(batch, device)
        scores = score(**Packed.of(here)._asdict())
        measurement = meter.measure(scores, here, stream.world)
        sums.add(batch_metrics(measurement, scores, here))
        note(measurement, here)
        scored(len(batch["n_completions"]))
    return {f"eval_{name}": value for name, value in sums.means(stream.world, device).items()}
