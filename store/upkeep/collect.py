"""
Collecting what nobody needs: what killed processes left, unfinished caches and columns that nobody works on, token ids
that nobody reads, caches that nobody uses. Looks first, removes only when told to, and never what is in use, tagged or
damaged. A complete column goes with its cache alone: who reads a cache says so of the whole, so nobody can tell whether
a column is unused.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from fpo.errors import CacheError, CacheInUse
from fpo.store.beside import column_keys
from fpo.store.files import TMP, Folder, explained
from fpo.store.format.key import is_key
from fpo.store.format.manifest import COLUMNS, MANIFEST, RECIPE, RECORDS
from fpo.store.local import NAMES, TOKENS, TOKENS_JSON, USES, Store
from fpo.store.summaries import is_begun, look_at_column
from fpo.store.upkeep.manage import REMOVED, bytes_in, remove_cache, remove_column
from fpo.store.upkeep.tags import TAGS, read_tag, remove_tag
from fpo.store.upkeep.use import alone, begin_account, is_used, last_use, tells_of_all

UNFINISHED_DAYS = 14.0
"""How long an unfinished cache that nobody works on is kept by default: its shards are somebody's GPU hours."""

_DAY = 86400.0
_TEMPORARY_AGE = 3600.0
"""Seconds. Locks tell which temporary files are dead; this is for file systems whose locks lie."""


@dataclass
class Garbage:
    """Something that may go."""

    kind: Literal["unused", "unfinished", "temporary", "tag"]
    path: Path
    n_bytes: int
    reason: str
    """For people: "12 of 40 shards, unused for 20 days"."""
    key: str | None = None
    """Of the cache, where it is one or belongs to one."""
    column: str | None = None
    """Key of the column, where it is one or belongs to one."""
    in_use: bool = False
    """Somebody works with it, or used or tagged it since it was looked at: it stays."""
    removed: bool = False


