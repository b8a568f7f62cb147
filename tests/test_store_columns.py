"""Columns: which one serves what is asked for, what is cut from it, and how its rows meet the base's."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    EVERY_FEATURE,
    FEATURES,
    HIDDEN_GRAM,
    PROMPT_FEATURES,
    SIZES,
    SPECS,
    TOP_LOGITS,
    World,
    make_column,
    make_groups,
    same,
)

from fpo.errors import CacheDamaged, CacheMissing
from fpo.store import CacheWriter, open_cache
from fpo.store.beside import HeldColumn, column_recipe, serving
from fpo.store.format.columns import Features, TopLogits, column_name, covers, cut
from fpo.store.format.invariants import Invalid, check_beside
from fpo.store.format.key import cache_key


@pytest.mark.parametrize(
    ("held", "wanted", "does"),
    [
        (FEATURES, FEATURES, True),
        (FEATURES, FEATURES | {"top_k": 3}, True),
        (FEATURES, FEATURES | {"top_k": 5}, False),
        (FEATURES | {"top_k": "all"}, FEATURES, True),
        (FEATURES, FEATURES | {"top_k": "all"}, False),
        (EVERY_FEATURE, EVERY_FEATURE, True),
        (FEATURES, FEATURES | {"hookpoint": "model.layers.1"}, False),
        (FEATURES, FEATURES | {"sae": {"weights": "5b" * 32, "config": {}}}, False),
        (FEATURES, FEATURES | {"sae": {"weights": "5a" * 32, "config": {"scale": "2"}}}, False),
        (FEATURES, FEATURES | {"pooling": "max"}, False),
        (FEATURES, PROMPT_FEATURES, False),
        (PROMPT_FEATURES, PROMPT_FEATURES | {"top_k": 1}, True),
        (TOP_LOGITS, TOP_LOGITS, True),
        (TOP_LOGITS, TOP_LOGITS | {"m": 1}, True),
        (TOP_LOGITS, TOP_LOGITS | {"m": 3}, False),
        (TOP_LOGITS, TOP_LOGITS | {"vocab_size": 101}, False),
        (HIDDEN_GRAM, HIDDEN_GRAM, True),
        (HIDDEN_GRAM, TOP_LOGITS, False),
    ],
)
def test_a_column_covers_what_asks_for_the_same_and_no_more_of_it(held, wanted, does):
    assert covers(held, wanted) is does


def pooled(rows, k):
    """
    Dense rows (R, d) -> the column that a scorer with this top k makes of them: of the k largest activations (ties: the
    lower index) those that are not zero, ascending by index.
    """
    kept = []
    for row in rows:
        largest = sorted(range(len(row)), key=lambda i: (-row[i], i))[: len(row) if k == "all" else k]
        kept.append(sorted(i for i in largest if row[i] != 0))
    tails = [
        sum(float(a) ** 2 for i, a in enumerate(row) if i not in keep) for row, keep in zip(rows, kept, strict=True)
    ]
    return Features(
        splits=np.cumsum([0, *map(len, kept)]).astype(np.uint64),
        indices=np.array([i for keep in kept for i in keep], np.uint32),
        acts=np.array([row[i] for row, keep in zip(rows, kept, strict=True) for i in keep], np.float32),
        active=np.array([np.count_nonzero(row) for row in rows], np.uint32),
        tail_sq=np.array(tails, np.float32),
    )


def spec_of(k, d_sae):
    return FEATURES | {"top_k": k, "d_sae": d_sae}


def test_cutting_keeps_the_largest_and_of_equal_ones_the_lower_index():
    """0.5 at 1, 2 at 3, 2 at 4, 1 at 6: two of them are 3 and 4, one is 3; what goes is 0.25 + 1 and 4 more."""
    row = np.array([0, 0.5, 0, 2, 2, 0, 1, 0], np.float32)
    whole = pooled([row], "all")
    two, one = (cut(whole, spec_of("all", 8), spec_of(k, 8)) for k in (2, 1))
    assert (two.indices.tolist(), two.acts.tolist(), two.tail_sq.tolist()) == ([3, 4], [2, 2], [1.25])
    assert (one.indices.tolist(), one.acts.tolist(), one.tail_sq.tolist()) == ([3], [2], [5.25])
    assert one.active.tolist() == [4]


def test_what_is_below_zero_comes_behind_what_is_zero():
    """1 at 0, -1 at 1, two zeros: the three largest are 1, 0, 0, so only 1 is kept; of four, -1 is one."""
    row = np.array([1, -1, 0, 0], np.float32)
    whole = pooled([row], "all")
    assert cut(whole, spec_of("all", 4), spec_of(3, 4)).indices.tolist() == [0]
    assert cut(whole, spec_of("all", 4), spec_of(4, 4)).indices.tolist() == [0, 1]


activations = st.sampled_from([0, 0, 0.5, 0.5, 1, 3.25, -0.5]) | st.floats(0.015625, 100, width=32)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(activations, min_size=6, max_size=6), max_size=5),
    st.sampled_from([2, 3, 5, "all"]),
    st.integers(1, 2),
)
def test_a_cut_column_is_the_one_that_a_smaller_top_k_makes(rows, held, wanted):
    dense = np.array(rows, np.float32).reshape(-1, 6)
    found = cut(pooled(dense, held), spec_of(held, 6), spec_of(wanted, 6))
    expected = pooled(dense, wanted)
    for name in ("splits", "indices", "acts", "active"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    # One rounding to float32 where the tail was stored, and one now.
    np.testing.assert_allclose(found.tail_sq, expected.tail_sq, rtol=2**-23, atol=0)


def test_prompt_features_are_cut_as_prompt_features():
    groups = make_groups(SIZES)
    column = make_column(PROMPT_FEATURES, groups)
    found = cut(column, PROMPT_FEATURES, PROMPT_FEATURES | {"top_k": 1})
    assert type(found) is type(column)
    assert found.lengths.tolist() == [min(n, 1) for n in column.lengths]


def test_top_logits_are_cut_to_the_likeliest():
    groups = make_groups(SIZES)
    column = make_column(TOP_LOGITS, groups)
    found = cut(column, TOP_LOGITS, TOP_LOGITS | {"m": 1})
    assert same(found, TopLogits(column.splits, column.indices[:, :1], column.logps[:, :1]))


@pytest.mark.parametrize("spec", SPECS, ids=column_name)
def test_what_is_served_whole_is_not_touched(spec):
    column = make_column(spec, make_groups(SIZES))
    assert cut(column, spec, spec) is column


def test_columns_are_called_by_what_they_hold():
    assert [column_name(spec) for spec in SPECS] == [
        "features at model.layers.0, top 4",
        "features at model.layers.1, top all",
        "prompt features at model.layers.0, top 4",
        "top 2 logits",
        "hidden gram",
        "mismatched completions",
    ]


def test_the_column_that_holds_the_least_beyond_what_is_asked_serves_it():
    tops = {k: HeldColumn(f"{n}", FEATURES | {"top_k": k}) for n, k in enumerate([4, 8, 64, "all"])}
    held = [HeldColumn("0", HIDDEN_GRAM), *tops.values()]
    for wanted, serves in [(4, 4), (3, 4), (5, 8), (65, "all"), ("all", "all")]:
        assert serving(held, FEATURES | {"top_k": wanted}) == tops[serves]
    assert serving(held, FEATURES | {"hookpoint": "model.layers.9"}) is None
    assert serving([], FEATURES) is None


@pytest.mark.parametrize(
    ("spec", "other", "message"),
    [
        (FEATURES, [(2, (3,))], "it has 10 rows, the groups ask for 1"),
        (PROMPT_FEATURES, [(2, (3,))], "it has 5 rows, the groups ask for 1"),
        (TOP_LOGITS, [(2, (3, 2)), *SIZES[1:]], "not those of the scored tokens"),
        (HIDDEN_GRAM, [(2, (3,)), *SIZES[1:]], "not the squares of the groups'"),
    ],
)  # fmt: skip
def test_a_column_of_other_groups_is_refused_beside_the_base(spec, other, message):
    with pytest.raises(Invalid, match=message):
        check_beside(make_column(spec, make_groups(SIZES)), make_groups(other))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A cache with a column of each kind."""
    world = World(tmp_path_factory.mktemp("full"), SPECS)
    world.fill()
    return world


