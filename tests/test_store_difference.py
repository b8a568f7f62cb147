"""Why two caches are not one, what a cache was made from, and where its bytes go."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from store_cases import EVERY_FEATURE, SIZES, TOP_LOGITS, World, make_groups, make_recipe, tree

from fpo.errors import CacheDamaged, CacheMissing
from fpo.store import CacheWriter, cache_key, diff, disk_usage, nearest, open_cache
from fpo.store.upkeep.difference import differences
from fpo.store.upkeep.usage import OVERHEAD

INPUTS = {
    "reference": {"model": "google/gemma-2-2b-it", "revision": None, "adapter": None},
    "data": {"source": "ultrafeedback", "subset": None, "revision": None, "split": "train_prefs"},
}


def build(world: World, recipe, groups, plan, inputs=None, n=None) -> str:
    writer = CacheWriter(world.store, recipe, plan)
    for sid in range(len(plan) if n is None else n):
        writer.write(sid, groups.take(plan[sid]), {"inputs": inputs} if inputs else {})
    if n is None:
        writer.seal({"self_check": []})
    return writer.key


def changed(recipe, **fields):
    """A copy of the recipe whose scorer has these fields too."""
    other = copy.deepcopy(recipe)
    other["scorer"] |= fields
    return other


def base(world: World):
    """Its groups, without columns."""
    return dataclasses.replace(world.groups, columns=())


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_differences_name_fields_and_both_values():
    here = {"a": {"b": 1, "c": [1, 2]}, "f": [{"k": 64, "h": "x"}], "same": True, "gone": None}
    there = {"a": {"b": 2, "c": [1, 2, 3]}, "f": [{"k": "all", "h": "x"}, {"k": 1}], "same": True}
    found = [(d.field, d.here, d.there) for d in differences(here, there)]
    assert found == [
        ("a.b", "1", "2"),
        ("a.c", "[1, 2]", "[1, 2, 3]"),
        ("f[0].k", "64", '"all"'),
        ("f[1].k", "-", "1"),
        ("gone", "null", "-"),
    ]


def test_a_difference_reads_as_one_line():
    other = "9b" * 32
    (line,) = (str(d) for d in differences({"groups": {"digest": "3f" * 32}}, {"groups": {"digest": other}}))
    assert line.startswith("groups.digest: 3f3f3f3f3f3f -> 9b9b9b9b9b9b  (other tokens or labels: data, split, tok")
    (line,) = (str(d) for d in differences({"a": list(range(100))}, {"a": []}))
    assert len(line) < 70


def test_diff_of_two_caches_shows_the_recipe_and_the_names_behind_it(world):
    other = changed(world.recipe, dtype="bfloat16")
    there = {**INPUTS, "reference": {**INPUTS["reference"], "model": "google/gemma-2-9b-it"}}
    a = build(world, world.recipe, base(world), world.plan, INPUTS)
    b = build(world, other, base(world), world.plan, there, n=1)
    report = diff(world.store, a[:8], b)
    assert (report.here, report.there) == (a, b)
    assert [str(d) for d in report.recipe] == ['scorer.dtype: - -> "bfloat16"']
    assert [str(d) for d in report.inputs] == ['reference.model: "google/gemma-2-2b-it" -> "google/gemma-2-9b-it"']
    assert diff(world.store, a, a).recipe == ()
    with pytest.raises(CacheMissing):
        diff(world.store, a, "nothing")


def test_nearest_is_the_cache_with_the_fewest_differences(world):
    build(world, changed(world.recipe, dtype="bfloat16", seed=1), base(world), world.plan)
    close = build(world, changed(world.recipe, dtype="bfloat16"), base(world), world.plan)
    found = nearest(world.store, world.recipe)
    assert found is not None
    assert found.key == close
    assert [str(d) for d in found.differences] == ['scorer.dtype: "bfloat16" -> -']


def test_nearest_prefers_what_is_complete_and_never_names_the_recipe_itself(world):
    assert nearest(world.store, world.recipe) is None
    world.writer()
    assert nearest(world.store, world.recipe) is None
    build(world, changed(world.recipe, dtype="a"), base(world), world.plan, n=1)
    complete = build(world, changed(world.recipe, dtype="b"), base(world), world.plan)
    build(world, changed(world.recipe, dtype="c"), base(world), world.plan, n=1)
    assert nearest(world.store, world.recipe).key == complete


def test_other_tokens_are_explained_by_the_names_that_the_makers_wrote_down(world):
    """A digest of tokens says only that they differ; the records know that it was max_length."""
    build(world, changed(world.recipe, seed=1), base(world), world.plan, {"data": {"source": "uf", "max_length": 512}})
    wanted = {**world.recipe, "groups": {**world.recipe["groups"], "digest": "0" * 64}}
    found = nearest(world.store, wanted, {"data": {"source": "uf", "max_length": 256}})
    assert "made from data.max_length: 512 -> 256" in found.lines()
    assert not any("source" in line for line in found.lines())


def test_nearest_leaves_damaged_caches_out(world):
    key = build(world, changed(world.recipe, dtype="a"), base(world), world.plan)
    (world.store.path(key) / "manifest.json").write_text("{}")
    assert nearest(world.store, world.recipe) is None


def test_ls_names_reference_sae_and_data_where_the_maker_wrote_them_down(world):
    recipe = changed(world.recipe, reference={"weights": "3fa9c1d2" + "0" * 56})
    named = build(world, recipe, base(world), world.plan, INPUTS)
    plain = world.fill().key
    by_key = {summary.key: summary for summary in world.store.summaries()}
    assert by_key[named].reference == "google/gemma-2-2b-it [3fa9c1d2]"
    assert by_key[named].data == "ultrafeedback train_prefs"
    assert (by_key[plain].reference, by_key[plain].data) == ("", "")
    assert by_key[named].columns == ()
    labels = sorted(column.label for column in by_key[plain].columns)
    assert labels == ["features at model.layers.0, top 4: [5a5a5a5a]", "top 2 logits"]


@pytest.mark.parametrize("inputs", [[], "x", {"reference": "x", "features": {"sae": 1}, "data": [1]}])
def test_strange_provenance_is_no_reason_to_fail(world, inputs):
    build(world, world.recipe, base(world), world.plan, inputs)
    (summary,) = world.store.summaries()
    assert (summary.problem, summary.reference, summary.data) == (None, "", "")


def test_state_says_how_far_a_cache_is(world):
    build(world, world.recipe, base(world), world.plan, n=2)
    assert [summary.state for summary in world.store.summaries()] == ["2 of 3 shards"]
    world.fill()
    assert [summary.state for summary in world.store.summaries()] == ["complete"]


def test_disk_usage_adds_up_to_the_shard_files_and_to_the_arrays(world):
    world.fill()
    calls: list[tuple[int, int]] = []
    cache = open_cache(world.store, world.key, columns=world.specs)
    found = disk_usage(cache, lambda *at: calls.append(at))
    usage = {(array.column, array.name): array for array in found}
    files = tree(world.path)
    assert sum(array.stored for array in found) == sum(len(data) for name, data in files.items() if ".zip" in name)
    # Three shards of the base, five of the features, three of the top logits.
    assert calls == [(n, 11) for n in range(1, 12)]
    # 5 groups; splits has one more than a prompt and its completions in each of 3 shards.
    K, T = len(world.groups.ref_logps), world.groups.n_tokens
    assert usage[None, "group_id"].raw == 5 * 8
    assert usage[None, "splits"].raw == (5 + K + 3) * 8
    assert usage[None, "input_ids"].raw == 4 * T
    features, logits = (world.column_key(n) for n in (0, 1))
    assert usage[logits, "logps"].raw == world.groups.columns[1].logps.nbytes
    for name in ("indices", "acts", "active", "tail_sq"):
        assert usage[features, name].raw == getattr(world.groups.columns[0], name).nbytes
    assert (found[-1].name, found[-1].raw) == (OVERHEAD, 0)
    base_alone = disk_usage(open_cache(world.store, world.key))
    assert {array.column for array in base_alone} == {None}


def test_disk_usage_refuses_a_damaged_shard(world):
    key = world.fill().key
    cache = open_cache(world.store, key)
    path = world.store.path(key) / "shards/000001.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheDamaged, match="000001"):
        disk_usage(cache)


def test_a_recipe_and_its_cache_do_not_differ(world):
    assert diff(world.store, world.fill().key, cache_key(world.recipe)).recipe == ()
    other = make_groups(SIZES, seed=1)
    report = differences(world.recipe, make_recipe(other, world.plan))
    assert [d.field for d in report] == ["groups.digest"]


def test_diff_lists_the_columns_that_stand_beside_one_cache_alone(world, tmp_path):
    """By what they hold: their keys name the base, and so always differ."""
    world.fill()
    other = World(tmp_path, specs=(TOP_LOGITS, EVERY_FEATURE))
    other.recipe["groups"]["seed"] = 8
    other.fill()
    report = diff(world.store, world.key, other.key)
    assert report.only_here == ("features at model.layers.0, top 4: [5a5a5a5a]",)
    assert report.only_there == ("features at model.layers.1, top all: [5a5a5a5a]",)
    assert diff(world.store, world.key, world.key).only_here == ()
