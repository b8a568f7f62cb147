"""
What a stranger's cache claims is held against a limit before memory is taken: every attack in a process of its own,
refused in one line, far below half a GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import zstd
from store_cases import HIDDEN_GRAM, TOP_LOGITS, World, make_recipe
from store_forgery import cache_of, forge, forge_recipe, members_of, shard_file

from fpo.canonical import checked_json, parse_checked_json
from fpo.store import CacheWriter
from fpo.store.beside import column_recipe
from fpo.store.format.archive import pack
from fpo.store.format.columns import HiddenGram
from fpo.store.format.encoding import ColumnRows
from fpo.store.format.groups import Groups
from fpo.store.format.key import completion_digests

GIB = 2**30

RUN = """
import sys
from fpo.errors import FpoError
from fpo.store import *
store, key, scratch = sys.argv[1:]
try:
    print({call})
except FpoError as error:
    print("error:", error)
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def attacked(call: str, cache: Path, tmp_path: Path) -> tuple[str, int]:
    """What a process says that does this with the cache, and the bytes that were resident at most."""
    script = RUN.format(call=call)
    arguments = [sys.executable, "-c", script, str(cache.parent), cache.name, str(tmp_path / "scratch")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.rstrip("\n").rsplit("\n", 1)
    return said, int(peak) * 1024


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    world = World(tmp_path / "store", [HIDDEN_GRAM, TOP_LOGITS])
    world.fill()
    return world.path


@pytest.fixture
def column(cache: Path) -> Path:
    """The folder of the top logits beside it."""
    return World(cache.parent, [HIDDEN_GRAM, TOP_LOGITS]).column_path(1)


READERS = {
    "verify": "verify(store, key).problems",
    "open": "open_cache(store, key, columns='all')",
    "read": "[len(open_cache(store, key, columns='all').shard(n)) for n in range(3)]",
    "usage": "disk_usage(open_cache(store, key))",
    "pull": "pull(store, key, scratch)",
    "ls": "Store(store).summaries()",
}


def assert_bounded(call: str, cache: Path, tmp_path: Path, said: str) -> None:
    found, peak = attacked(call, cache, tmp_path)
    assert said in found, found
    assert peak < GIB // 2, f"{peak / 2**20:.0f} MiB"
    if found.startswith("error:"):
        assert "\n" not in found


@pytest.mark.parametrize("reader", READERS)
def test_shards_that_claim_millions_of_tokens(reader: str, cache: Path, tmp_path: Path) -> None:
    """A few kilobytes of zeros under a shape of 2^24 tokens, in all three shards."""
    for sid in range(3):
        members = members_of(shard_file(cache, sid).read_bytes())
        root, array = json.loads(members["zarr.json"]), json.loads(members["input_ids/zarr.json"])
        root["attributes"]["n_tokens"] = 2**24
        array["shape"] = array["chunk_grid"]["configuration"]["chunk_shape"] = [2**24]
        spelled = {
            name: json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
            for name, body in (("zarr.json", root), ("input_ids/zarr.json", array))
        }
        frame = zstd.compress(np.zeros(2**24, np.uint32), 1, True)
        forge(cache, pack(members | spelled | {"input_ids/c/0": frame}), sid, n_tokens=2**24)
    assert_bounded(READERS[reader], cache, tmp_path, "16777216 tokens, a shard holds at most")


@pytest.mark.parametrize("reader", ["verify", "read"])
def test_column_shards_that_claim_millions_of_entries(reader: str, column: Path, tmp_path: Path) -> None:
    """Half a megabyte of zeros under 2^24 rows of two tokens: 128 MB in each of two arrays."""
    for sid in range(3):
        members = members_of(shard_file(column, sid).read_bytes())
        forged = {}
        frame = zstd.compress(np.zeros(2**25, np.uint32), 1, True)
        for name in ("indices", "logps"):
            array = json.loads(members[f"{name}/zarr.json"])
            array["shape"] = array["chunk_grid"]["configuration"]["chunk_shape"] = [2**24, 2]
            forged[f"{name}/zarr.json"] = json.dumps(array, sort_keys=True, separators=(",", ":")).encode()
            forged[f"{name}/c/0/0"] = frame
        forge(column, pack(members | forged), sid)
    assert_bounded(READERS[reader], cache_of(column), tmp_path, "its arrays claim 268435")


@pytest.mark.parametrize("reader", ["verify", "open", "pull", "ls"])
def test_a_recipe_that_claims_hundreds_of_millions_of_groups(reader: str, cache: Path, tmp_path: Path) -> None:
    recipe = json.loads((cache / "recipe.json").read_bytes())
    recipe["groups"] |= {"n_groups": 2**16 * 5000, "shard_groups": [2**16] * 5000}
    forged = forge_recipe(tmp_path / "hostile", recipe, (cache / "manifest.json").read_bytes())
    assert_bounded(READERS[reader], forged, tmp_path, "is the manifest of cache")


@pytest.mark.parametrize("reader", ["verify", "pull"])
def test_a_record_of_fifteen_megabytes(reader: str, cache: Path, tmp_path: Path) -> None:
    path = cache / "records/000001.json"
    body = parse_checked_json(path.read_bytes())
    path.write_bytes(checked_json(body | {"provenance": {"x": "x" * 15 * 10**6}}))
    assert_bounded(READERS[reader], cache, tmp_path, "at most 65536 are read")


@pytest.mark.parametrize("reader", ["verify", "open", "ls"])
def test_a_manifest_of_sixteen_megabytes_of_brackets(reader: str, cache: Path, tmp_path: Path) -> None:
    (cache / "manifest.json").write_bytes(b"[" + b"[]," * 5 * 10**6 + b"0]")
    assert_bounded(READERS[reader], cache, tmp_path, "it holds more than")


@pytest.mark.parametrize("reader", ["verify", "read", "usage"])
def test_shards_of_very_many_groups_are_verified_one_at_a_time(reader: str, tmp_path: Path) -> None:
    """As many groups as a shard may hold, each the same: ids and digests of all of them would be 100 MB."""
    n = 2**16
    ids, splits = np.zeros(2 * n, np.uint32), np.arange(2 * n + 1, dtype=np.uint64)
    ones, zeros = np.ones(n, np.uint32), np.zeros(n, np.float32)
    digest = completion_digests(ids[:2], splits[:3], ones[:1])

    def shard(sid: int) -> Groups:
        group_id = np.arange(n * sid, n * (sid + 1), dtype=np.uint64)
        weight = np.ones(n, np.float32)
        return Groups(group_id, ones, np.repeat(digest, n, axis=0), ids, splits, zeros, weight, zeros, zeros)

    plan = [np.arange(n * sid, n * (sid + 1)) for sid in range(3)]
    recipe = make_recipe(Groups.concat([shard(sid) for sid in range(3)]), plan)
    writer = CacheWriter(tmp_path / "store", recipe, plan)
    column = CacheWriter(tmp_path / "store", column_recipe(writer.key, HIDDEN_GRAM, [n] * 3), plan)
    for sid in range(3):
        writer.write(sid, shard(sid), {})
        gram = HiddenGram(np.arange(n + 1, dtype=np.uint64), zeros)
        column.write(sid, ColumnRows(shard(sid).group_id, n, gram), {})
    writer.seal({})
    column.seal({})
    assert_bounded(READERS[reader], writer.folder.root, tmp_path, "")
