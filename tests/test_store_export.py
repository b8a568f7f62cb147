"""The dataset that other trainers read: the cache's tokens and log-probs in the order of the data, whole or absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_cases import World, make_groups, make_recipe

from fpo.errors import CacheConflict, CacheDamaged, CacheError
from fpo.store import CacheWriter, export_trl, open_cache
from fpo.store.export import TRL_COLUMNS

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


PAIRS = [(2, (3, 1)), (0, (1, 2)), (4, (2, 2)), (1, (1, 1)), (3, (5, 4))]


@pytest.fixture
def world(tmp_path):
    """Five groups of two, with columns that no export has."""
    return World(tmp_path / "store", sizes=PAIRS)


@pytest.mark.parametrize("block_tokens", [2**28, 16, 1])
def test_an_export_holds_every_pair_in_the_order_of_the_dataset(world, tmp_path, block_tokens):
    """Whatever fits into memory at a time: 32 tokens are one block, three, or one per token."""
    calls = []
    cache = open_cache(world.store, world.fill().key)
    report = export_trl(cache, tmp_path / "out", lambda *at: calls.append(at), block_tokens)
    found = datasets.load_from_disk(tmp_path / "out")
    assert tuple(found.column_names) == TRL_COLUMNS
    pairs = world.groups
    segments = [pairs.input_ids[a:b].tolist() for a, b in zip(pairs.splits, pairs.splits[1:], strict=False)]
    for part, name in enumerate(TRL_COLUMNS[:3]):
        assert list(found[name]) == segments[part::3]
    assert np.array_equal(np.array(found["ref_chosen_logps"], np.float32), pairs.ref_logps[::2])
    assert np.array_equal(np.array(found["ref_rejected_logps"], np.float32), pairs.ref_logps[1::2])
    assert {str(f) for f in found.features.values()} == {"List(Value('int32'))", "Value('float32')"}
    assert found.info.description.count(cache.key) == found.info.description.count(cache.digest) == 1
    assert (report.n_groups, report.key, report.digest) == (5, cache.key, cache.digest)
    assert report.n_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    blocks = -(-int(pairs.n_tokens) // block_tokens)
    assert calls[-1] == (3 * blocks, 3 * blocks)


@pytest.mark.parametrize("block_tokens", [2**28, 1])
def test_the_largest_id_that_there_is_is_exported(tmp_path, block_tokens):
    ids = np.array([3, 2**64 - 1], np.uint64)
    pairs = make_groups([(1, (2, 3))] * 2, ids=ids)
    plan = [ids]
    writer = CacheWriter(tmp_path / "store", make_recipe(pairs, plan), plan)
    writer.write(0, pairs, {})
    writer.seal({})
    export_trl(open_cache(tmp_path / "store", writer.key), tmp_path / "out", block_tokens=block_tokens)
    found = datasets.load_from_disk(tmp_path / "out")
    assert list(found["chosen_ids"]) == [pairs.input_ids[n : n + 2].tolist() for n in (1, 7)]


def test_dropped_rows_leave_gaps_in_the_ids_and_none_in_the_export(tmp_path):
    ids = np.array([7, 2, 40], np.uint64)
    pairs = make_groups([(1, (2, 3))] * 3, ids=ids)
    ordered = pairs.take(np.argsort(ids))
    plan = [np.array([7, 40]), np.array([2])]
    writer = CacheWriter(tmp_path / "store", make_recipe(ordered, plan), plan)
    writer.write(0, pairs.take([0, 2]), {})
    writer.write(1, pairs.take([1]), {})
    writer.seal({})
    export_trl(open_cache(tmp_path / "store", writer.key), tmp_path / "out")
    found = datasets.load_from_disk(tmp_path / "out")
    assert np.array_equal(np.array(found["ref_chosen_logps"], np.float32), pairs.ref_logps[[2, 0, 4]])


def test_a_group_that_is_no_pair_is_named_and_nothing_is_left(tmp_path):
    """Groups 2 and 3 hold three completions and one: the first shard, of groups 3 and 0, is met first."""
    world = World(tmp_path / "store")
    world.fill()
    with pytest.raises(
        CacheError, match=r"group 3 has 1 completion, TRL's DPOTrainer takes 2; train .* fpo align"
    ) as said:
        export_trl(open_cache(world.store, world.key), tmp_path / "place/out")
    assert "\n" not in str(said.value)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_mask_is_nothing_that_trl_can_be_told(tmp_path):
    world = World(tmp_path / "store", specs=(), sizes=PAIRS, score_mask=True)
    world.fill()
    with pytest.raises(CacheError, match="by a mask which tokens count, TRL's DPOTrainer counts all of them"):
        export_trl(open_cache(world.store, world.key), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_touched(world, tmp_path):
    cache = open_cache(world.store, world.fill().key)
    (tmp_path / "out").mkdir()
    export_trl(cache, tmp_path / "out")
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(CacheConflict, match="is there already"):
        export_trl(cache, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_damaged_cache_is_not_exported_and_leaves_nothing(world, tmp_path):
    cache = open_cache(world.store, world.fill().key)
    path = world.store.path(cache.key) / "shards/000002.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheDamaged, match="000002"):
        export_trl(cache, tmp_path / "place/out")
    assert list((tmp_path / "place").iterdir()) == []


def test_the_store_imports_neither_datasets_nor_arrow():
    code = "import sys, fpo.store; sys.exit(any(name in sys.modules for name in ('datasets', 'pyarrow', 'torch')))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_the_page_shows_the_columns_that_are_written():
    page = (Path(__file__).parents[1] / "docs/export.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in TRL_COLUMNS)