def test_columns_are_read_in_the_order_that_was_asked_for(full):
    """The first is cut finer than the base: two shards of it serve one of the base."""
    wanted = [HIDDEN_GRAM, FEATURES, TOP_LOGITS, EVERY_FEATURE, PROMPT_FEATURES]
    cache = open_cache(full.store, full.key, columns=wanted)
    for sid in range(3):
        found, beside = cache.shard(sid), full.beside(sid)
        assert same(found, full.shard(sid).with_columns([beside.columns[SPECS.index(spec)] for spec in wanted]))
    assert len(open_cache(full.store, full.key, columns="all").columns) == len(SPECS)
    assert open_cache(full.store, full.key).shard(0).columns == ()


def test_a_smaller_question_is_answered_by_the_column_that_covers_it(full):
    wanted = [FEATURES | {"top_k": 2}, EVERY_FEATURE | {"top_k": 1}, TOP_LOGITS | {"m": 1}]
    cache = open_cache(full.store, full.key, columns=wanted)
    held = [full.beside(1).columns[n] for n in (0, 1, 3)]
    expected = [cut(*each) for each in zip(held, (FEATURES, EVERY_FEATURE, TOP_LOGITS), wanted, strict=True)]
    assert all(same(*pair) for pair in zip(cache.shard(1).columns, expected, strict=True))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (FEATURES | {"hookpoint": "model.layers.7"}, r"features at model\.layers\.7, top 4 \[5a5a5a5a\]"),
        (TOP_LOGITS | {"m": 20}, r"top 20 logits"),
    ],
)
def test_a_base_without_a_column_says_how_to_add_it(full, spec, said):
    with pytest.raises(CacheMissing, match=rf"has no column of {said}.*; add it with: fpo cache RECIPE") as caught:
        open_cache(full.store, full.key, columns=[spec])
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_sealed_serves_nothing(tmp_path):
    world = World(tmp_path)
    world.fill_base()
    writer = world.column_writer(0)
    for sid in range(4):
        writer.write(sid, world.column_shard(0, sid), {})
    with pytest.raises(CacheMissing, match="has no column of features at"):
        open_cache(world.store, world.key, columns=[FEATURES])
    assert open_cache(world.store, world.key, columns="all").columns == ()
    world.fill_column(0)
    assert len(open_cache(world.store, world.key, columns=[FEATURES]).shard(0).columns) == 1


