"""
Doubting a cache: everything that can be checked without the model, and all that is wrong, not the first. The base and
its columns are read side by side, so that a column's rows are held against the groups that they belong to.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from fpo.errors import CacheDamaged, CacheError
from fpo.store.beside import column_facts, column_keys, cut_elsewhere, joined_beside
from fpo.store.choose import AllOrKeys, choose_columns
from fpo.store.files import TMP, printable
from fpo.store.format.encoding import ColumnRows, Rows
from fpo.store.format.groups import Groups
from fpo.store.format.manifest import (
    COLUMNS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    RECORDS,
    REPAIR_SHARD,
    SHARDS,
    BaseFacts,
    Manifest,
    RecipeFacts,
    ShardEntry,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.format.plan import shards_within
from fpo.store.local import Store
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.shards import fetch_shard, load_shard
from fpo.store.summaries import is_begun, look_at_column

Found = TypeVar("Found")
Level = Literal["sizes", "checksums", "all"]


@dataclass
class Report:
    """What `verify` found."""

    key: str
    shards: int = 0
    """Shards of the base that passed every check."""
    groups: int = 0
    """Groups in them."""
    columns: dict[str, int] = field(default_factory=dict)
    """Key of each column that was looked at, and how many of its shards passed."""
    problems: list[str] = field(default_factory=list)
    """One line per problem, naming the file."""
    notes: list[str] = field(default_factory=list)
    """Columns that are not finished, one line each: nobody reads them."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    store: Store | RemoteStore | Path | str,
    name: str,
    on_shard: Callable[[int, int], None] | None = None,
    level: Level = "all",
    columns: AllOrKeys = "all",
) -> Report:
    """
    Doubt a cache. Whatever the level: the key, manifest and records against themselves and each other, files that do
    not belong there. Of the shards, "sizes" looks at the size, "checksums" at every byte's part in the sha256,
    "all" also decodes them, checks every invariant and holds columns against the base. One shard of the base is in
    memory at a time, with what one column has beside it.

    columns: the starts of their keys, () for the base alone.
    on_shard(done, total) is called after each shard, for a progress bar.
    Raises CacheMissing where no key starts so; all else is in the report.
    """
    store = open_store(store)
    key = store.resolve(name)
    use = store.use(key, counts=False) if isinstance(store, Store) else None
    try:
        return _Verification(store.folder(key), key, level, on_shard).run(columns)
    finally:
        if use is not None:
            use.end()


@dataclass
class _Part:
    """The base or a column while it is looked at."""

    folder: Objects
    key: str
    facts: RecipeFacts
    manifest: Manifest | None
    passed: int = 0


