"""
What a cache takes on disk, array by array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from errors import CacheDamaged, CacheMissing
from store.archive import unpack
from store.cache import Cache
from store.files import sha256_hex
from store.format import MAX_FILE_BYTES
from store.invariants import Invalid
from store.manifest import REPAIR, shard_name

OVERHEAD = "metadata and zip"


@dataclass(frozen=True)
class ArrayUsage:
    """One array over all shards."""

    name: str
    """Its path inside a shard, or `OVERHEAD` for all that is no array's data."""
    stored: int
    """Bytes on disk, compressed."""
    raw: int
    """Bytes in memory; 0 for the overhead."""


def disk_usage(cache: Cache, on_shard: Callable[[int, int], None] | None = None) -> list[ArrayUsage]:
    """
    Bytes of every array over all shards, largest first; `stored` adds up to the size of the shard files.

    Reads every shard and checks its checksum. on_shard(done, total) is called after each.
    Raises CacheDamaged.
    """
    stored: dict[str, int] = {}
    raw: dict[str, int] = {}
    total = len(cache.shard_pairs)
    for sid in range(total):
        _add_shard(cache, sid, stored, raw)
        if on_shard is not None:
            on_shard(sid + 1, total)
    stored[OVERHEAD] = cache.manifest.n_bytes - sum(stored.values())
    usage = [ArrayUsage(name, size, raw.get(name, 0)) for name, size in stored.items()]
    return sorted(usage, key=lambda array: (array.name == OVERHEAD, -array.stored, array.name))


def _add_shard(cache: Cache, sid: int, stored: dict[str, int], raw: dict[str, int]) -> None:
    name, entry = shard_name(sid), cache.manifest.shards[sid]
    try:
        data = cache.folder.read(name, MAX_FILE_BYTES)
        if sha256_hex(data) != entry.sha256:
            raise Invalid("its sha256 is not what the manifest says")
        members = unpack(data)
    except (CacheMissing, Invalid) as error:
        raise CacheDamaged(f"{cache.folder.where(name)} is damaged: {error}; {REPAIR}") from None
    for member, content in members.items():
        if not member.endswith("/zarr.json"):
            continue
        metadata, array = json.loads(bytes(content)), member.removesuffix("/zarr.json")
        if metadata["node_type"] == "array":
            chunk = array + "/c" + "/0" * len(metadata["shape"])
            stored[array] = stored.get(array, 0) + len(members.get(chunk, b""))
            size = math.prod(metadata["shape"]) * np.dtype(metadata["data_type"]).itemsize
            raw[array] = raw.get(array, 0) + size
