"""Caches of every past format version open, and hold what was written. They are committed and never written again."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from fpo.store import open_cache, pair_digests, verify
from fpo.store.format.encoding import schema

GOLDEN = Path(__file__).parent / "golden" / "format-1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SCHEMA = schema(n_hookpoints=2, top_logits=True)


@pytest.fixture
def store(tmp_path):
    """A copy: whoever opens a cache may note its use beside it."""
    return shutil.copytree(GOLDEN, tmp_path / "store")


def array_of(pairs, name):
    part, inner = pairs, name
    if name.startswith("features/"):
        _, n, inner = name.split("/")
        part = pairs.features[int(n)]
    elif name.startswith("top_logits/"):
        part, inner = pairs.top_logits, name.split("/")[1]
    return getattr(part, inner)


def assert_exactly(found, sid, name):
    spec = SCHEMA[name]
    expected = np.array(EXPECTED["shards"][sid][name], spec.dtype).reshape(found.shape)
    assert found.dtype == spec.dtype
    assert found.ndim == len(spec.dimensions)
    assert found.tobytes() == expected.tobytes(), (sid, name)


def test_the_golden_cache_opens_and_holds_what_was_written(store):
    cache = open_cache(store, EXPECTED["key"])
    assert (cache.digest, cache.n_pairs, cache.shard_pairs) == (EXPECTED["digest"], 5, [3, 2])
    assert cache.recipe["pairs"]["note"] == "größer, 大, naïve"
    assert cache.manifest.facts == {"self_check": [], "split": "golden"}
    for sid in range(2):
        assert set(EXPECTED["shards"][sid]) == set(SCHEMA)
        for name in SCHEMA:
            assert_exactly(array_of(cache.shard(sid), name), sid, name)
    assert verify(store, EXPECTED["key"]).problems == []


def test_the_golden_cache_opens_with_plain_zarr(store):
    """A second reader, which knows nothing of this package."""
    for sid in range(2):
        path = store / EXPECTED["key"] / f"shards/{sid:06d}.zarr.zip"
        with zarr.storage.ZipStore(path, mode="r") as opened:
            group = zarr.open_group(opened, mode="r", zarr_format=3)
            assert group.attrs["format"] == 1
            for name, spec in SCHEMA.items():
                assert group[name].metadata.dimension_names == spec.dimensions
                assert_exactly(group[name][...], sid, name)


def test_the_golden_shards_are_ordinary_zip_files(store):
    for sid in range(2):
        filled = sum(np.size(values) > 0 for values in EXPECTED["shards"][sid].values())
        with zipfile.ZipFile(store / EXPECTED["key"] / f"shards/{sid:06d}.zarr.zip") as archive:
            assert archive.testzip() is None
            assert len(archive.namelist()) == len(set(archive.namelist())) == len(SCHEMA) + filled + 5


def test_the_golden_cache_holds_the_hard_cases():
    """Otherwise the tests above would show little."""
    first, second = EXPECTED["shards"]
    assert max(first["pair_id"]) == 2**40
    assert second["splits"][:2] == [0, 0]  # no prompt
    assert 0 in np.diff(first["features/1/splits"])  # a completion without features
    assert np.array(first["features/0/acts"], np.float32).min() == np.float32(1e-45)  # subnormal
    assert np.max(first["features/0/acts"]) > 1e29
    assert second["features/1/indices"] == []  # an array without a chunk
    assert max(second["input_ids"]) == 2**17 - 1


def test_digests_of_golden_pairs_have_not_changed():
    for arrays in EXPECTED["shards"]:
        found = pair_digests(np.array(arrays["input_ids"], np.uint32), np.array(arrays["splits"], np.uint64))
        assert found.tolist() == arrays["pair_digest"]
