"""
Putting back single shards of a complete cache or column: one that is damaged or gone is replaced by the bytes that the
manifest names, or by none. The cache stays the same answer; readers that have it open go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpo.canonical import sha256_hex
from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheMissing
from fpo.store.beside import column_facts
from fpo.store.cache import Cache
from fpo.store.files import Folder
from fpo.store.format.encoding import Rows, encode_shard
from fpo.store.format.manifest import (
    COLUMNS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    Manifest,
    Record,
    ShardEntry,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_bytes,
    record_name,
    shard_name,
)
from fpo.store.local import Store
from fpo.store.origin import Origin
from fpo.store.shards import fetch_shard

REBUILT: dict[str, Any] = {"rebuilt": True}
"""Provenance of a shard whose record was lost with it."""


class Rebuild:
    """The shards of a complete cache, or of one of its columns, that are not as its manifest says."""

    def __init__(self, store: Store | Path | str, key: str, column: str | None = None) -> None:
        """
        column: full key of a column, whose shards are meant; None for the base's.

        Reads every shard. Raises CacheMissing where nothing complete has this key, CacheDamaged for its lists.
        """
        self.store = store = store if isinstance(store, Store) else Store(store)
        self.cache_key = key
        self.key, self.folder = key if column is None else column, store.folder(key)
        if column is not None:
            column_facts(self.folder, key, column)
            self.folder = self.folder.inside(f"{COLUMNS}/{column}")
        self._use = store.use(key)
        self._origin = Origin(store)
        where = self.folder.where
        recipe = parse_recipe(self.folder.read(RECIPE, MAX_RECIPE_BYTES), self.key, where(RECIPE))
        self._facts = recipe_facts(recipe)
        data = self.folder.read(MANIFEST, MAX_MANIFEST_BYTES)
        self.manifest = parse_manifest(data, self.key, self._facts, where(MANIFEST))
        self.damaged = [entry.shard for entry in self.manifest.shards if not self._is_whole(entry)]
        """Shards to be computed, ascending."""

    def sources(self, sid: int) -> list[list[str] | None]:
        """
        Caches from which rows of a shard may have been copied, likeliest first: those that its record names. Where the
        record is lost: none, or any of them (None). A matrix product's last bits may depend on what else was scored.
        """
        record = self._record(self.manifest.shards[sid])
        if record is None:
            return [[], None]
        rows = record.provenance.get("rows")
        reused = rows.get("reused") if isinstance(rows, dict) else None
        return [sorted(map(str, reused)) if isinstance(reused, dict) else []]

    def put(self, sid: int, rows: Rows) -> None:
        """
        Replace a damaged shard by these rows.

        Raises CacheConflict, and leaves all as it is, where they do not give the bytes that the manifest names: then
        they are another answer.
        """
        entry = self.manifest.shards[sid]
        data = encode_shard(rows, self.key, sid, self._facts.bounds)
        if sha256_hex(data) != entry.sha256:
            raise CacheConflict(
                f"shard {sid} of {self.key[:12]} comes out with the sha256 {sha256_hex(data)[:12]}..., "
                f"the manifest says {entry.sha256[:12]}...: this machine's last bits are others, so the cache would "
                "get another output address; restore the shard from a copy (fpo store pull KEY URL --repair), or "
                "remove the cache (fpo store rm KEY) and build it again with fpo cache RECIPE"
            )
        self._replace(shard_name(sid), data)
        if self._record(entry) is None:
            record = Record(**entry.model_dump(), key=self.key, provenance=REBUILT | self._origin.mark(self.key, entry))
            self._replace(record_name(sid), record_bytes(record))

    def _replace(self, name: str, data: bytes) -> None:
        aside = self.folder.set_aside(name)
        if not self.folder.create(name, data) and not self.folder.holds(name, data):
            raise CacheConflict(f"{self.folder.where(name)} was written by another process meanwhile; run this again")
        if aside is not None:
            self.folder.remove(aside)

    def _is_whole(self, entry: ShardEntry) -> bool:
        try:
            fetch_shard(self.folder, entry)
        except CacheDamaged:
            return False
        return self._record(entry) is not None

    def _record(self, entry: ShardEntry) -> Record | None:
        name = record_name(entry.shard)
        try:
            data = self.folder.read(name, MAX_RECORD_BYTES)
            record = parse_record(data, self.key, entry.shard, self.folder.where(name))
        except CacheError:
            return None
        return record if ShardEntry(**record.model_dump(exclude={"key", "provenance"})) == entry else None


def check_changed(cache: Cache) -> None:
    """
    Read the shards in a folder that changed since their manifest was written, if any: whole caches have none, so this
    costs a look at each file's time. What a disk forgets by itself shows when a shard is read. Of the columns, those
    that the cache was opened with. Raises CacheDamaged.
    """
    for folder, manifest in [
        (cache.folder, cache.manifest),
        *((column.sealed.folder, column.sealed.manifest) for column in cache.columns),
    ]:
        if isinstance(folder, Folder):
            _check_changed(folder, manifest)


def _check_changed(folder: Folder, manifest: Manifest) -> None:
    sealed = _written(folder, MANIFEST)
    for entry in manifest.shards:
        if _written(folder, shard_name(entry.shard)) >= sealed:
            fetch_shard(folder, entry)


def _written(folder: Folder, name: str) -> int:
    try:
        return (folder.root / name).lstat().st_mtime_ns
    except OSError:
        raise CacheMissing(f"{folder.where(name)} is missing") from None
