"""The worked example of docs/cache-format.md is what the code writes; the store stays free of torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import zstd

from fpo.canonical import canonical_json
from fpo.store import (
    CacheWriter,
    Features,
    Pairs,
    Store,
    open_cache,
    pair_digests,
    pairs_digest,
    plan_shards,
    shard_digest,
)
from fpo.store.format.archive import unpack

PAGE = (Path(__file__).parents[1] / "docs/cache-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    ids, splits = np.array([7, 8, 9, 5, 1, 2], np.uint32), np.array([0, 1, 3, 4, 4, 5, 6], np.uint64)
    features = Features(
        indices=np.array([2, 5, 0], np.uint32),
        acts=np.array([0.5, 1.25, 2], np.float32),
        splits=np.array([0, 2, 2, 3, 3], np.uint64),
        active=np.array([[3, 0], [1, 0]], np.uint32),
        tail_sq=np.array([[0.0625, 0], [0, 0]], np.float32),
    )
    return Pairs(
        pair_id=np.array([0, 1], np.uint64),
        pair_digest=pair_digests(ids, splits),
        input_ids=ids,
        splits=splits,
        ref_logps=np.array([[-1.5, -2], [0, 0]], np.float32),
        token_logps=np.array([-1, -0.5, -2], np.float32),
        features=(features,),
    )


@pytest.fixture(scope="module")
def written(example, tmp_path_factory):
    plan = plan_shards(example.lengths, np.array([16, 16]), seed=0)
    digests = [shard_digest(ids, example.pair_digest[ids]) for ids in plan]
    recipe = {
        "format": 1,
        "scorer": {
            "vocab_size": 10,
            "features": [{"d_sae": 8, "top_k": 2, "hookpoint": "model.layers.3"}],
            "extras": {"top_logits": 0},
        },
        "pairs": {"digest": pairs_digest(digests), "n_pairs": 2, "seed": 0, "shard_pairs": [2]},
    }
    assert canonical_json(recipe).decode() in PAGE
    writer = CacheWriter(Store(tmp_path_factory.mktemp("docs")), recipe, plan)
    writer.write(0, example.take(plan[0]), {"device": "cpu"})
    writer.seal({"self_check": "off"})
    return writer


def test_key_and_digests_of_the_page_are_those_of_the_code(example, written):
    assert f"`{written.key}`" in PAGE
    for digest in example.pair_digest:
        assert f"`{bytes(digest).hex()}`" in PAGE
    assert open_cache(written.folder.root.parent, written.key).manifest.facts == {"self_check": "off"}


def test_the_metadata_of_the_page_is_that_of_the_code(written):
    members = unpack((written.folder.root / "shards/000000.zarr.zip").read_bytes())
    assert bytes(members["zarr.json"]).decode() in PAGE
    assert bytes(members["features/0/acts/zarr.json"]).decode() in PAGE


def test_the_chunks_of_the_page_hold_what_the_code_writes(written):
    """Compared after decompression: another zstd may choose other bytes for the same contents."""
    members = unpack((written.folder.root / "shards/000000.zarr.zip").read_bytes())
    rows = re.findall(r"^\| `([\w/]+/c[/0]+)` \| `([0-9a-f]+)` \|", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in members if "/c/" in name}
    for name, frame in rows:
        assert zstd.decompress(bytes.fromhex(frame)) == zstd.decompress(bytes(members[name])), name


def test_the_store_loads_without_torch_and_scoring():
    code = "import fpo.store, sys; assert not {'torch', 'transformers', 'fpo.scoring'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
