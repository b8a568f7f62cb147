"""
Moving caches between stores: push and pull. Both directions are the same copy, from a complete cache, object by
object, to a place that refuses taken names: recipe, then every shard and its record, the manifest last; the base
first, then each column in the same way. What stands there already is proved, not moved; whoever is killed goes on where
it stopped; and nothing is ever replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fpo.canonical import sha256_hex
from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheMissing
from fpo.store.beside import column_facts
from fpo.store.choose import AllOrKeys, choose_columns
from fpo.store.files import TMP, Folder, printable
from fpo.store.format.columns import column_name
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
    RecipeFacts,
    Record,
    ShardEntry,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.local import Store
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.sealed import incomplete
from fpo.store.shards import fetch_parsed, fetch_shard

THREADS = 8
MOVING_BYTES = 2**27
"""Of shards that move at a time, by the largest: a stranger's manifest may list large ones only."""

CLAIM = f"{TMP}/push.json"
"""Says which manifest a push is going to write, so that two pushes of different bytes do not mix. Never read else."""

Progress = Callable[[int, int], None]
"""on_object(done, total): bytes of shards that are known to stand at the target, and of all."""


@dataclass(frozen=True)
class Moved:
    """What became of the base, or of a column."""

    key: str
    name: str
    """base, or the column in words."""
    manifest_digest: str
    moved: int
    """Objects that were written."""
    present: int
    """Objects that stood there already."""
    n_bytes: int
    """Of the objects that were written."""
    repaired: tuple[str, ...]
    """Damaged or missing objects of a complete base or column that were replaced."""


