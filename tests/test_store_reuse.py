"""Rows that another cache of the same scorer holds are copied: found by their tokens, verified, put in their place."""

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
from store_cases import (
    FEATURES,
    HIDDEN_GRAM,
    PROMPT_FEATURES,
    TOP_LOGITS,
    make_column,
    make_groups,
    make_recipe,
    same,
)
from store_forgery import forge, forge_recipe

from fpo.memo import memo_folder
from fpo.store import (
    CacheWriter,
    Column,
    ColumnRows,
    Copied,
    Groups,
    HiddenGram,
    Reusable,
    Store,
    Wanting,
    cache_key,
    column_recipe,
    open_cache,
    pull,
    push,
    rm,
    rows_per,
    verify,
)
from fpo.store.format.encoding import encode_shard
from fpo.store.format.manifest import recipe_facts
from fpo.store.reuse import token_rows

pytestmark = pytest.mark.usefixtures("private_memory")

N = 12
SIZES = [(n % 3, [1 + n % 4, 2 + n % 2, *([3] if n % 5 == 0 else [])]) for n in range(N)]
SPECS = [FEATURES, TOP_LOGITS, PROMPT_FEATURES, HIDDEN_GRAM]
WANTS = [None, *SPECS]
_BARE = make_groups(SIZES, seed=3)
ALL = _BARE.with_columns([make_column(spec, _BARE, seed) for seed, spec in enumerate(SPECS)])
K = len(ALL.completion_digest)


def dataset(rows) -> Groups:
    """These of the twelve groups as a dataset of their own: the ids are rows of it."""
    return dataclasses.replace(ALL.take(rows), group_id=np.arange(len(rows), dtype=np.uint64))


def build(store, rows, shard_groups=3, seal=True, specs=SPECS, **scorer) -> str:
    groups = dataset(rows)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    plan = [order[i : i + shard_groups] for i in range(0, len(rows), shard_groups)]
    recipe = make_recipe(groups, plan)
    recipe["scorer"] |= scorer
    writer = CacheWriter(store, recipe, plan)
    for sid in writer.missing():
        writer.write(sid, dataclasses.replace(groups.take(plan[sid]), columns=()), {})
    for n, spec in enumerate(SPECS):
        if spec in specs:
            add_column(store, writer, groups, n)
    if seal:
        writer.seal({})
    return writer.key


def add_column(store, base, groups, n) -> None:
    writer = CacheWriter(store, column_recipe(base.key, SPECS[n], [len(ids) for ids in base.plan]), base.plan)
    for sid in writer.missing():
        part = groups.take(base.plan[sid].astype(int))
        writer.write(sid, ColumnRows(part.group_id, len(part.completion_digest), part.columns[n]), {})
    writer.seal({})


SCORER = make_recipe(ALL, [np.arange(N)])["scorer"]


def looking(store, wants=WANTS, scorer=SCORER, **options) -> Reusable:
    return Reusable(store, scorer, wants, **options)


def wanting(groups: Groups) -> Wanting:
    return Wanting(groups.completion_digest, groups.n_completions)


def truth(groups: Groups) -> list[Column]:
    """What is to be known of these groups, want by want."""
    return [token_rows(groups), *groups.columns]


def check(shard: Groups, copied: list[Copied]) -> list[list[int]]:
    """What was copied is right and completes to the truth; the rows that were missing, want by want."""
    gaps = []
    for own, expected in zip(copied, truth(shard), strict=True):
        rest = own.missing(len(expected))
        assert same(own.merge(len(expected), expected.take(rest) if len(rest) else None), expected)
        gaps.append(rest.tolist())
    return gaps


def test_rows_of_two_caches_make_a_third_without_computing(tmp_path):
    """Re-mixing: every second group from one, the others from the other, under new ids and in another order."""
    a, b = build(tmp_path, range(0, N, 2)), build(tmp_path, range(1, N, 2))
    mix = dataset(list(range(N - 1, -1, -1)))
    reusable = looking(tmp_path)
    assert [reusable.held(want, wanting(mix)) for want in range(5)] == [K, K, K, N, N]
    first, second = mix.take(range(7)), mix.take(range(7, N))
    gathered = reusable.gather([wanting(first), wanting(second)])
    for shard, copied in zip((first, second), gathered, strict=True):
        assert check(shard, copied) == [[]] * 5
    # Groups 11, 9, 7, 5 are b's; 10, 8, 6 are a's; 10 and 5 hold three completions.
    assert gathered[0][0].sources == {a: 7, b: 9}
    assert gathered[0][3].sources == {a: 3, b: 4}


