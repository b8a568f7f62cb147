"""
The cache of format 1 opens, holds what was written, and is read alike by plain zarr and by a reader written from the
page. It is committed and never written again. What came before format 1 was final is refused.
"""

import json
import shutil
import zipfile
from pathlib import Path

import cache_reader
import numpy as np
import pytest
import zarr

from fpo.errors import CacheError
from fpo.store import open_cache, verify
from fpo.store.format.encoding import schema
from fpo.store.format.invariants import BaseBounds, ColumnBounds
from fpo.store.format.key import completion_digests

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "format-1/expected.json").read_text())
KEY, COLUMNS = EXPECTED["key"], EXPECTED["columns"]
SPECS = [column["spec"] for column in COLUMNS]

PARTS = {
    "": (BaseBounds(2**17, True), EXPECTED["shards"]),
    **{f"columns/{column['key']}": (ColumnBounds(column["spec"]["kind"]), column["shards"]) for column in COLUMNS},
}
"""Folder within the cache -> what its shards hold: the base and six columns, the first of them cut finer."""

each_part = pytest.mark.parametrize("part", PARTS, ids=["base", *(spec["kind"] for spec in SPECS)])


@pytest.fixture
def store(tmp_path):
    """A copy: whoever opens a cache may note its use beside it."""
    return shutil.copytree(GOLDEN / "format-1", tmp_path / "store")


def shard_files(store, part):
    return sorted((store / KEY / part / "shards").iterdir())


def assert_exactly(found, spec, values, name):
    expected = np.array(values, spec.dtype).reshape(found.shape)
    assert (found.dtype, found.ndim) == (spec.dtype, len(spec.dimensions))
    assert found.tobytes() == expected.tobytes(), name


def test_the_golden_cache_opens_and_holds_what_was_written(store):
    cache = open_cache(store, KEY, columns=SPECS)
    assert (cache.digest, cache.n_groups, cache.n_completions) == (EXPECTED["digest"], 5, 10)
    assert (cache.shard_groups, cache.recipe["scorer"]["note"]) == ([3, 2], "größer, 大, naïve")
    assert cache.manifest.facts == {"self_check": [], "split": "golden"}
    bounds, shards = PARTS[""]
    for sid, expected in enumerate(shards):
        assert set(expected) == set(schema(bounds))
        for name, spec in schema(bounds).items():
            assert_exactly(getattr(cache.shard(sid), name), spec, expected[name], name)
    report = verify(store, KEY)
    assert (report.problems, report.shards, sorted(report.columns.values())) == ([], 2, [2, 2, 2, 2, 2, 3])


def test_its_columns_hold_what_was_written_beside_the_base(store):
    """Of a column that is cut finer than the base, entries, splits and rows of both shards follow each other."""
    cache = open_cache(store, KEY, columns=SPECS)
    for n, column in enumerate(COLUMNS):
        found = [cache.shard(sid).columns[n] for sid in range(2)]
        for name in {*column["shards"][0]} - {"group_id", "splits"}:
            values = np.concatenate([np.asarray(getattr(each, name)).ravel() for each in found])
            expected = [np.array(shard[name], values.dtype).ravel() for shard in column["shards"]]
            assert values.tobytes() == np.concatenate(expected).tobytes(), (n, name)
        lengths = np.concatenate([np.diff(shard["splits"]) for shard in column["shards"]])
        assert np.concatenate([each.lengths for each in found]).tolist() == lengths.tolist()


@each_part
def test_the_reader_that_was_written_from_the_page_finds_the_same(store, part):
    bounds, shards = PARTS[part]
    found = cache_reader.read(store / KEY / part)
    assert len(found) == len(shards)
    for arrays, expected in zip(found, shards, strict=True):
        assert set(arrays) == set(schema(bounds))
        for name, spec in schema(bounds).items():
            assert_exactly(arrays[name], spec, expected[name], name)


@each_part
def test_plain_zarr_finds_the_same(store, part):
    """A second reader, which knows nothing of this package."""
    bounds, shards = PARTS[part]
    for path, expected in zip(shard_files(store, part), shards, strict=True):
        with zarr.storage.ZipStore(path, mode="r") as opened:
            group = zarr.open_group(opened, mode="r", zarr_format=3)
            assert group.attrs["format"] == 1
            for name, spec in schema(bounds).items():
                assert group[name].metadata.dimension_names == spec.dimensions
                assert_exactly(group[name][...], spec, expected[name], name)


@each_part
def test_the_golden_shards_are_ordinary_zip_files(store, part):
    bounds, shards = PARTS[part]
    for path, expected in zip(shard_files(store, part), shards, strict=True):
        filled = sum(np.size(values) > 0 for values in expected.values())
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert len(archive.namelist()) == len(set(archive.namelist())) == len(schema(bounds)) + filled + 1


def test_the_golden_cache_holds_the_hard_cases():
    """Otherwise the tests above would show little."""
    first, second = EXPECTED["shards"]
    assert first["n_completions"] + second["n_completions"] == [3, 2, 2, 2, 1]
    assert max(first["group_id"]) == 2**40
    assert second["splits"][:2] == [0, 0]  # no prompt
    assert max(second["input_ids"]) == 2**17 - 1
    assert {0, 1} == set(first["score_mask"])
    assert first["ref_logps"][-1] == 0  # a completion of which nothing counts
    assert np.isnan(second["score"]).all()
    assert set(first["weight"] + second["weight"]) == {0.25, 1, 2}
    few, every, prompts, _, gram, mismatched = (column["shards"] for column in COLUMNS)
    assert [len(shard["group_id"]) for shard in few] == [1, 2, 2]  # the base has 3 and 2
    assert np.array(few[1]["acts"], np.float32).min() == np.float32(1e-45)  # subnormal
    assert np.max(few[2]["acts"]) > 1e29
    assert 0 in np.diff(every[0]["splits"])  # a completion without features
    assert every[1]["indices"] == prompts[1]["indices"] == []  # an array without a chunk
    assert np.diff(gram[0]["splits"]).tolist() == [9, 4, 4]
    assert 0 in mismatched[0]["score_mask"]
    assert mismatched[0]["splits"][1] == 0  # a completion of no tokens


def test_digests_of_golden_completions_have_not_changed():
    for arrays in EXPECTED["shards"]:
        ids, splits = np.array(arrays["input_ids"], np.uint32), np.array(arrays["splits"], np.uint64)
        mask = np.array(arrays["score_mask"], np.uint8)
        found = completion_digests(ids, splits, np.array(arrays["n_completions"]), mask)
        assert found.tolist() == arrays["completion_digest"]


def test_a_cache_of_pairs_is_refused_with_one_line(tmp_path):
    """What 0.1.0 wrote before it was released. All of it but the recipe is left out: nothing else is looked at."""
    store = shutil.copytree(GOLDEN / "pairs", tmp_path / "store")
    (key,) = (path.name for path in store.iterdir())
    with pytest.raises(CacheError) as caught:
        open_cache(store, key)
    assert str(caught.value) == (
        f"{store / key / 'recipe.json'} was written before format 1 was final: it holds pairs, not groups; "
        "build the cache again with fpo cache"
    )
    assert verify(store, key).problems == [str(caught.value)]