def test_a_base_does_not_need_its_columns(full, tmp_path):
    """Whoever deletes the folder has the base that was there before."""
    copied = shutil.copytree(full.path, tmp_path / full.key)
    shutil.rmtree(copied / "columns")
    assert same(open_cache(tmp_path, full.key).shard(0), full.shard(0))


def test_a_column_of_other_groups_is_refused_when_it_is_read(full, tmp_path):
    """Right in itself, and sealed: but its shards hold the groups in another order than the base."""
    copied = shutil.copytree(full.path, tmp_path / full.key)
    shutil.rmtree(copied / "columns")
    plan = [ids[::-1] for ids in full.plan]
    writer = CacheWriter(tmp_path, column_recipe(full.key, HIDDEN_GRAM, [2, 2, 1]), plan)
    for sid, ids in enumerate(plan):
        groups = full.groups.take(ids)
        rows = full.column_shard(4, sid)
        writer.write(sid, type(rows)(groups.group_id, rows.n_completions, groups.columns[4]), {})
    writer.seal({})
    cache = open_cache(tmp_path, full.key, columns=[HIDDEN_GRAM])
    with pytest.raises(CacheDamaged, match="is damaged: it holds other groups than the base"):
        cache.shard(0)


def test_every_fact_of_a_column_is_in_its_key(full):
    """Another base, spec or cut is another column."""
    recipe = full.column_recipe(0)
    others = [
        recipe | {"base": "cd" * 32},
        recipe | {"shard_groups": [2, 2, 1]},
        *(recipe | {"column": FEATURES | change} for change in ({"top_k": 5}, {"d_sae": 51}, {"hookpoint": "x"})),
        recipe | {"column": PROMPT_FEATURES},
    ]
    assert len({cache_key(each) for each in (recipe, *others)}) == 1 + len(others)
