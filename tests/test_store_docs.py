"""The worked example of docs/cache-format.md is what the code writes; the store stays free of torch."""

import re
import subprocess
import sys
from pathlib import Path

import cache_reader
import numpy as np
import pytest
from numcodecs import zstd
from store_cases import digest_of

from fpo.store import CacheWriter, Store, open_cache
from fpo.store.beside import column_recipe
from fpo.store.format.archive import unpack
from fpo.store.format.columns import KINDS, Features
from fpo.store.format.encoding import ColumnRows, schema
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import BaseBounds, ColumnBounds
from fpo.store.format.key import completion_digests, groups_digest
from fpo.store.format.plan import plan_shards

PAGE = (Path(__file__).parents[1] / "docs/cache-format.md").read_text(encoding="utf-8")

SPEC = {
    "kind": "features",
    "hookpoint": "model.layers.3",
    "sae": {"weights": "5a" * 32, "config": {}},
    "d_sae": 8,
    "top_k": 2,
    "pooling": "mean",
}


@pytest.fixture(scope="module")
def groups():
    ids, splits = np.array([7, 8, 9, 5, 1], np.uint32), np.array([0, 1, 3, 4, 4, 5], np.uint64)
    n_completions = np.array([2, 1], np.uint32)
    return Groups(
        group_id=np.array([0, 1], np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(ids, splits, n_completions),
        input_ids=ids,
        splits=splits,
        score=np.array([1, 0, np.nan], np.float32),
        weight=np.array([1, 0.5], np.float32),
        ref_logps=np.array([-1.5, -2, 0], np.float32),
        token_logps=np.array([-1, -0.5, -2], np.float32),
    )


@pytest.fixture(scope="module")
def features():
    return Features(
        splits=np.array([0, 2, 3, 3], np.uint64),
        indices=np.array([2, 5, 0], np.uint32),
        acts=np.array([0.5, 1.25, 2], np.float32),
        active=np.array([3, 1, 0], np.uint32),
        tail_sq=np.array([0.0625, 0, 0], np.float32),
    )


@pytest.fixture(scope="module")
def written(groups, features, tmp_path_factory):
    """The folders of the cache and of its column."""
    (ids,) = plan_shards(np.array([4, 1]), groups.n_completions, seed=0)
    assert ids.tolist() == [0, 1]
    recipe = {
        "format": 1,
        "scorer": {"vocab_size": 10},
        "groups": {
            "digest": groups_digest([digest_of(groups)]),
            "n_groups": 2,
            "n_completions": 3,
            "score_mask": False,
            "seed": 0,
            "shard_groups": [2],
        },
    }
    store = Store(tmp_path_factory.mktemp("docs"))
    base = CacheWriter(store, recipe, [ids])
    base.write(0, groups, {"device": "cpu"})
    base.seal({"self_check": "off"})
    column = CacheWriter(store, column_recipe(base.key, SPEC, [2]), [ids])
    column.write(0, ColumnRows(groups.group_id, 3, features), {"device": "cpu"})
    column.seal({})
    return base.folder.root, column.folder.root


@pytest.fixture(scope="module")
def members(written):
    """Of both shards; the column's behind the name of its folder on the page."""
    found = [unpack((folder / "shards/000000.zarr.zip").read_bytes()) for folder in written]
    return {f"{where}{name}": bytes(data) for where, shard in zip(("", "column "), found, strict=True)
            for name, data in shard.items()}  # fmt: skip


def test_recipes_keys_and_digests_of_the_page_are_those_of_the_code(written, groups):
    for folder in written:
        assert f"`{folder.name}`" in PAGE
        assert (folder / "recipe.json").read_text() in PAGE
    for digest in groups.completion_digest:
        assert f"`{bytes(digest).hex()}`" in PAGE
    assert f"`{digest_of(groups)}`" in PAGE
    assert f"`{groups_digest([digest_of(groups)])}`" in PAGE


def test_the_manifest_of_the_page_is_that_of_the_code(written):
    """But for size and sha256 of the shard, which another zstd may make others, and the check over them."""

    def settled(text):
        return re.sub(r'"(size|sha256|check)": ("[0-9a-f]{64}"|\d+)', r'"\1": ...', text)

    assert settled((written[1] / "manifest.json").read_text()) in settled(PAGE)


def test_the_metadata_of_the_page_is_that_of_the_code(members):
    for name in ("zarr.json", "completion_digest/zarr.json", "column acts/zarr.json"):
        assert members[name].decode() in PAGE


def test_the_chunks_of_the_page_hold_what_the_code_writes(members):
    """Compared after decompression: another zstd may choose other bytes for the same contents."""
    rows = re.findall(r"^\| `((?:column )?[\w/]+/c[/0]+)` \| `([0-9a-f]+)` \|", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in members if "/c/" in name}
    for name, frame in rows:
        assert zstd.decompress(bytes.fromhex(frame)) == zstd.decompress(members[name]), name


def test_the_tables_of_the_page_name_every_array_with_its_type_and_dimensions():
    kinds = {"base": BaseBounds(10, True), **{kind: ColumnBounds(kind) for kind in KINDS}}
    rows = re.findall(r"^\| `(\w+)`(?: \([\w ]+\))? \| (\w+) \(.*?\) \| ([\w, ]+) \|", PAGE, re.MULTILINE)
    listed = {(name, dtype, dimensions) for name, dtype, dimensions in rows}
    for bounds in kinds.values():
        for name, spec in schema(bounds).items():
            assert (name, spec.dtype, ", ".join(spec.dimensions)) in listed, name


def test_the_example_opens_with_the_reader_that_was_written_from_the_page(written, groups, features):
    base, column = (cache_reader.read(folder)[0] for folder in written)
    assert base["token_logps"].tolist() == groups.token_logps.tolist()
    assert column["acts"].tolist() == features.acts.tolist()
    cache = open_cache(written[0].parent, written[0].name, columns=[SPEC])
    assert cache.manifest.facts == {"self_check": "off"}
    assert cache.shard(0).columns[0].indices.tolist() == [2, 5, 0]


def test_the_store_loads_without_torch_and_scoring():
    code = "import fpo.store, sys; assert not {'torch', 'transformers', 'fpo.scoring'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
