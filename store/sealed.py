"""
What has a recipe, shards and a manifest: the base of a complete cache, or one of its columns.
"""

from __future__ import annotations

from typing import Any

from fpo.canonical import sha256_hex
from fpo.errors import CacheDamaged, CacheIncomplete, CacheMissing
from fpo.store.format.encoding import Rows
from fpo.store.format.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    RECIPE,
    RECORDS,
    REPAIR_SHARD,
    SHARDS,
    Manifest,
    parse_manifest,
    parse_recipe,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.shards import fetch_parsed, load_shard
from fpo.store.upkeep.describe import counted


class Sealed:
    """Holds the recipe and the manifest (about 1 kB per shard), never a shard. Every shard is verified when read."""

    def __init__(self, folder: Objects, key: str) -> None:
        """Raises CacheMissing, CacheIncomplete (how far it is and what to run) or CacheDamaged."""
        self.folder, self.key = folder, key
        self.recipe: dict[str, Any]
        """What the key was made from."""
        _, self.recipe = fetch_parsed(
            folder, RECIPE, MAX_RECIPE_BYTES, lambda data: parse_recipe(data, key, folder.where(RECIPE))
        )
        self.facts = recipe_facts(self.recipe)
        data, self.manifest = self._read_manifest()
        self.digest = sha256_hex(data)
        """sha256 of manifest.json, the output address: names these bytes, as the key names their recipe."""
        self._check_sizes()

    def shard(self, sid: int) -> Rows:
        """The rows of one shard. Raises CacheDamaged where anything is not as it must be, IndexError for another."""
        if not 0 <= sid < len(self.manifest.shards):
            raise IndexError(f"shard {sid} of {len(self.manifest.shards)} shards")
        return load_shard(self.folder, self.key, self.manifest.shards[sid], self.facts.bounds)

    def _read_manifest(self) -> tuple[bytes, Manifest]:
        def parse(data: bytes) -> Manifest:
            return parse_manifest(data, self.key, self.facts, self.folder.where(MANIFEST))

        try:
            return fetch_parsed(self.folder, MANIFEST, MAX_MANIFEST_BYTES, parse)
        except CacheMissing:
            pass
        raise incomplete(self.folder, len(self.facts.shard_groups))

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


def finished_shards(folder: Objects, n_shards: int) -> list[int]:
    """The shards that have a record, and the file that it commits, in order."""
    records, shards = set(folder.names(RECORDS)), set(folder.names(SHARDS))
    return [
        sid
        for sid in range(n_shards)
        if record_name(sid).removeprefix(f"{RECORDS}/") in records
        and shard_name(sid).removeprefix(f"{SHARDS}/") in shards
    ]


def incomplete(folder: Objects, n_shards: int) -> CacheIncomplete:
    """What has no manifest: how far it is, and what finishes it."""
    place = f"cache {folder.where('')}"
    if isinstance(folder, RemoteObjects):
        return CacheIncomplete(f"{place} is not complete: it has no {MANIFEST}; push it again from where it was built")
    done = (
        f"{len(finished_shards(folder, n_shards))} of {counted(n_shards, 'shard')} {'is' if n_shards == 1 else 'are'}"
    )
    return CacheIncomplete(f"{place} is not complete: {done} done; finish it with: fpo cache RECIPE")