@dataclass
class Collection:
    """What `gc` found, and whether it only looked."""

    dry_run: bool
    items: list[Garbage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Caches that stay because nobody can tell yet whether they are used, one line each."""
    problems: list[str] = field(default_factory=list)
    """What could not be looked at or removed, one line each; the rest was."""

    @property
    def n_bytes(self) -> int:
        """Of what was removed, or would be."""
        return sum(item.n_bytes for item in self.items if (not item.in_use if self.dry_run else item.removed))


def gc(
    store: Store | Path | str,
    unused_days: float | None = None,
    unfinished_days: float | None = UNFINISHED_DAYS,
    dry_run: bool = True,
    on_item: Callable[[Garbage], None] | None = None,
) -> Collection:
    """
    Collect what killed processes left, tags of caches that are no more, unfinished caches and columns that nobody
    worked on and token ids that nobody read for `unfinished_days`, and complete caches that nobody opened for
    `unused_days`; None keeps them all. Damaged caches and those with a tag are kept in any case: remove them by name.
    So is, for now, a cache whose uses some of its readers could not note: silence is no disuse, it is counted from this
    collection on.

    on_item(item) is called for each thing found, after it is removed unless this is a dry run.
    Raises CacheError where the store cannot be listed; what fails later is in `problems`.
    """
    store = store if isinstance(store, Store) else Store(store)
    return _Collector(store, unused_days, unfinished_days, Collection(dry_run), on_item).run()


class _Collector:
    """One collection: looks at a thing, removes it if it still may go, and goes on with the next."""

    def __init__(
        self,
        store: Store,
        unused_days: float | None,
        unfinished_days: float | None,
        collection: Collection,
        on_item: Callable[[Garbage], None] | None,
    ) -> None:
        self.store, self.folder = store, Folder(store.root)
        self.limits = {True: unused_days, False: unfinished_days}
        """By whether the cache is complete."""
        self.collection, self.on_item = collection, on_item

    def run(self) -> Collection:
        tags = self.store.tags()
        tagged = set(tags.values())
        keys = [name for name in self.folder.names() if is_key(name)]
        for key in keys:
            self._attempt(partial(self._cache, key, tagged))
        self._attempt(self._graves)
        for name in sorted(set(tags) - {name for name, key in tags.items() if key in set(keys)}):
            self._attempt(partial(self._dangling, name, tags[name]))
        for place in (TAGS, USES, NAMES, TOKENS):
            self._attempt(partial(self._unfinished_notes, place))
        self._attempt(self._tokens)
        if not self.collection.dry_run:
            self._attempt(self._forget_uses)
        return self.collection

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except CacheError as error:
            self.collection.problems.append(str(error))

    def _found(self, item: Garbage, remove: Callable[[], None]) -> None:
        if item.key is not None:
            item.in_use = is_used(self.store.use_file(item.key))
        try:
            if not self.collection.dry_run and not item.in_use:
                remove()
                item.removed = not item.in_use
        except CacheInUse:
            item.in_use = True
        except CacheError as error:
            self.collection.problems.append(str(error))
        self.collection.items.append(item)
        if self.on_item is not None:
            self.on_item(item)

    def _cache(self, key: str, tagged: set[str]) -> None:
        folder = self.store.folder(key)
        days = self._days_beyond(key, tagged)
        if days is None:
            self._temporaries(f"{key}/{TMP}", "left by a writer that was killed", key)
            for column in column_keys(folder):
                self._attempt(partial(self._column, key, column, tagged))
            return
        state = f"unused for {days:.0f} days"
        if RECIPE in folder.names():
            summary = self.store.look(key)
            if summary is None or summary.problem is not None:
                return
            state = f"{summary.state}, {state}"
        kind: Literal["unused", "unfinished"] = "unused" if MANIFEST in folder.names() else "unfinished"
        item = Garbage(kind, folder.root, bytes_in(folder.root), state, key)
        self._found(item, partial(self._remove_cache, item, key))

    def _column(self, key: str, column: str, tagged: set[str]) -> None:
        """A column of a cache that stays."""
        folder = self.store.folder(key).inside(f"{COLUMNS}/{column}")
        days = self._column_days_beyond(folder, key, tagged)
        if days is None:
            self._temporaries(f"{key}/{COLUMNS}/{column}/{TMP}", "left by a writer that was killed", key, column=column)
            return
        state = f"nobody worked on it for {days:.0f} days"
        if is_begun(folder):
            found = look_at_column(self.store.folder(key), key, column)
            if found.problem is not None:
                return
            state = f"{found.name}, {found.state}, {state}"
        item = Garbage("unfinished", folder.root, bytes_in(folder.root), state, key, column)
        self._found(item, partial(self._remove_column, item, folder, key, column))

    def _remove_column(self, item: Garbage, folder: Folder, key: str, column: str) -> None:
        with alone(self.store.use_file(key), f"cache {key[:12]}"):
            # Looked at again: since the first look somebody may have worked on it, finished it or tagged the cache.
            if self._column_days_beyond(folder, key, set(self.store.tags().values())) is None:
                item.in_use = True
            else:
                remove_column(self.store, key, column)

    def _column_days_beyond(self, folder: Folder, key: str, tagged: set[str]) -> float | None:
        """For how long nobody worked on an unfinished column; None where it stays."""
        limit = self.limits[False]
        if key in tagged or limit is None or MANIFEST in folder.names():
            return None
        days = (time.time() - _newest(folder.root)) / _DAY
        return days if days >= limit else None

    def _remove_cache(self, item: Garbage, key: str) -> None:
        with alone(self.store.use_file(key), f"cache {key[:12]}"):
            # Looked at again: since the first look somebody may have used, finished or tagged it.
            if self._days_beyond(key, set(self.store.tags().values())) is None:
                item.in_use = True
            else:
                remove_cache(self.store, key)

    def _days_beyond(self, key: str, tagged: set[str]) -> float | None:
        """For how long nobody used a cache; None where it stays: tagged, used lately, or nobody can tell."""
        complete = MANIFEST in self.store.folder(key).names()
        limit = self.limits[complete]
        if key in tagged or limit is None:
            return None
        note = self.store.use_file(key)
        used = last_use(note)
        # Whoever writes shows it in the cache's own files, whoever reads in this note alone.
        told = tells_of_all(note) if used is not None else not complete
        if not told:
            self._begin_account(key, note)
            return None
        days = (time.time() - (used.timestamp() if used is not None else _newest(self.store.path(key)))) / _DAY
        return days if days >= limit else None

    def _begin_account(self, key: str, note: Path) -> None:
        said = f"{key[:12]} stays: not everybody who may read it could note that they do"
        if self.collection.dry_run:
            self.collection.notes.append(f"{said}; with --yes its use counts from now on")
        else:
            begin_account(note)
            self.collection.notes.append(f"{said}; its use counts from now on")

    def _graves(self) -> None:
        for name in self.folder.names(REMOVED):
            path = self.store.root / REMOVED / name
            item = Garbage("temporary", path, bytes_in(path), "left by a removal that was killed")
            self._found(item, partial(self.folder.delete, f"{REMOVED}/{name}"))

    def _tokens(self) -> None:
        """Token ids of data, which are there to be read again soon."""
        limit = self.limits[False]
        for name in self.folder.names(TOKENS):
            path = self.store.root / TOKENS / name
            if name.startswith(".") or limit is None:
                continue
            with explained("read", path):
                used = path / TOKENS_JSON if os.path.lexists(path / TOKENS_JSON) else path
                days = (time.time() - os.lstat(used).st_mtime) / _DAY
            if days >= limit:
                item = Garbage("temporary", path, bytes_in(path), f"token ids that nobody read for {days:.0f} days")
                self._found(item, partial(self.folder.delete, f"{TOKENS}/{name}"))

    def _dangling(self, name: str, key: str) -> None:
        item = Garbage("tag", self.store.root / TAGS / name, 0, f"a tag of {key[:12]}, which is not here")
        self._found(item, partial(self._untag, item, name, key))

    def _untag(self, item: Garbage, name: str, key: str) -> None:
        if os.path.lexists(self.store.path(key)) or read_tag(self.folder, name) != key:
            item.in_use = True
        else:
            remove_tag(self.store.root, name)

    def _unfinished_notes(self, place: str) -> None:
        """What killed processes left among the tags and the notes of uses."""
        self._temporaries(place, "left by a process that was killed", None, ".")

    def _temporaries(
        self, place: str, reason: str, key: str | None, start: str = "", column: str | None = None
    ) -> None:
        """Old files in a folder of the store whose names begin so; those of a cache go when nobody writes it."""
        for name in self.folder.names(place):
            path = self.store.root / place / name
            try:
                facts = path.lstat()
            except FileNotFoundError:  # its writer lives and is done with it
                continue
            except OSError as error:
                self.collection.problems.append(f"cannot read {path}: {error.strerror}; see the reason")
                continue
            if name.startswith(start) and time.time() - facts.st_mtime >= _TEMPORARY_AGE:
                item = Garbage("temporary", path, bytes_in(path), reason, key, column)
                self._found(item, partial(self._delete_temporary, f"{place}/{name}", key))

    def _delete_temporary(self, name: str, key: str | None) -> None:
        if key is None:
            self.folder.delete(name)
            return
        with alone(self.store.use_file(key), f"cache {key[:12]}"):
            self.folder.delete(name)

    def _forget_uses(self) -> None:
        """Notes about caches that are no more."""
        for name in self.folder.names(USES):
            if is_key(name) and not os.path.lexists(self.store.path(name)):
                with contextlib.suppress(CacheInUse), alone(self.store.use_file(name), f"cache {name[:12]}"):
                    # Looked at again: a writer says that it uses a cache before it makes the folder.
                    if not os.path.lexists(self.store.path(name)):
                        for place in (USES, NAMES):
                            self.folder.remove(f"{place}/{name}")


def _newest(folder: Path) -> float:
    """When the newest of a cache's files was made."""
    with explained("read", folder):
        files = [folder / RECIPE, folder / MANIFEST, folder / RECORDS, folder]
        return max((os.lstat(path).st_mtime for path in files if os.path.lexists(path)), default=time.time())
