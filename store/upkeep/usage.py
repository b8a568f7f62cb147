"""
What a cache takes on disk, array by array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fpo.errors import CacheDamaged
from fpo.store.cache import Cache
from fpo.store.format.archive import unpack
from fpo.store.format.arrays import chunk_name
from fpo.store.format.encoding import array_shapes, claimed_counts, schema
from fpo.store.format.invariants import Invalid
from fpo.store.format.manifest import REPAIR_SHARD, ShardEntry, shard_name
from fpo.store.sealed import Sealed
from fpo.store.shards import fetch_shard

OVERHEAD = "metadata and zip"


@dataclass(frozen=True)
class ArrayUsage:
    """One array over all shards of the base, or of a column."""

    name: str
    """Its path inside a shard, or `OVERHEAD` for all that is no array's data."""
    stored: int
    """Bytes on disk, compressed."""
    raw: int
    """Bytes in memory; 0 for the overhead."""
    column: str | None = None
    """Key of its column; None in the base, and for the overhead of all."""


def disk_usage(cache: Cache, on_shard: Callable[[int, int], None] | None = None) -> list[ArrayUsage]:
    """
    Bytes of every array of the base and of the columns that the cache was opened with, largest first; `stored` adds up
    to the size of their shard files.

    Reads every shard and checks its checksum. on_shard(done, total) is called after each.
    Raises CacheDamaged.
    """
    parts = [(None, cache.base), *((column.sealed.key, column.sealed) for column in cache.columns)]
    shards = [(column, sealed, entry) for column, sealed in parts for entry in sealed.manifest.shards]
    stored: dict[tuple[str | None, str], int] = {}
    raw: dict[tuple[str | None, str], int] = {}
    for done, (column, sealed, entry) in enumerate(shards, 1):
        for array, (on_disk, in_memory) in _arrays(sealed, entry).items():
            stored[column, array] = stored.get((column, array), 0) + on_disk
            raw[column, array] = raw.get((column, array), 0) + in_memory
        if on_shard is not None:
            on_shard(done, len(shards))
    usage = [ArrayUsage(array, size, raw[column, array], column) for (column, array), size in stored.items()]
    usage.sort(key=lambda array: (-array.stored, array.column or "", array.name))
    return [*usage, ArrayUsage(OVERHEAD, sum(entry.size for _, _, entry in shards) - sum(stored.values()), 0)]


def _arrays(sealed: Sealed, entry: ShardEntry) -> dict[str, tuple[int, int]]:
    """Bytes on disk and in memory of every array of a shard."""
    bounds = sealed.facts.bounds
    try:
        members = unpack(fetch_shard(sealed.folder, entry))
        shapes = array_shapes(members, claimed_counts(members, sealed.key, entry.shard), bounds)
    except Invalid as error:
        where = sealed.folder.where(shard_name(entry.shard))
        raise CacheDamaged(f"{where} is damaged: {error}; {REPAIR_SHARD}") from None
    found = {}
    for array, spec in schema(bounds).items():
        in_memory = math.prod(shapes[array]) * np.dtype(spec.dtype).itemsize
        found[array] = len(members.get(chunk_name(array, spec), b"")), in_memory
    return found
