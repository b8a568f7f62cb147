"""Processes that fill one cache without talking: any number, coming and going; the first to write a shard wins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_cases import same
from store_one_writer import PLAN, RECIPE, N, scored_by

from fpo.store import CacheWriter, open_cache, own_share_first, verify
from fpo.store.format.manifest import parse_record, record_name

HERE = Path(__file__).parent


def run(store: Path, writers: range, at_most: int) -> list[str]:
    """Start these writers at the same time; what each printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "store_one_writer.py"), str(store), str(writer), str(at_most)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(writers))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, writer in enumerate(writers)
    ]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


def shards_of(store: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and bytes of every shard file: a replaced one differs in the first two even if its bytes do not."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in store.glob("*/shards/*")
    }


def test_any_number_of_processes_fills_a_cache_and_none_replaces_anothers_shard(tmp_path):
    """Three writers stop after two shards each, one after one, then four finish and seal at the same time."""
    assert run(tmp_path, range(3), 2) == [""] * 3
    first = shards_of(tmp_path)
    assert 2 <= len(first) <= 6
    assert run(tmp_path, range(3, 4), 1) == [""]
    second = shards_of(tmp_path)
    assert len(second) == len(first) + 1
    digests = run(tmp_path, range(4, 8), N)
    last = shards_of(tmp_path)
    assert first.items() <= second.items() <= last.items()
    assert len(last) == len(PLAN) == 12

    assert len(set(digests)) == 1
    key = CacheWriter(tmp_path, RECIPE, PLAN).key
    cache = open_cache(tmp_path, key)
    assert digests[0] == cache.digest + "\n"
    assert verify(tmp_path, key).ok
    for sid in range(len(PLAN)):
        # Every shard is one writer's whole, and its record names that writer, or that it was found without one.
        whose = [writer for writer in range(8) if same(cache.shard(sid), scored_by(writer, sid))]
        assert len(whose) == 1
        record = parse_record(cache.folder.read(record_name(sid), 10**6), key, sid, "record")
        provenance = {name: value for name, value in record.provenance.items() if name != "mark"}
        assert provenance in ({"writer": whose[0]}, {"adopted": True})
    assert not list(tmp_path.glob("*/tmp/*"))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("n", [0, 1, 7, 12])
def test_every_process_takes_every_shard_and_its_own_share_first(world, n):
    missing = list(range(10, 10 + n))
    orders = [own_share_first(missing, rank, world) for rank in range(world)]
    assert all(sorted(order) == missing for order in orders)
    if n >= world:
        starts = [missing.index(order[0]) for order in orders]
        shares = np.diff([*starts, n])
        assert starts[0] == 0
        assert set(shares.tolist()) <= {n // world, n // world + 1}
