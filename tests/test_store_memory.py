"""
What a stranger's cache claims is held against a limit before memory is taken: every attack in a process of its own,
refused in one line, far below half a GiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import zstd
from store_cases import World, make_pairs, make_recipe
from store_forgery import forge, forge_recipe, members_of, shard_file

from fpo.canonical import checked_json, parse_checked_json
from fpo.store import CacheWriter, Pairs, pair_digests
from fpo.store.format.archive import pack

GIB = 2**30

RUN = """
import sys
sys.path[:0] = {path!r}
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
    here = Path(__file__).parent
    script = RUN.format(path=[str(here), str(here.parent)], call=call)
    arguments = [sys.executable, "-c", script, str(cache.parent), cache.name, str(tmp_path / "scratch")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.rstrip("\n").rsplit("\n", 1)
    return said, int(peak) * 1024


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    world = World(tmp_path / "store")
    return world.store.path(world.fill().key)


READERS = {
    "verify": "verify(store, key).problems",
    "open": "open_cache(store, key)",
    "read": "[len(open_cache(store, key).shard(n)) for n in range(3)]",
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


@pytest.mark.parametrize("reader", ["verify", "open", "pull", "ls"])
def test_a_recipe_that_claims_hundreds_of_millions_of_pairs(reader: str, cache: Path, tmp_path: Path) -> None:
    recipe = json.loads((cache / "recipe.json").read_bytes())
    recipe["pairs"] |= {"n_pairs": 2**16 * 5000, "shard_pairs": [2**16] * 5000}
    forged = forge_recipe(tmp_path / "hostile", recipe, (cache / "manifest.json").read_bytes())
    assert_bounded(READERS[reader], forged, tmp_path, "is the manifest of cache")


@pytest.mark.parametrize("reader", ["verify", "pull"])
def test_records_of_fifteen_megabytes(reader: str, cache: Path, tmp_path: Path) -> None:
    for sid in range(3):
        path = cache / f"records/{sid:06d}.json"
        body = parse_checked_json(path.read_bytes())
        path.write_bytes(checked_json(body | {"provenance": {"x": [[] for _ in range(10**6)]}}))
    assert_bounded(READERS[reader], cache, tmp_path, "at most 65536 are read")


@pytest.mark.parametrize("reader", ["verify", "open", "ls"])
def test_a_manifest_of_sixteen_megabytes_of_brackets(reader: str, cache: Path, tmp_path: Path) -> None:
    (cache / "manifest.json").write_bytes(b"[" + b"[]," * 5 * 10**6 + b"0]")
    assert_bounded(READERS[reader], cache, tmp_path, "it holds more than")


@pytest.mark.parametrize("reader", ["verify", "read", "usage"])
def test_shards_of_very_many_pairs_are_verified_one_at_a_time(reader: str, tmp_path: Path) -> None:
    """As many pairs as a shard may hold, each the same: 1.5 MB of file each, of which ids and digests were all kept."""
    n = 2**16
    ids, splits = np.zeros(3 * n, np.uint32), np.arange(3 * n + 1, dtype=np.uint64)
    one = make_pairs([(1, 1, 1)], hookpoints=(), top_logits=0)
    digest = pair_digests(ids[:3], splits[:4])

    def shard(sid: int) -> Pairs:
        pair_id = np.arange(n * sid, n * (sid + 1), dtype=np.uint64)
        zeros = np.zeros((n, 2), np.float32)
        return Pairs(pair_id, np.repeat(digest, n, axis=0), ids, splits, zeros, zeros.ravel(), one.features)

    plan = [np.arange(n * sid, n * (sid + 1)) for sid in range(3)]
    recipe = make_recipe(Pairs.concat([shard(sid) for sid in range(3)]), plan, (), 0)
    writer = CacheWriter(tmp_path / "store", recipe, plan)
    for sid in range(3):
        writer.write(sid, shard(sid), {})
    writer.seal({})
    assert_bounded(READERS[reader], writer.folder.root, tmp_path, "")