class _Verification:
    """One look at a cache, whose problems are collected."""

    def __init__(self, folder: Objects, key: str, level: Level, on_shard: Callable[[int, int], None] | None) -> None:
        self.folder, self.key, self.level, self.on_shard = folder, key, level, on_shard
        self.report = Report(key)
        self.done = self.total = 0

    def run(self, columns: AllOrKeys) -> Report:
        report = self.report
        base = self._part(self.folder, self.key, partial(_base_facts, self.folder, self.key))
        if base is None:
            return report
        beside = self._columns(base, columns)
        self.total = sum(len(part.facts.shard_groups) for part in (base, *(column for column, _ in beside)))
        ids = array("Q")
        for sid in range(len(base.facts.shard_groups)):
            groups = self._shard(base, sid)
            if isinstance(groups, Groups):
                ids.frombytes(groups.group_id.tobytes())
            for column, within in beside:
                self._shards_beside(column, within[sid], groups if isinstance(groups, Groups) else None)
        report.shards, report.columns = base.passed, {column.key: column.passed for column, _ in beside}
        if holds_a_value_twice(ids):
            report.problems.append(f"{self.folder.where(SHARDS)}: a group stands in two shards")
        return report

    def _attempt(self, step: Callable[[], Found]) -> Found | None:
        try:
            return step()
        except CacheError as error:
            self.report.problems.append(str(error))
            return None

    def _part(self, folder: Objects, key: str, facts_of: Callable[[], RecipeFacts]) -> _Part | None:
        facts = self._attempt(facts_of)
        if facts is None:
            return None
        self._attempt(partial(_refuse_strangers, folder, facts, self.report))
        return _Part(folder, key, facts, self._attempt(partial(_manifest, folder, key, facts)))

    def _columns(self, base: _Part, columns: AllOrKeys) -> list[tuple[_Part, list[list[int]]]]:
        """Those that can be held against the base, each with its shards within every shard of the base."""
        if columns == "all" and not (isinstance(self.folder, RemoteObjects) and not self.folder.listable):
            there = self._attempt(partial(column_keys, self.folder)) or []
            keys = [key for key in there if self._attempt(partial(self._is_complete, key))]
        else:
            keys = choose_columns(self.folder, columns)
        beside = []
        for key in keys:
            place = self.folder.inside(f"{COLUMNS}/{key}")
            part = self._part(place, key, partial(column_facts, self.folder, self.key, key))
            within = None if part is None else shards_within(base.facts.shard_groups, part.facts.shard_groups)
            if part is not None and within is not None:
                beside.append((part, within))
            elif part is not None:
                self.report.problems.append(str(cut_elsewhere(place)))
        return beside

    def _is_complete(self, key: str) -> bool:
        """Whether a column has a manifest; where it has none, a note says how far it is."""
        place = self.folder.inside(f"{COLUMNS}/{key}")
        if place.sizes([MANIFEST]):
            return True
        state = "empty"
        if is_begun(place):
            column = look_at_column(self.folder, self.key, key)
            if column.problem is not None:
                raise CacheDamaged(column.problem)
            state = f"{column.label}, {column.state}"
        step = "push it again" if isinstance(place, RemoteObjects) else "finish it with: fpo cache RECIPE"
        self.report.notes.append(f"{place.where('')} is not finished ({state}); {step}")
        return False

    def _shards_beside(self, column: _Part, sids: list[int], groups: Groups | None) -> None:
        """The shards of a column that hold rows of these groups, one shard of the base."""
        parts = [self._shard(column, at) for at in sids]
        found = [part for part in parts if isinstance(part, ColumnRows)]
        if groups is not None and len(found) == len(sids):
            where = column.folder.where(shard_name(sids[0]))
            self._attempt(partial(joined_beside, where, found, groups))

    def _shard(self, part: _Part, sid: int) -> Rows | None:
        """Its rows where they were read and passed."""
        folder, problems = part.folder, self.report.problems
        record = self._attempt(partial(_record, folder, part.key, sid))
        entry = part.manifest.shards[sid] if part.manifest else record
        if part.manifest and record and record != entry:
            problems.append(f"{folder.where(record_name(sid))} does not say what {MANIFEST} says of its shard")
        rows, passed = None, False
        if entry is not None and self.level == "all":
            rows = self._attempt(partial(load_shard, folder, part.key, entry, part.facts.bounds))
            passed = rows is not None
        elif entry is not None:
            passed = self._attempt(partial(_bytes_pass, folder, entry, self.level)) is not None
        if passed and entry is not None:
            part.passed += 1
            self.report.groups += entry.n_groups if isinstance(part.facts, BaseFacts) else 0
        self.done += 1
        if self.on_shard is not None:
            self.on_shard(self.done, self.total)
        return rows


def holds_a_value_twice(ids: array[int]) -> bool:
    """Sorts them in place: the ids of a big cache are in memory once."""
    values = np.frombuffer(ids, np.uint64)
    values.sort()
    return bool((values[1:] == values[:-1]).any())


def _bytes_pass(folder: Objects, entry: ShardEntry, level: Level) -> bool:
    """True, or CacheDamaged or CacheMissing naming the file: size alone, or every byte."""
    name = shard_name(entry.shard)
    if level == "checksums":
        fetch_shard(folder, entry)
    elif (size := folder.size(name)) != entry.size:
        raise CacheDamaged(f"{folder.where(name)} has {size} bytes, the manifest says {entry.size}; {REPAIR_SHARD}")
    return True


def _base_facts(folder: Objects, key: str) -> RecipeFacts:
    facts = recipe_facts(parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE)))
    if not isinstance(facts, BaseFacts):
        raise CacheDamaged(f"{folder.where('')} is a column, not a cache; move it away")
    return facts


def _manifest(folder: Objects, key: str, facts: RecipeFacts) -> Manifest:
    return parse_manifest(folder.read(MANIFEST, MAX_MANIFEST_BYTES), key, facts, folder.where(MANIFEST))


def _record(folder: Objects, key: str, sid: int) -> ShardEntry:
    name = record_name(sid)
    record = parse_record(folder.read(name, MAX_RECORD_BYTES), key, sid, folder.where(name))
    return ShardEntry(**record.model_dump(exclude={"key", "provenance"}))


def _refuse_strangers(folder: Objects, facts: RecipeFacts, report: Report) -> None:
    if isinstance(folder, RemoteObjects) and not folder.listable:
        return
    known = {RECIPE, MANIFEST, SHARDS, RECORDS, TMP}
    known |= {name(sid) for sid in range(len(facts.shard_groups)) for name in (shard_name, record_name)}
    there = folder.names() + [f"{sub}/{name}" for sub in (SHARDS, RECORDS) for name in folder.names(sub)]
    if isinstance(facts, BaseFacts):
        columns = folder.names(COLUMNS)
        known |= {COLUMNS, *(f"{COLUMNS}/{key}" for key in column_keys(folder))}
        there += [f"{COLUMNS}/{name}" for name in columns]
    strangers = [folder.where(printable(name)) for name in there if name not in known]
    report.problems += [f"{stranger} does not belong to this cache" for stranger in strangers]