def test_completions_are_found_in_whatever_group_and_order_they_stand(tmp_path):
    """Group 0 (three completions) reversed and without the first: copied, the gram with its rows turned too."""
    build(tmp_path, [0])
    group = ALL.take([0])
    turned = Wanting(group.completion_digest[[2, 1]], np.array([2], np.uint32))
    ((logps, features, top, prompt, gram),) = looking(tmp_path).gather([turned])
    assert same(logps.rows, token_rows(group).take([2, 1]))
    assert same(features.rows, group.columns[0].take([2, 1]))
    assert same(top.rows, group.columns[1].take([2, 1]))
    assert same(prompt.rows, group.columns[2])
    assert isinstance(gram.rows, HiddenGram)
    products = group.columns[3].products.reshape(3, 3)
    assert gram.rows.products.reshape(2, 2).tolist() == products[np.ix_([2, 1], [2, 1])].tolist()


def test_a_group_of_completions_from_two_groups_has_its_products_computed(tmp_path):
    """Each completion alone is copied; what two prompts' completions have in common nobody measured."""
    build(tmp_path, [0, 5])
    mixed = Wanting(ALL.take([0, 5]).completion_digest[[0, 3]], np.array([2], np.uint32))
    ((logps, *_, gram),) = looking(tmp_path).gather([mixed])
    assert logps.missing(2).tolist() == []
    assert gram.missing(1).tolist() == [0]


def test_what_no_cache_holds_is_computed_and_merged_in_its_place(tmp_path):
    build(tmp_path, [1, 4, 5, 9])
    shard = dataset([0, 9, 2, 4, 11])
    (copied,) = looking(tmp_path).gather([wanting(shard)])
    # 0 has the completions 0 to 2, 9 has 3 and 4, 2 has 5 and 6, 4 has 7 and 8.
    assert check(shard, copied) == [[0, 1, 2, 5, 6, 9, 10]] * 3 + [[0, 2, 4]] * 2


def test_a_column_that_a_source_lacks_is_computed_and_the_rest_is_copied(tmp_path):
    build(tmp_path, range(N), specs=[FEATURES])
    build(tmp_path, range(6), specs=[TOP_LOGITS])
    (copied,) = looking(tmp_path).gather([wanting(ALL)])
    gaps = check(ALL, copied)
    assert gaps[:2] == [[], []]
    assert gaps[2] == list(range(int(ALL.completion_starts[6]), K))
    assert gaps[3:] == [list(range(N))] * 2


def test_a_source_with_more_of_the_largest_serves_what_asks_for_less(tmp_path):
    build(tmp_path, range(N))
    less = [{**FEATURES, "top_k": 1}, {**TOP_LOGITS, "m": 1}]
    ((features, top),) = looking(tmp_path, wants=less).gather([wanting(ALL)])
    assert features.rows.lengths.max() == 1
    assert np.array_equal(top.rows.logps, ALL.columns[1].logps[:, :1])
    more = [{**FEATURES, "top_k": 5}, {**FEATURES, "hookpoint": "model.layers.9"}]
    assert [looking(tmp_path, wants=more).held(want, wanting(ALL)) for want in (0, 1)] == [0, 0]


def test_a_store_without_such_groups_leaves_all_to_compute(tmp_path):
    shard = dataset([0, 1])
    for _ in range(2):
        (copied,) = looking(tmp_path).gather([wanting(shard)])
        assert all((own.positions.tolist(), own.rows, own.sources) == ([], None, {}) for own in copied)
        check(shard, copied)
        build(tmp_path, [5, 6])
    assert looking(tmp_path).gather([]) == []


