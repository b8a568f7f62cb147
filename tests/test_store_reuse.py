"""Pairs that another cache of the same scorer holds are copied: found by their tokens, verified, put in their place."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import World, make_pairs, make_recipe, same
from store_forgery import forge, forge_recipe

from fpo.memo import memo_folder
from fpo.store import CacheWriter, Pairs, ReusableRows, Store, open_cache, pull, push, rm, verify
from fpo.store.format.encoding import encode_shard
from fpo.store.format.manifest import recipe_facts

N = 12
LENGTHS = [(n % 3, 1 + n % 4, 2 + n % 2) for n in range(N)]
ALL = make_pairs(LENGTHS, seed=3)


@pytest.fixture(autouse=True)
def private_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def dataset(rows) -> Pairs:
    """These of the twelve pairs as a dataset of their own: the ids are rows of it."""
    return dataclasses.replace(ALL.take(rows), pair_id=np.arange(len(rows), dtype=np.uint64))


def build(store, rows, shard_pairs=3, seal=True, **scorer) -> str:
    pairs = dataset(rows)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    plan = [order[i : i + shard_pairs] for i in range(0, len(rows), shard_pairs)]
    recipe = make_recipe(pairs, plan)
    recipe["scorer"] |= scorer
    writer = CacheWriter(store, recipe, plan)
    for sid in writer.missing():
        writer.write(sid, pairs.take(plan[sid]), {})
    if seal:
        writer.seal({})
    return writer.key


SCORER = make_recipe(ALL, [np.arange(N)])["scorer"]


def test_rows_of_two_caches_make_a_third_without_computing(tmp_path):
    """Re-mixing: every second pair from one, the others from the other, under new ids and in another order."""
    a, b = build(tmp_path, range(0, N, 2)), build(tmp_path, range(1, N, 2))
    mix = dataset(list(range(N - 1, -1, -1)))
    reusable = ReusableRows(tmp_path, SCORER)
    assert reusable.held(mix.pair_digest) == N
    first, second = mix.take(range(7)), mix.take(range(7, N))
    gathered = reusable.gather([first.pair_digest, second.pair_digest])
    for shard, reused in zip((first, second), gathered, strict=True):
        assert reused.missing(len(shard)).tolist() == []
        assert same(reused.merge(shard.pair_id, None), shard)
    # Pairs 11, 9, 7, 5 are b's; 10, 8, 6 are a's.
    assert gathered[0].sources == {a: 3, b: 4}


def test_what_no_cache_holds_is_computed_and_merged_in_its_place(tmp_path):
    build(tmp_path, [1, 4, 5, 9])
    shard = dataset([0, 9, 2, 4, 11])
    (reused,) = ReusableRows(tmp_path, SCORER).gather([shard.pair_digest])
    assert reused.positions.tolist() == [1, 3]
    assert reused.missing(5).tolist() == [0, 2, 4]
    assert same(reused.merge(shard.pair_id, shard.take([0, 2, 4])), shard)


def test_a_store_without_such_pairs_leaves_all_to_compute(tmp_path):
    shard = dataset([0, 1])
    for _ in range(2):
        (reused,) = ReusableRows(tmp_path, SCORER).gather([shard.pair_digest])
        assert (reused.positions.tolist(), reused.pairs, reused.sources) == ([], None, {})
        assert same(reused.merge(shard.pair_id, shard), shard)
        build(tmp_path, [5, 6])
    assert ReusableRows(tmp_path, SCORER).gather([]) == []


def test_only_complete_caches_of_the_same_scorer_count(tmp_path):
    build(tmp_path, range(N), seal=False)
    build(tmp_path, range(N), dtype="bfloat16")
    other = copy.deepcopy(SCORER)
    other["features"][0]["top_k"] = 5
    assert ReusableRows(tmp_path, SCORER).held(ALL.pair_digest) == 0
    assert ReusableRows(tmp_path, other).held(ALL.pair_digest) == 0
    assert ReusableRows(tmp_path, {**SCORER, "dtype": "bfloat16"}).held(ALL.pair_digest) == N


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(0, N - 1), min_size=1, unique=True), max_size=3),
    wanted=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=6), min_size=1, max_size=4),
    memory=st.sampled_from([0, 200, 2**30]),
)
def test_any_mixture_of_caches_gives_the_rows_that_were_asked_for(tmp_path_factory, sources, wanted, memory):
    """Overlapping sources, pairs asked for twice, any memory: gathered shard by shard, all rows are the right ones."""
    store = Store(tmp_path_factory.mktemp("store"))
    for rows in sources:
        build(store, rows)
    known = {row for rows in sources for row in rows}
    reusable = ReusableRows(store, SCORER, memory)
    pending = list(wanted)
    while pending:
        shards = [dataset(rows) for rows in pending]
        gathered = reusable.gather([shard.pair_digest for shard in shards])
        assert 1 <= len(gathered) <= len(pending)
        if memory == 0 and known:
            assert len(gathered) == 1 or not any(reused.sources for reused in gathered[1:])
        for rows, shard, reused in zip(pending, shards, gathered, strict=False):
            assert reused.positions.tolist() == [at for at, row in enumerate(rows) if row in known]
            rest = reused.missing(len(rows))
            assert same(reused.merge(shard.pair_id, shard.take(rest) if len(rest) else None), shard)
        pending = pending[len(gathered) :]
    assert reusable.problems == []


def test_the_index_is_remembered_and_read_without_the_shards(tmp_path, monkeypatch):
    build(tmp_path, range(N))
    assert ReusableRows(tmp_path, SCORER).held(ALL.pair_digest) == N
    assert len(list(memo_folder().glob("rows-*.npy"))) == 1
    monkeypatch.setattr("fpo.store.cache.Cache.shard", lambda *_: pytest.fail("a shard was read"))
    assert ReusableRows(tmp_path, SCORER).held(ALL.pair_digest) == N


@pytest.mark.parametrize("damage", ["empty", "pickle", "short", "wrong"])
def test_a_damaged_index_costs_time_or_rows_but_never_gives_wrong_ones(tmp_path, damage):
    build(tmp_path, range(N))
    ReusableRows(tmp_path, SCORER).held(ALL.pair_digest)
    (memo,) = memo_folder().glob("rows-*.npy")
    index = np.load(memo)
    if damage == "empty":
        memo.write_bytes(b"")
    elif damage == "pickle":
        np.save(memo, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "short":
        np.save(memo, index[:-1])
    else:
        np.save(memo, index[::-1])
    (reused,) = ReusableRows(tmp_path, SCORER).gather([ALL.pair_digest])
    rest = reused.missing(N)
    assert same(reused.merge(ALL.pair_id, ALL.take(rest) if len(rest) else None), ALL)
    if damage != "wrong":
        assert len(rest) == 0


def test_a_damaged_source_is_named_and_its_rows_are_computed(tmp_path):
    key = build(tmp_path, range(N))
    reusable = ReusableRows(tmp_path, SCORER)
    assert reusable.held(ALL.pair_digest) == N
    path = Store(tmp_path).path(key) / "shards/000001.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (reused,) = reusable.gather([ALL.pair_digest])
    assert len(reused.missing(N)) == 3
    assert same(reused.merge(ALL.pair_id, ALL.take(reused.missing(N))), ALL)
    (problem,) = reusable.problems
    assert "000001.zarr.zip" in problem
    # A second gathering does not read it again.
    reusable.gather([ALL.pair_digest])
    assert len(reusable.problems) == 1


def test_a_source_whose_manifest_is_damaged_is_named_and_left_out(tmp_path):
    key = build(tmp_path, range(N))
    (Store(tmp_path).path(key) / "manifest.json").unlink()
    (Store(tmp_path).path(key) / "manifest.json").write_text("{}")
    reusable = ReusableRows(tmp_path, SCORER)
    assert reusable.held(ALL.pair_digest) == 0
    assert "manifest.json" in reusable.problems[0]


def poisoned(store, key) -> None:
    """Every shard of a cache says other log-probs; checksums and invariants are in order, so verify finds nothing."""
    cache = open_cache(store, key)
    for sid in range(len(cache.shard_pairs)):
        pairs = cache.shard(sid)
        wrong = dataclasses.replace(pairs, token_logps=pairs.token_logps * 2, ref_logps=pairs.ref_logps * 2)
        forge(Store(store).path(key), encode_shard(wrong, key, sid, recipe_facts(cache.recipe).bounds), sid)
    assert verify(store, key).ok


@pytest.mark.parametrize("how", ["pulled", "pulled, with its maker's marks", "unpacked"])
def test_rows_of_a_cache_from_elsewhere_are_not_copied(tmp_path, how):
    """Right tokens, wrong numbers: they stay under the key that was asked for."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    key = build(theirs, range(N))
    if how != "pulled, with its maker's marks":
        poisoned(theirs, key)
    build(ours, [0, 1])
    if how == "unpacked":
        shutil.copytree(theirs / key, ours / key)
    else:
        pull(theirs, key, ours)
    reusable = ReusableRows(ours, SCORER)
    assert reusable.held(ALL.pair_digest) == 2
    assert reusable.foreign == [key]
    (reused,) = reusable.gather([ALL.pair_digest])
    assert reused.positions.tolist() == [0, 1]
    assert same(reused.merge(ALL.pair_id, ALL.take(range(2, N))), ALL)


