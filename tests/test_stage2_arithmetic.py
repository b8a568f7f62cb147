"""
Reference and policy are measured with the same arithmetic: before the first step the logratios of a mixed-precision run
are 0, parity looks at the model as it trains, and evaluation computes as training did.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import TinyWorld, build_tiny_world

from fpo.errors import ParityError, RecipeError
from fpo.recipe import Recipe
from fpo.scoring import Packed, pack
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.parity import OFFSET_TOLERANCE, PARITY_SHARDS, check_parity, random_pairs
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import METRICS_FILE, read_run
from fpo.stage2_align.stream import PairStream
from fpo.store import Cache, Groups

MIXED = {"autocast": "bfloat16"}
STILL = {"bf16": True, "learning_rate": 0.0, "max_steps": 3, "save_strategy": "no"}
DPO = {"name": "dpo", "beta": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


def run(recipe: Recipe, world: TinyWorld, folder: Path) -> list[dict[str, float]]:
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), folder)
    return read_metrics(folder / METRICS_FILE)


def test_a_mixed_precision_run_starts_at_log_2_where_its_reference_was_scored_so(
    world: TinyWorld, tmp_path: Path
) -> None:
    """
    And evaluates so; from a float32 reference, the rounding of bfloat16 stands in every logratio. Some processors add
    up a bfloat16 product in another order for another number of rows, and then one rounding in a thousand falls
    differently: what is left is held against what stands there otherwise.
    """
    same = world.recipe(reference=MIXED, training=STILL, objective=DPO)
    other = world.recipe(policy={"same_arithmetic": False}, training=STILL, objective=DPO)
    off: list[tuple[float, float, float]] = []
    for recipe in (same, other):
        folder = tmp_path / str(len(off))
        rows = run(recipe, world, folder)
        held_out = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), folder)
        worst = max(abs(row["loss"] - math.log(2)) for row in rows)
        off.append((worst, abs(held_out["eval_loss"] - math.log(2)), read_run(folder)["parity"]))
    for ours, otherwise in zip(*off, strict=True):
        assert otherwise > 1e-4
        assert ours < otherwise / 20


def test_what_the_feature_term_sees_is_the_same_too(world: TinyWorld, tmp_path: Path) -> None:
    same = run(world.recipe(reference=MIXED, training=STILL), world, tmp_path / "same")
    other = run(world.recipe(policy={"same_arithmetic": False}, training=STILL), world, tmp_path / "other")
    for ours, otherwise in zip(same, other, strict=True):
        assert otherwise["features/distance_rejected"] > 1e-3
        assert ours["features/distance_rejected"] < otherwise["features/distance_rejected"] / 50


def test_log_probs_under_autocast_are_float32(world: TinyWorld, tmp_path: Path) -> None:
    """Logits are rounded to bfloat16 on the way, their log-softmax is not."""
    recipe = world.recipe(reference=MIXED, training=STILL, objective=DPO)
    build_caches(recipe, world.store)
    stored = torch.from_numpy(find_cache(recipe, world.store).shard(0).token_logps)
    assert (stored.bfloat16().float() != stored).float().mean() > 0.9


def test_a_launcher_cannot_bring_in_another_arithmetic(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    build_caches(recipe, world.store)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match="this start runs in mixed precision bf16, the recipe says no; set training"):
        align(recipe, find_cache(recipe, world.store), tmp_path / "run")


def parity_of(world: TinyWorld, recipe: Recipe, model: Any, per_device: int = 4) -> float:
    build_caches(recipe, world.store)
    stream = PairStream(find_cache(recipe, world.store), seed=3, per_device=per_device)
    arithmetic = (recipe.policy_arithmetic(), recipe.reference.arithmetic)
    return check_parity(model, ObjectiveMeter.of(recipe), stream, arithmetic, torch.device("cpu"))


def test_parity_refuses_an_offset_in_one_direction_that_is_small_in_size(world: TinyWorld, tmp_path: Path) -> None:
    """Logits 0.02 % larger: each log-prob is off by less than float32's tolerance, but most of them downwards."""
    recipe = world.recipe()
    model = load_policy(recipe, ObjectiveMeter.of(recipe), tmp_path)
    assert parity_of(world, recipe, model) < 1e-5
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.0002)
    with pytest.raises(ParityError, match=r"token log-probs are off by -\S+ nats on average, in one direction"):
        parity_of(world, recipe, model)
    pairs = random_pairs(PairStream(find_cache(recipe, world.store), seed=3, per_device=4), 32)
    with torch.no_grad():
        scores = model(**pack(pairs.input_ids, pairs.splits, pairs.n_completions)._asdict())
    apart = scores.token_logps - torch.from_numpy(pairs.token_logps)
    assert float(apart.abs().mean()) < 1e-3
    assert float(apart.mean()) < -OFFSET_TOLERANCE["float32"]


