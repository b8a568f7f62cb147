"""
A complete cache, opened for reading: numpy out, every shard verified each time it is read.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from errors import CacheDamaged, CacheIncomplete, CacheMissing
from store.files import Folder, sha256_hex
from store.local import Store, finished_shards
from store.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    RECIPE,
    REPAIR,
    SHARDS,
    Manifest,
    parse_manifest,
    parse_recipe,
    recipe_facts,
    shard_name,
)
from store.pairs import Pairs
from store.shards import load_shard
from store.use import Use


def open_cache(store: Store | Path | str, name: str) -> Cache:
    """
    The complete cache whose key starts with `name`, or whose tag it is. As long as it is open, nobody removes it.

    Raises CacheMissing, CacheIncomplete (how far it is and what to run) or CacheDamaged.
    """
    store = store if isinstance(store, Store) else Store(store)
    key = store.resolve(name)
    # Taken before the first look, so that what is found cannot be removed any more.
    use = store.use(key)
    return Cache(store.folder(key), key, use)


class Cache:
    """
    for i in range(len(cache.shard_pairs)): pairs = cache.shard(i)

    Holds the recipe and the manifest (about 1 kB per shard), never a shard.
    """

    def __init__(self, folder: Folder, key: str, use: Use | None = None) -> None:
        self._use = use
        self.folder = folder
        self.key = key
        self.recipe: dict[str, Any] = parse_recipe(folder.read(RECIPE, MAX_JSON_BYTES), key, folder.where(RECIPE))
        """What the key was made from: format, scorer, pairs."""
        self._facts = recipe_facts(self.recipe)
        manifest = self._read_manifest()
        self.digest = sha256_hex(manifest)
        """sha256 of manifest.json, the output address: names these bytes, as the key names their recipe."""
        self.manifest: Manifest = parse_manifest(manifest, key, self._facts, folder.where(MANIFEST))
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

    def _read_manifest(self) -> bytes:
        try:
            return self.folder.read(MANIFEST, MAX_JSON_BYTES)
        except CacheMissing:
            total = len(self._facts.pairs.shard_pairs)
            done = len(finished_shards(self.folder, total))
        raise CacheIncomplete(
            f"cache {self.key[:12]} in {self.folder.root.parent} is not complete: "
            f"{done} of {total} shards are done; finish it with: fpo cache RECIPE"
        )

    def _check_sizes(self) -> None:
        """A missing or truncated file shows when the cache opens, not hours later."""
        for entry in self.manifest.shards:
            name = shard_name(entry.shard)
            try:
                size = self.folder.size(name)
            except CacheMissing:
                size = None
            if size != entry.size:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CacheDamaged(f"{self.folder.where(name)} {found}, the manifest says {entry.size} bytes; {REPAIR}")

    def __repr__(self) -> str:
        return f"Cache({self.key[:12]}, {self.n_pairs} pairs in {len(self.shard_pairs)} {SHARDS})"