@dataclass(frozen=True)
class TransferReport:
    """What `push` or `pull` did."""

    key: str
    target: str
    """Where the cache now stands."""
    base: Moved
    columns: tuple[Moved, ...]
    seconds: float
    listed: bool = True
    """Whether the columns could be listed where they came from; else only those that were named went."""
    tag: str | None = None
    """The tag by which the cache was named, which now stands for it at the target, too."""

    @property
    def manifest_digest(self) -> str:
        """Of the base."""
        return self.base.manifest_digest

    @property
    def parts(self) -> tuple[Moved, ...]:
        """The base and the columns."""
        return (self.base, *self.columns)

    @property
    def moved(self) -> int:
        """Objects that were written, of all parts."""
        return sum(part.moved for part in self.parts)

    @property
    def present(self) -> int:
        """Objects that stood there already, of all parts."""
        return sum(part.present for part in self.parts)

    @property
    def n_bytes(self) -> int:
        """Of the objects that were written, of all parts."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def repaired(self) -> tuple[str, ...]:
        """Objects that were replaced, of all parts."""
        return tuple(name for part in self.parts for name in part.repaired)


def push(
    store: Store | RemoteStore | Path | str,
    name: str,
    url: Store | RemoteStore | Path | str,
    *,
    columns: AllOrKeys = "all",
    threads: int = THREADS,
    on_object: Progress | None = None,
) -> TransferReport:
    """
    Copy the complete cache `name` of a store to another one: a URL or a folder. A tag travels with the cache that it
    names, unless it stands for another one there.

    columns: which go with the base: all complete ones, those whose keys start so, or () for none. What of it stands
    there already stays, so a column may follow its base later.
    Every shard is checked against the manifest before it leaves and looked at after it arrived. At most `threads`
    shards are in memory. Raises CacheIncomplete (how far it is), CacheDamaged (here), CacheConflict where other bytes
    stand there under the same key (naming both manifest digests), CacheError where the other side refuses.
    """
    return _transfer(open_store(store), name, open_store(url), columns, threads, False, on_object)


def pull(
    url: Store | RemoteStore | Path | str,
    name: str,
    store: Store | Path | str,
    *,
    columns: AllOrKeys = "all",
    threads: int = THREADS,
    repair: bool = False,
    on_object: Progress | None = None,
) -> TransferReport:
    """
    Copy the complete cache `name` from a URL (or folder) into a store on this machine, every byte verified on arrival.

    columns: as for `push`. From a server without a listing only those come that are named by all 64 digits.
    repair: also read what stands here already, and replace what is not as the manifest says. Without it a complete
    cache is looked at by name and size. Raises as `push` does.
    """
    target = open_store(store)
    if isinstance(target, RemoteStore):
        raise CacheError(f"{target.root} is no folder of this machine; pull goes to one, push to a URL")
    return _transfer(open_store(url), name, target, columns, threads, repair, on_object)


def _transfer(
    origin: Store | RemoteStore,
    name: str,
    destination: Store | RemoteStore,
    columns: AllOrKeys,
    threads: int,
    repair: bool,
    on_object: Progress | None,
) -> TransferReport:
    start = time.monotonic()
    key = origin.resolve(name)
    tag = origin.tag_of(name, key)
    if tag is not None:
        destination.refuse_other_tag(tag, key)
    # Nobody removes either side meanwhile.
    uses = [place.use(key) for place in (origin, destination) if isinstance(place, Store)]
    try:
        source, target = origin.folder(key), destination.folder(key)
        # All are opened before the first is moved: what cannot go is told at once.
        copies = [_Copy(source, target, key, repair), *_column_copies(source, target, key, columns, repair)]
        moved = _run(copies, threads, on_object)
        if tag is not None:
            destination.carry_tag(tag, key)
        listed = not isinstance(source, RemoteObjects) or source.listable
        seconds = time.monotonic() - start
        return TransferReport(key, target.where(""), moved[0], tuple(moved[1:]), seconds, listed, tag)
    finally:
        for use in uses:
            use.end()


def _column_copies(source: Objects, target: Objects, base: str, columns: AllOrKeys, repair: bool) -> list[_Copy]:
    copies = []
    for key in choose_columns(source, columns):
        # A stranger's folder may hold the column of another base.
        column_facts(source, base, key)
        place = f"{COLUMNS}/{key}"
        copies.append(_Copy(source.inside(place), target.inside(place), key, repair))
    return copies


def _run(copies: list[_Copy], threads: int, on_object: Progress | None) -> list[Moved]:
    """One after the other: where a column stands, its base does."""
    total = sum(copy.manifest.n_bytes for copy in copies)
    moved, before = [], 0
    for copy in copies:
        moved.append(copy.run(threads, None if on_object is None else partial(_advance, on_object, before, total)))
        before += copy.manifest.n_bytes
    return moved


def _advance(on_object: Progress, before: int, total: int, done: int, _total: int) -> None:
    on_object(before + done, total)


class _Copy:
    """The base or a column of one transfer: what the source holds, and the steps that bring it to the target."""

    def __init__(self, source: Objects, target: Objects, key: str, repair: bool) -> None:
        self.source, self.target, self.key, self.repair = source, target, key, repair
        self.recipe, self.facts = fetch_parsed(self.source, RECIPE, MAX_RECIPE_BYTES, self._parse_recipe)
        self.manifest_data, self.manifest = self._read_manifest()
        self.digest = sha256_hex(self.manifest_data)
        self.moved = self.present = self.n_bytes = 0
        self.repaired: list[str] = []

    def run(self, threads: int, on_object: Progress | None) -> Moved:
        self.target.prepare(SHARDS, RECORDS)
        complete = self._target_is_complete()
        if not complete:
            self._claim()
        self._count(self._put(RECIPE, self.recipe), len(self.recipe))
        entries = self.manifest.shards
        there = self.target.sizes([name(entry.shard) for entry in entries for name in (shard_name, record_name)])
        done, total = 0, self.manifest.n_bytes
        most = max((entry.size for entry in entries), default=1)
        at_once = max(1, min(threads, len(entries), MOVING_BYTES // max(most, 1)))
        with ThreadPoolExecutor(at_once, thread_name_prefix="fpo-copy") as pool:
            jobs = {pool.submit(self._shard, entry, there, complete): entry for entry in entries}
            try:
                for job in as_completed(jobs):
                    for written, n_bytes in job.result():
                        self._count(written, n_bytes)
                    done += jobs[job].size
                    if on_object is not None:
                        on_object(done, total)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        for folder in (SHARDS, RECORDS):
            self.target.sync(folder)
        self._count(self._seal(), len(self.manifest_data))
        name = column_name(self.facts.spec) if isinstance(self.facts, ColumnFacts) else "base"
        return Moved(
            self.key, printable(name), self.digest, self.moved, self.present, self.n_bytes, tuple(sorted(self.repaired))
        )

    def _count(self, written: bool, n_bytes: int) -> None:
        self.moved += written
        self.present += not written
        self.n_bytes += n_bytes * written

    def _parse_recipe(self, data: bytes) -> RecipeFacts:
        return recipe_facts(parse_recipe(data, self.key, self.source.where(RECIPE)))

    def _parse_manifest(self, data: bytes) -> Manifest:
        return parse_manifest(data, self.key, self.facts, self.source.where(MANIFEST))

    def _parse_record(self, sid: int, data: bytes) -> Record:
        return parse_record(data, self.key, sid, self.source.where(record_name(sid)))

    def _read_manifest(self) -> tuple[bytes, Manifest]:
        try:
            return fetch_parsed(self.source, MANIFEST, MAX_MANIFEST_BYTES, self._parse_manifest)
        except CacheMissing:
            pass
        raise incomplete(self.source, len(self.facts.shard_groups))

    def _target_is_complete(self) -> bool:
        try:
            theirs = self.target.read(MANIFEST, MAX_MANIFEST_BYTES)
        except CacheMissing:
            return False
        if theirs != self.manifest_data:
            raise self._other_manifest(sha256_hex(theirs))
        return True

    def _other_manifest(self, theirs: str) -> CacheConflict:
        return CacheConflict(
            f"{self.target.where('')} holds other bytes under the same key: its manifest has the digest "
            f"{theirs[:12]}..., that of {self.source.where('')} {self.digest[:12]}...; both are answers to one recipe "
            "and nothing is replaced: keep one, or use another store"
        )

    def _claim(self) -> None:
        """Before the first shard. A claim of the same manifest is a push to be continued, or one that runs now."""
        if isinstance(self.target, Folder):
            # Another writer's records are met one by one; a folder is where caches are also built.
            return
        claim = f'{{"manifest":"{self.digest}"}}\n'.encode()
        if self.target.create(CLAIM, claim):
            self.target.sync(TMP)
            if self.target.create(CLAIM, claim):
                raise CacheError(
                    f"{self.target.where('')}: this server ignores conditional writes (If-None-Match), so pushes could "
                    "overwrite each other; use one that has them"
                )
            return
        theirs = self.target.read(CLAIM, 2**10)
        if theirs != claim:
            digest = theirs.decode("ascii", "replace").partition(":")[2].strip('"}\n')
            raise CacheConflict(
                f"{self.target.where('')} is being filled, or was left unfinished, by a push of other bytes, whose "
                f"manifest has the digest {digest[:12]}..., that of {self.source.where('')} {self.digest[:12]}...; "
                f"finish that push, or delete {self.target.where('')} and push again"
            )

    def _shard(self, entry: ShardEntry, there: dict[str, int], complete: bool) -> list[tuple[bool, int]]:
        """A shard, then its record. Returns (written, bytes) of both."""
        shard, record = shard_name(entry.shard), record_name(entry.shard)
        if self._stands(entry, there, complete):
            return [(False, entry.size), (False, there[record])]
        note, committed = fetch_parsed(self.source, record, MAX_RECORD_BYTES, partial(self._parse_record, entry.shard))
        if _entry(committed) != entry:
            raise CacheDamaged(f"{self.source.where(record)} does not say what {MANIFEST} says of its shard")
        data = fetch_shard(self.source, entry)
        if complete and isinstance(self.target, Folder):
            self._clear_damage(self.target, entry, data)
        written = {shard: self._put(shard, data), record: self._put_record(entry, record, note)}
        if complete:
            self.repaired += [self.target.where(name) for name in written if written[name]]
        return [(written[shard], len(data)), (written[record], len(note))]

    def _stands(self, entry: ShardEntry, there: dict[str, int], complete: bool) -> bool:
        """A record is written after its shard was verified: where it commits this one, nothing is to be done."""
        if there.get(shard_name(entry.shard)) != entry.size or record_name(entry.shard) not in there:
            return False
        if not complete:
            self._check_record(entry)
            return True
        return not self.repair or self._intact(entry)

    def _intact(self, entry: ShardEntry) -> bool:
        try:
            fetch_shard(self.target, entry)
            self._check_record(entry)
        except CacheError:
            return False
        return True

    def _clear_damage(self, target: Folder, entry: ShardEntry, data: bytes) -> None:
        """The target's own manifest says what must stand there: anything else is damage, and makes room."""
        shard, record = shard_name(entry.shard), record_name(entry.shard)
        damaged = [] if target.holds(shard, data) else [shard]
        try:
            self._check_record(entry)
        except CacheError:
            damaged.append(record)
        for name in damaged:
            aside = target.set_aside(name)
            if aside is not None:
                target.remove(aside)

    def _check_record(self, entry: ShardEntry) -> None:
        """Raises CacheConflict where the target's record commits another shard, CacheDamaged where it is none."""
        name = record_name(entry.shard)
        where = self.target.where(name)
        committed = parse_record(self.target.read(name, MAX_RECORD_BYTES), self.key, entry.shard, where)
        if _entry(committed) != entry:
            raise CacheConflict(
                f"{where} commits a shard with the sha256 {committed.sha256[:12]}..., {self.source.where(MANIFEST)} "
                f"(digest {self.digest[:12]}...) one with {entry.sha256[:12]}...: another run made other bytes; remove "
                f"{self.target.where('')}, or use another store"
            )

    def _put(self, name: str, data: bytes) -> bool:
        """Raises CacheConflict where other bytes have the name, CacheDamaged where these do not arrive."""
        if self.target.create(name, data):
            if not self.target.arrived(name, data):
                raise CacheDamaged(
                    f"{self.target.where(name)} arrived damaged; delete it and run the same command again"
                )
            return True
        if not self.target.holds(name, data):
            raise CacheConflict(
                f"{self.target.where(name)} has other bytes than {self.source.where(name)} (manifest "
                f"{self.digest[:12]}...); delete it and run the same command again, or use another store"
            )
        return False

    def _put_record(self, entry: ShardEntry, name: str, note: bytes) -> bool:
        """Records may differ in their provenance: what they commit must be the same."""
        if self.target.create(name, note):
            return True
        self._check_record(entry)
        return False

    def _seal(self) -> bool:
        written = self.target.create(MANIFEST, self.manifest_data)
        self.target.sync("")
        theirs = self.target.read(MANIFEST, MAX_MANIFEST_BYTES)
        if theirs != self.manifest_data:
            raise self._other_manifest(sha256_hex(theirs))
        return written


def _entry(record: Record) -> ShardEntry:
    return ShardEntry(**record.model_dump(exclude={"key", "provenance"}))