def test_only_other_complete_caches_of_the_same_scorer_count(tmp_path):
    build(tmp_path, range(N), seal=False)
    build(tmp_path, range(N), dtype="bfloat16")
    own = build(tmp_path, range(3))
    assert looking(tmp_path).held(0, wanting(ALL)) == int(ALL.completion_starts[3])
    assert looking(tmp_path, apart_from=own).held(0, wanting(ALL)) == 0
    other = copy.deepcopy(SCORER) | {"weights": "00" * 32}
    assert looking(tmp_path, scorer=other).held(0, wanting(ALL)) == 0
    assert looking(tmp_path, scorer={**SCORER, "dtype": "bfloat16"}).held(0, wanting(ALL)) == K


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(0, N - 1), min_size=1, unique=True), max_size=3),
    wanted=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=6), min_size=1, max_size=4),
    memory=st.sampled_from([0, 200, 2**30]),
)
def test_any_mixture_of_caches_gives_the_rows_that_were_asked_for(tmp_path_factory, sources, wanted, memory):
    """Overlapping sources, groups asked for twice, any memory: gathered shard by shard, all rows are the right ones."""
    store = Store(tmp_path_factory.mktemp("store"))
    for rows in sources:
        build(store, rows)
    known = {row for rows in sources for row in rows}
    reusable = looking(store, memory=memory)
    pending = list(wanted)
    while pending:
        shards = [dataset(rows) for rows in pending]
        gathered = reusable.gather([wanting(shard) for shard in shards])
        assert 1 <= len(gathered) <= len(pending)
        if memory == 0 and known:
            assert len(gathered) == 1 or not any(own.sources for copied in gathered[1:] for own in copied)
        for rows, shard, copied in zip(pending, shards, gathered, strict=False):
            gaps = check(shard, copied)
            assert gaps[3] == gaps[4] == [at for at, row in enumerate(rows) if row not in known]
        pending = pending[len(gathered) :]
    assert reusable.problems == []


def test_the_index_is_remembered_and_read_without_the_shards(tmp_path, monkeypatch):
    build(tmp_path, range(N))
    assert looking(tmp_path).held(0, wanting(ALL)) == K
    assert len(list(memo_folder().glob("rows-*.npy"))) == 1
    monkeypatch.setattr("fpo.store.cache.Cache.shard", lambda *_: pytest.fail("a shard was read"))
    assert looking(tmp_path).held(0, wanting(ALL)) == K


@pytest.mark.parametrize("damage", ["empty", "pickle", "short", "wrong"])
def test_a_damaged_index_costs_time_or_rows_but_never_gives_wrong_ones(tmp_path, damage):
    build(tmp_path, range(N))
    looking(tmp_path)
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
    (copied,) = looking(tmp_path).gather([wanting(ALL)])
    gaps = check(ALL, copied)
    if damage != "wrong":
        assert gaps == [[]] * 5


def test_a_damaged_source_is_named_and_its_rows_are_computed(tmp_path):
    key = build(tmp_path, range(N))
    reusable = looking(tmp_path)
    path = Store(tmp_path).path(key) / "shards/000001.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (copied,) = reusable.gather([wanting(ALL)])
    assert len(check(ALL, copied)[3]) == 3
    (problem,) = reusable.problems
    assert "000001.zarr.zip" in problem
    # A second gathering does not read it again.
    reusable.gather([wanting(ALL)])
    assert len(reusable.problems) == 1


def test_a_source_whose_manifest_is_damaged_is_named_and_left_out(tmp_path):
    key = build(tmp_path, range(N))
    (Store(tmp_path).path(key) / "manifest.json").unlink()
    (Store(tmp_path).path(key) / "manifest.json").write_text("{}")
    reusable = looking(tmp_path)
    assert reusable.held(0, wanting(ALL)) == 0
    assert "manifest.json" in reusable.problems[0]


def test_a_damaged_column_is_named_and_the_base_is_copied_from(tmp_path):
    key = build(tmp_path, range(N))
    column = cache_key(column_recipe(key, FEATURES, [3] * 4))
    manifest = Store(tmp_path).path(key) / "columns" / column / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{}")
    reusable = looking(tmp_path)
    assert [reusable.held(want, wanting(ALL)) for want in (0, 1, 2)] == [K, 0, K]
    assert column in reusable.problems[0]


