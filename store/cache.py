"""
A complete cache, opened for reading: numpy out, every shard verified each time it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fpo.canonical import sha256_hex
from fpo.errors import CacheDamaged, CacheIncomplete, CacheMissing
from fpo.store.format.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    RECIPE,
    REPAIR_SHARD,
    SHARDS,
    Manifest,
    parse_manifest,
    parse_recipe,
    recipe_facts,
    shard_name,
)
from fpo.store.format.pairs import Pairs
from fpo.store.local import Store, finished_shards
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.remote.streaming import Shelf, StreamingFolder
from fpo.store.shards import fetch_parsed, load_shard
from fpo.store.upkeep.describe import counted
from fpo.store.upkeep.use import Use


def open_cache(
    store: Store | RemoteStore | Path | str, name: str, shelf: Shelf | None = None, counts: bool = True
) -> Cache:
    """
    The complete cache whose key starts with `name`, or whose tag it is, in a folder or at a URL (see `open_store`).
    As long as it is open, nobody removes it from a folder. Shards of a URL pass through `shelf`, a bounded folder
    on this machine (default: `Shelf()`).

    counts: whether this is a use by which a folder's last use is told, or only a look.
    Raises CacheMissing, CacheIncomplete (how far it is and what to run) or CacheDamaged.
    """
    store = open_store(store)
    key = store.resolve(name)
    if isinstance(store, RemoteStore):
        cache = Cache(store.folder(key), key)
        cache.folder = StreamingFolder(cache.folder, cache.manifest.shards, shelf or Shelf())
        return cache
    # Taken before the first look, so that what is found cannot be removed any more.
    use = store.use(key, counts)
    return Cache(store.folder(key), key, use)


class Cache:
    """
    for i in range(len(cache.shard_pairs)): pairs = cache.shard(i)

    Holds the recipe and the manifest (about 1 kB per shard), never a shard.
    """

    def __init__(self, folder: Objects, key: str, use: Use | None = None) -> None:
        self._use = use
        self.folder = folder
        self.key = key
        self.recipe: dict[str, Any]
        """What the key was made from: format, scorer, pairs."""
        _, self.recipe = fetch_parsed(
            folder, RECIPE, MAX_RECIPE_BYTES, lambda data: parse_recipe(data, key, folder.where(RECIPE))
        )
        self._facts = recipe_facts(self.recipe)
        data, self.manifest = self._read_manifest()
        self.digest = sha256_hex(data)
        """sha256 of manifest.json, the output address: names these bytes, as the key names their recipe."""
        self._check_sizes()

    @cached_property
    def shard_pairs(self) -> list[int]:
        """How many pairs each shard holds."""
        return [entry.n_pairs for entry in self.manifest.shards]

    @property
    def n_pairs(self) -> int:
        return self.manifest.n_pairs

    def shard(self, sid: int) -> Pairs:
        """
        The pairs of one shard, 0..len(shard_pairs)-1.

        Raises CacheDamaged where size, checksum, encoding or an invariant is not as it must be.
        """
        if not 0 <= sid < len(self.manifest.shards):
            raise IndexError(f"shard {sid} of a cache with {len(self.manifest.shards)} shards")
        return load_shard(self.folder, self.key, self.manifest.shards[sid], self._facts.bounds)

    def prefetch(self, sids: Sequence[int]) -> None:
        """
        A hint: these shards will be read next, in this order. Those of a URL are then fetched in the background, as
        far ahead as half of the shelf; a cache in a folder needs none. Replaces earlier hints.
        """
        self.folder.expect([shard_name(sid) for sid in sids])

    def _read_manifest(self) -> tuple[bytes, Manifest]:
        def parse(data: bytes) -> Manifest:
            return parse_manifest(data, self.key, self._facts, self.folder.where(MANIFEST))

        try:
            return fetch_parsed(self.folder, MANIFEST, MAX_MANIFEST_BYTES, parse)
        except CacheMissing:
            pass
        raise incomplete(self.folder, len(self._facts.pairs.shard_pairs))

    def _check_sizes(self) -> None:
        """A missing or truncated file shows when the cache opens, not hours later."""
        sizes = self.folder.sizes([shard_name(entry.shard) for entry in self.manifest.shards])
        for entry in self.manifest.shards:
            name = shard_name(entry.shard)
            size = sizes.get(name)
            if size != entry.size:
                found = "is missing" if size is None else f"has {size} bytes"
                where = self.folder.where(name)
                raise CacheDamaged(f"{where} {found}, the manifest says {entry.size} bytes; {REPAIR_SHARD}")

    def __repr__(self) -> str:
        return f"Cache({self.key[:12]}, {self.n_pairs} pairs in {len(self.shard_pairs)} {SHARDS})"


def incomplete(folder: Objects, n_shards: int) -> CacheIncomplete:
    """A cache without a manifest: how far it is, and what finishes it."""
    place = f"cache {folder.where('')}"
    if isinstance(folder, RemoteObjects):
        return CacheIncomplete(f"{place} is not complete: it has no {MANIFEST}; push it again from where it was built")
    done = (
        f"{len(finished_shards(folder, n_shards))} of {counted(n_shards, 'shard')} {'is' if n_shards == 1 else 'are'}"
    )
    return CacheIncomplete(f"{place} is not complete: {done} done; finish it with: fpo cache RECIPE")
