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
from fpo.store.format.encoding import array_shapes, schema
from fpo.store.format.invariants import Invalid
from fpo.store.format.manifest import REPAIR_SHARD, recipe_facts, shard_name
from fpo.store.shards import fetch_shard

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
    bounds = recipe_facts(cache.recipe).bounds
    try:
        members = unpack(fetch_shard(cache.folder, entry))
        shapes = array_shapes(members, bounds)
    except Invalid as error:
        raise CacheDamaged(f"{cache.folder.where(name)} is damaged: {error}; {REPAIR_SHARD}") from None
    for array, spec in schema(len(bounds.features), bounds.top_logits > 0).items():
        chunk = members.get(array + "/c" + "/0" * len(spec.dimensions), b"")
        stored[array] = stored.get(array, 0) + len(chunk)
        raw[array] = raw.get(array, 0) + math.prod(shapes[array]) * np.dtype(spec.dtype).itemsize
