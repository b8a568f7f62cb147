"""
Filling a cache or one of its columns: any number of writers, in any order, killed at any moment.

A shard is committed by its record, the whole by its manifest; each is created once and never replaced, so
the first writer wins and whoever comes later adopts what stands there. What a killed writer leaves is either
committed, adopted by the next one, or a file in tmp/ that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from fpo.store.format.encoding import MAX_FILE_BYTES, Rows, encode_shard
from fpo.store.format.invariants import Invalid
from fpo.store.format.key import cache_key, groups_digest
from fpo.store.format.manifest import (
    COLUMNS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    RECORDS,
    SHARDS,
    ColumnFacts,
    Manifest,
    Record,
    ShardEntry,
    manifest_bytes,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_bytes,
    recipe_facts,
    record_bytes,
    record_name,
    shard_name,
)
from fpo.store.local import Store
from fpo.store.origin import Origin
from fpo.store.sealed import finished_shards
from fpo.store.shards import check_shard, entry_of, load_shard
from fpo.store.upkeep.describe import counted

ADOPTED: dict[str, Any] = {"adopted": True}
"""Provenance of a shard that was found without a record."""


class CacheWriter:
    """Creates the cache or column of a recipe, or goes on where another writer stopped."""

    def __init__(
        self, store: Store | Path | str, recipe: dict[str, Any], plan: Sequence[NDArray[np.integer[Any]]]
    ) -> None:
        """
        recipe: {"format", "scorer", "groups"} of a cache, {"format", "base", "column", "shard_groups"} of a column, see
            docs/cache-format.md.
        plan: the group ids of every shard.

        Raises ValueError where recipe and plan disagree, CacheError where the store cannot be written.
        """
        self.facts = recipe_facts(recipe)
        self.plan = [np.asarray(ids, dtype=np.uint64) for ids in plan]
        if tuple(len(ids) for ids in self.plan) != self.facts.shard_groups:
            raise ValueError("the recipe's shard_groups must be [len(ids) for ids in plan]")
        if self.plan and len(np.unique(np.concatenate(self.plan))) != sum(self.facts.shard_groups):
            raise ValueError("the plan holds a group twice")
        self.key, data = cache_key(recipe), recipe_bytes(recipe)
        store = store if isinstance(store, Store) else Store(store)
        base = self.facts.base if isinstance(self.facts, ColumnFacts) else self.key
        self._use = store.use(base)
        self.folder = store.folder(base)
        if isinstance(self.facts, ColumnFacts):
            self.folder = self.folder.inside(f"{COLUMNS}/{self.key}")
        self.folder.prepare(SHARDS, RECORDS)
        self._origin = Origin(store, make_secret=True)
        if not self.folder.create(RECIPE, data):
            parse_recipe(self.folder.read(RECIPE, MAX_RECIPE_BYTES), self.key, self.folder.where(RECIPE))
        self._seen: set[int] = set()
        self._adopt_unrecorded()
        self._refuse_other_rows()

    def missing(self) -> list[int]:
        """The shards that still have to be written, as the folder says now: another writer may be at work."""
        done = set(finished_shards(self.folder, len(self.plan)))
        # What this process has seen committed may be missing in a listing that comes late.
        done |= {sid for sid in self._seen - done if self.stands(sid)}
        return [sid for sid in range(len(self.plan)) if sid not in done]

    def stands(self, sid: int) -> bool:
        """Whether shard `sid` is committed, by its own files: listings may be late, and many are slow."""
        return len(self.folder.sizes([record_name(sid), shard_name(sid)])) == 2

    def write(self, sid: int, rows: Rows, provenance: dict[str, Any]) -> None:
        """
        Commit shard `sid`. Where another writer was faster, its shard stays and this one is dropped.

        provenance: JSON, how the shard came to be (versions, device, seconds); floats allowed, NaN not.
        Raises ValueError for rows that are not the plan's, CacheError where an invariant does not hold
        (a NaN from the model) or the disk refuses.
        """
        if not np.array_equal(rows.group_id, self.plan[sid]):
            raise ValueError(f"shard {sid} must hold the groups {_few(self.plan[sid])}, got {_few(rows.group_id)}")
        try:
            data = encode_shard(rows, self.key, sid, self.facts.bounds)
        except Invalid as error:
            raise CacheError(f"shard {sid} is not written to {self.folder.root}: {error}") from None
        entry = entry_of(sid, data, rows)
        provenance = provenance | self._origin.mark(self.key, entry)
        while not self.folder.create(shard_name(sid), data):
            standing = self._standing_shard(sid)
            if standing is not None:
                # Whoever wrote it may not have come to its record yet; we can only say that it was there, and
                # whether it is what we computed, too.
                provenance = ADOPTED | (self._origin.mark(self.key, entry) if standing == entry else {})
                entry = standing
                break
            self._discard(sid)
        self._record(entry, provenance)
        self._seen.add(sid)

    def seal(self, facts: dict[str, Any]) -> Manifest:
        """
        Read every shard once more with every check, then write the manifest: readers now see the cache.

        facts: JSON for the manifest (self-check result, drop report). They are part of the output address,
        so no times and no paths.
        Raises CacheIncomplete where shards are missing, CacheDamaged where one is not what its record says.
        """
        if missing := [sid for sid in self.missing() if not self.stands(sid)]:
            total = len(self.plan)
            raise CacheIncomplete(
                f"cache {self.key[:12]} is not complete: {total - len(missing)} of {counted(total, 'shard')} "
                f"{'is' if total == 1 else 'are'} done, missing {_few(np.array(missing))}; write them before sealing"
            )
        entries = tuple(self._recorded(sid) for sid in range(len(self.plan)))
        self._check_shards(entries)
        manifest = Manifest(
            format=1,
            key=self.key,
            n_groups=sum(entry.n_groups for entry in entries),
            n_completions=sum(entry.n_completions for entry in entries),
            n_tokens=sum(entry.n_tokens for entry in entries),
            shards=entries,
            facts=facts,
        )
        if self.folder.create(MANIFEST, manifest_bytes(manifest)):
            return manifest
        where = self.folder.where(MANIFEST)
        theirs = parse_manifest(self.folder.read(MANIFEST, MAX_MANIFEST_BYTES), self.key, self.facts, where)
        if theirs.shards != entries:
            raise CacheConflict(f"{where} seals other shards than the records do; move {self.folder.root} away")
        return theirs

    def not_computed_here(self) -> int:
        """
        How many shards carry no mark of this store (see `origin`): what a stopped pull or an
        unpacked cache left and this writer finished, or the shard of a killed writer.
        """
        entries = tuple(self._recorded(sid) for sid in range(len(self.plan)))
        return self._origin.computed_here(self.folder, self.key, entries).count(False)

    def _check_shards(self, entries: Sequence[ShardEntry]) -> None:
        for entry in entries:
            self._load(entry)
        if isinstance(self.facts, ColumnFacts):
            return
        found = groups_digest(entry.rows_digest for entry in entries)
        if found != self.facts.groups.digest:
            raise CacheConflict(
                f"the groups written to {self.folder.root} have the digest {found[:12]}..., "
                f"its recipe says {self.facts.groups.digest[:12]}...; move that folder away and build it again"
            )

    def _load(self, entry: ShardEntry) -> Rows:
        name = shard_name(entry.shard)
        try:
            rows = load_shard(self.folder, self.key, entry, self.facts.bounds)
        except CacheDamaged as error:
            raise CacheDamaged(
                f"{error}\n  or delete only it and {self.folder.where(record_name(entry.shard))}, "
                "and run the same command again: one shard is computed anew"
            ) from None
        if not np.array_equal(rows.group_id, self.plan[entry.shard]):
            raise CacheConflict(
                f"{self.folder.where(name)} is committed with the groups {_few(rows.group_id)}, this writer has "
                f"{_few(self.plan[entry.shard])} there: the rows of another dataset; use another store, or remove that "
                f"cache: fpo store rm {self.key[:12]}"
            )
        return rows

    def _adopt_unrecorded(self) -> None:
        """Shards whose writer was killed before their record: recorded if they are whole, else removed."""
        shards, records = set(self.folder.names(SHARDS)), set(self.folder.names(RECORDS))
        for sid in range(len(self.plan)):
            if shard_name(sid).split("/")[1] in shards and record_name(sid).split("/")[1] not in records:
                entry = self._standing_shard(sid)
                if entry is None:
                    self._discard(sid)
                else:
                    self.folder.sync(SHARDS)
                    self._record(entry, ADOPTED)

    def _refuse_other_rows(self) -> None:
        """One look before anything is computed: raises where what is committed here is not this plan's."""
        done = finished_shards(self.folder, len(self.plan))
        if done:
            self._load(self._recorded(done[0]))

    def _standing_shard(self, sid: int) -> ShardEntry | None:
        """The shard under this name if it is whole and the planned one, else None."""
        return self._planned(sid, shard_name(sid))

    def _planned(self, sid: int, name: str) -> ShardEntry | None:
        """What a record says about the object `name`, if that is shard `sid` as planned, else None."""
        try:
            data = self.folder.read(name, MAX_FILE_BYTES)
            rows, entry = check_shard(self.folder, self.key, sid, data, self.facts.bounds)
        except (CacheDamaged, CacheMissing):
            return None
        return entry if np.array_equal(rows.group_id, self.plan[sid]) else None

    def _discard(self, sid: int) -> None:
        """
        Remove a damaged shard that nobody committed; one with a record is never touched, and raises where it is not as
        planned. Between the look and the removal another writer may have removed it and put a whole one there: what was
        moved aside is looked at again, and what is whole or committed goes back.
        """
        if self._is_recorded(sid):
            self._load(self._recorded(sid))
            return
        aside = self.folder.set_aside(shard_name(sid))
        if aside is None:
            return
        if self._planned(sid, aside) is not None or self._is_recorded(sid):
            self.folder.create(shard_name(sid), self.folder.read(aside, MAX_FILE_BYTES))
        self.folder.remove(aside)

    def _record(self, entry: ShardEntry, provenance: dict[str, Any]) -> None:
        record = Record(**entry.model_dump(), key=self.key, provenance=provenance)
        if not self.folder.create(record_name(entry.shard), record_bytes(record)):
            committed = self._recorded(entry.shard)
            if committed != entry:
                name, shard = record_name(entry.shard), shard_name(entry.shard)
                raise CacheConflict(
                    f"{self.folder.where(name)} commits a shard with sha256 {committed.sha256[:12]}..., "
                    f"{shard} has {entry.sha256[:12]}...; delete both and run the same command again"
                )

    def _is_recorded(self, sid: int) -> bool:
        return bool(self.folder.sizes([record_name(sid)]))

    def _recorded(self, sid: int) -> ShardEntry:
        name = record_name(sid)
        record = parse_record(self.folder.read(name, MAX_RECORD_BYTES), self.key, sid, self.folder.where(name))
        return ShardEntry(**record.model_dump(exclude={"key", "provenance"}))


def own_share_first(missing: Sequence[int], rank: int, world: int) -> list[int]:
    """
    The order in which process `rank` of `world` takes the missing shards: its own share, then the others', so that
    processes rarely meet although none knows of another. Any number of them may come, go and come back.
    """
    start = len(missing) * rank // world
    return [*missing[start:], *missing[:start]]


def _few(ids: NDArray[Any]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return f"[{shown}{', ...' if len(ids) > 5 else ''}]"