def test_parity_takes_random_pairs_in_batches_of_trainings_size(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe()
    model = load_policy(recipe, ObjectiveMeter.of(recipe), tmp_path)
    sizes: list[int] = []

    class Watched(torch.nn.Module):
        def forward(self, **batch: Any) -> Any:
            sizes.append(len(Packed(**batch).lengths) // 2)
            return model(**batch)

    parity_of(world, recipe, Watched(), per_device=3)
    assert (max(sizes), sum(sizes)) == (3, 32)
    cache = find_cache(recipe, world.store)
    drawn = [random_pairs(PairStream(cache, seed=s, per_device=3), 8).group_id.tolist() for s in (3, 3, 4)]
    first = cache.shard(0).group_id[:8].tolist()
    assert drawn[0] == drawn[1] != drawn[2]
    assert not set(drawn[0]) <= set(first)


def test_parity_reads_a_few_shards_and_as_many_as_hold_its_pairs(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 shards of 2 pairs: 6 pairs come from 4 shards, and 31 take 16."""
    recipe = world.recipe(cache={"shard_pairs": 2})
    build_caches(recipe, world.store)
    cache = find_cache(recipe, world.store)
    shards: list[int] = []
    read = Cache.shard

    def noting(self: Cache, sid: int) -> Groups:
        shards.append(sid)
        return read(self, sid)

    monkeypatch.setattr(Cache, "shard", noting)
    for count, n_shards in ((6, PARITY_SHARDS), (31, 16)):
        shards.clear()
        pairs = random_pairs(PairStream(cache, seed=3, per_device=4), count)
        assert len(set(pairs.group_id.tolist())) == count
        assert len(shards) == n_shards
        assert sorted(shards) != list(range(n_shards))


def test_parity_finds_a_changed_row_anywhere_in_the_cache(world: TinyWorld, tmp_path: Path) -> None:
    """One completion of the last shard, as a stranger's cache might hold it; no row before it is touched."""
    recipe = world.recipe()
    model = load_policy(recipe, ObjectiveMeter.of(recipe), tmp_path)
    build_caches(recipe, world.store)
    stream = PairStream(find_cache(recipe, world.store), seed=3, per_device=4)
    rows = stream.rows
    drawn = random_pairs(stream, 32).group_id
    last = next(int(group) for group in find_cache(recipe, world.store).shard(2).group_id if group in drawn)

    def poisoned(numbers: np.ndarray) -> Any:
        pairs = rows(numbers)
        at = int(np.flatnonzero(pairs.group_id == last)[0])
        start, end = pairs.scored_splits[2 * at : 2 * at + 2]
        pairs.token_logps[start:end] += 1.0
        return pairs

    stream.rows = poisoned  # type: ignore[method-assign]
    arithmetic = (recipe.policy_arithmetic(), recipe.reference.arithmetic)
    with pytest.raises(ParityError, match=f"pair {last}, chosen"):
        check_parity(model, ObjectiveMeter.of(recipe), stream, arithmetic, torch.device("cpu"))


def test_other_weights_are_refused_when_training_begins_and_the_folder_stays_free(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", 12, 2)
    recipe = world.recipe(training={"max_steps": 1})
    build_caches(recipe, world.store)
    cache = find_cache(recipe, world.store)
    weights = world.root / "model" / "model.safetensors"
    kept = weights.read_bytes()
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ParityError, match="token log-probs differ by"):
        align(recipe, cache, tmp_path / "run")
    weights.write_bytes(kept)
    assert align(recipe, cache, tmp_path / "run").steps == 1