def poisoned(store, key) -> None:
    """Every shard of a cache says other log-probs; checksums and invariants are in order, so verify finds nothing."""
    cache = open_cache(store, key)
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        wrong = dataclasses.replace(groups, token_logps=groups.token_logps * 2, ref_logps=groups.ref_logps * 2)
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
    reusable = looking(ours)
    assert reusable.held(3, wanting(ALL)) == 2
    assert reusable.foreign == [key]
    (copied,) = reusable.gather([wanting(ALL)])
    assert check(ALL, copied)[3] == list(range(2, N))


def test_a_column_from_elsewhere_beside_a_base_from_here_is_not_copied(tmp_path):
    """The base was computed in both stores, the column in the other one alone."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    key = build(theirs, range(N), specs=[FEATURES])
    assert build(ours, range(N), specs=[]) == key
    pull(theirs, key, ours)
    reusable = looking(ours, wants=[None, FEATURES])
    assert [reusable.held(want, wanting(ALL)) for want in (0, 1)] == [K, 0]


def test_what_was_computed_here_may_go_and_come_back(tmp_path):
    key = build(tmp_path / "here", range(N))
    push(tmp_path / "here", key, tmp_path / "shelf")
    rm(tmp_path / "here", key)
    pull(tmp_path / "shelf", key, tmp_path / "here")
    reusable = looking(tmp_path / "here")
    assert [reusable.held(want, wanting(ALL)) for want in range(5)] == [K, K, K, N, N]


def test_a_cache_that_was_begun_elsewhere_and_finished_here_gives_only_what_was_computed_here(tmp_path):
    """A pull that was stopped, or a tarball without a manifest: its shards stand there with records of their own."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    key = build(theirs, range(N), specs=[])
    poisoned(theirs, key)
    shutil.copytree(theirs / key, ours / key)
    for name in ("manifest.json", "shards/000002.zarr.zip", "records/000002.json", "records/000001.json"):
        (ours / key / name).unlink()
    groups = dataclasses.replace(dataset(range(N)), columns=())
    order = np.random.default_rng(N).permutation(N)
    plan = [order[i : i + 3] for i in range(0, N, 3)]
    writer = CacheWriter(ours, make_recipe(groups, plan), plan)
    assert writer.missing() == [2]
    writer.write(2, groups.take(plan[2]), {})
    writer.seal({})
    assert writer.not_computed_here() == 3
    (copied,) = looking(ours).gather([wanting(ALL)])
    starts = ALL.completion_starts
    own = sorted(at for row in plan[2] for at in range(starts[row], starts[row + 1]))
    assert copied[0].positions.tolist() == own
    check(ALL, copied)


def test_looking_for_rows_holds_no_cache_open_and_uses_none(tmp_path):
    """Or a thousand siblings would take a thousand files, and none would ever count as unused."""
    keys = [build(tmp_path, [n], specs=[FEATURES]) for n in range(N)]
    for key in keys:
        os.utime(Store(tmp_path).use_file(key), (0, 0))
    before = len(os.listdir("/proc/self/fd"))
    ((logps, features),) = looking(tmp_path, wants=[None, FEATURES]).gather([wanting(ALL)])
    assert len(logps.positions) == len(features.positions) == K
    assert len(os.listdir("/proc/self/fd")) == before
    assert {Store(tmp_path).use_file(key).stat().st_mtime for key in keys} == {0}


def test_a_claim_of_millions_of_groups_beside_an_honest_cache_costs_nothing(tmp_path):
    """Counts of caches from elsewhere are not believed: nothing is allocated for them."""
    build(tmp_path, range(N), specs=[])
    claims = {
        "digest": "0" * 64,
        "n_groups": 2**31,
        "n_completions": 2**32,
        "score_mask": False,
        "seed": 0,
        "shard_groups": [2**16] * 2**15,
    }
    forge_recipe(tmp_path, {"format": 1, "scorer": SCORER, "groups": claims})
    tracemalloc.start()
    assert looking(tmp_path).held(0, wanting(ALL)) == K
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_a_row_belongs_to_a_completion_or_to_a_group():
    assert [rows_per(want) for want in WANTS] == ["completion"] * 3 + ["group"] * 2