def test_what_was_computed_here_may_go_and_come_back(tmp_path):
    key = build(tmp_path / "here", range(N))
    push(tmp_path / "here", key, tmp_path / "shelf")
    rm(tmp_path / "here", key)
    pull(tmp_path / "shelf", key, tmp_path / "here")
    assert ReusableRows(tmp_path / "here", SCORER).held(ALL.pair_digest) == N


def test_a_cache_that_was_begun_elsewhere_and_finished_here_gives_only_what_was_computed_here(tmp_path):
    """A pull that was stopped, or a tarball without a manifest: its shards stand there with records of their own."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    key = build(theirs, range(N))
    poisoned(theirs, key)
    shutil.copytree(theirs / key, ours / key)
    for name in ("manifest.json", "shards/000002.zarr.zip", "records/000002.json", "records/000001.json"):
        (ours / key / name).unlink()
    pairs = dataset(range(N))
    order = np.random.default_rng(N).permutation(N)
    plan = [order[i : i + 3] for i in range(0, N, 3)]
    writer = CacheWriter(ours, make_recipe(pairs, plan), plan)
    assert writer.missing() == [2]
    writer.write(2, pairs.take(plan[2]), {})
    writer.seal({})
    assert writer.not_computed_here() == 3
    reusable = ReusableRows(ours, SCORER)
    assert reusable.held(ALL.pair_digest) == 3
    (reused,) = reusable.gather([ALL.pair_digest])
    assert sorted(reused.positions) == sorted(plan[2])
    assert same(reused.merge(ALL.pair_id, ALL.take(reused.missing(N))), ALL)


def test_looking_for_rows_holds_no_cache_open_and_uses_none(tmp_path):
    """Or a thousand siblings would take a thousand files, and none would ever count as unused."""
    keys = [build(tmp_path, [n]) for n in range(N)]
    for key in keys:
        os.utime(Store(tmp_path).use_file(key), (0, 0))
    before = len(os.listdir("/proc/self/fd"))
    reusable = ReusableRows(tmp_path, SCORER)
    (reused,) = reusable.gather([ALL.pair_digest])
    assert len(reused.positions) == N
    assert len(os.listdir("/proc/self/fd")) == before
    assert {Store(tmp_path).use_file(key).stat().st_mtime for key in keys} == {0}


def test_a_claim_of_millions_of_pairs_beside_an_honest_cache_costs_nothing(tmp_path):
    """Counts of caches from elsewhere are not believed: nothing is allocated for them."""
    build(tmp_path, range(N))
    claims = {"digest": "0" * 64, "n_pairs": 2**31, "seed": 0, "shard_pairs": [2**16] * 2**15}
    forge_recipe(tmp_path, {"format": 1, "scorer": SCORER, "pairs": claims})
    tracemalloc.start()
    assert ReusableRows(tmp_path, SCORER).held(ALL.pair_digest) == N
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_a_cache_filled_by_copying_passes_every_check(tmp_path):
    world = World(tmp_path)
    world.fill()
    pairs = dataclasses.replace(world.pairs.take([4, 2, 0]), pair_id=np.arange(3, dtype=np.uint64))
    plan = [np.array([2, 0]), np.array([1])]
    writer = CacheWriter(world.store, make_recipe(pairs, plan), plan)
    reusable = ReusableRows(world.store, world.recipe["scorer"])
    for sid, reused in enumerate(reusable.gather([pairs.pair_digest[ids] for ids in plan])):
        writer.write(sid, reused.merge(plan[sid].astype(np.uint64), None), {"reused": reused.sources})
    writer.seal({})
    assert verify(world.store, writer.key).ok
    assert same(open_cache(world.store, writer.key).shard(0), pairs.take([2, 0]))
