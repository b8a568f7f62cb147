"""
Collecting what nobody needs: what killed processes left, unfinished caches that nobody works on, caches that nobody
uses. Looks first, removes only when told to, and never what is in use, tagged or damaged.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from errors import CacheInUse
from store.files import TMP
from store.local import STATE, Store
from store.manage import REMOVED, bytes_in, delete, remove_cache
from store.manifest import MANIFEST, RECIPE
from store.tags import TAGS
from store.use import alone, is_used, last_use

UNFINISHED_DAYS = 14.0
"""How long an unfinished cache that nobody works on is kept by default: its shards are somebody's GPU hours."""

_DAY = 86400.0
_TEMPORARY_AGE = 3600.0
"""Seconds. Locks tell which temporary files are dead; this is for file systems whose locks lie."""
_FULL_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass
class Garbage:
    """Something that may go."""

    kind: Literal["unused", "unfinished", "temporary"]
    path: Path
    n_bytes: int
    reason: str
    """For people: "12 of 40 shards, unused for 20 days"."""
    key: str | None = None
    """Of the cache, where it is one or belongs to one."""
    in_use: bool = False
    """Somebody works with it: it stays."""
    removed: bool = False


@dataclass
class Collection:
    """What `gc` found, and whether it only looked."""

    dry_run: bool
    items: list[Garbage] = field(default_factory=list)

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
    Collect what killed processes left, unfinished caches that nobody worked on for `unfinished_days` and
    complete caches that nobody opened for `unused_days`; None keeps them all. Damaged caches and those with
    a tag are kept in any case: remove them by name.

    on_item(item) is called for each thing found, after it is removed unless this is a dry run.
    Raises CacheError where the store cannot be written.
    """
    store = store if isinstance(store, Store) else Store(store)
    collection = Collection(dry_run)
    for item in [*_caches(store, unused_days, unfinished_days), *_leftovers(store)]:
        use_file = None if item.key is None else store.use_file(item.key)
        item.in_use = use_file is not None and is_used(use_file)
        if not dry_run and not item.in_use:
            _collect(store, item)
        collection.items.append(item)
        if on_item is not None:
            on_item(item)
    if not dry_run:
        _forget_uses(store)
    return collection


def _caches(store: Store, unused_days: float | None, unfinished_days: float | None) -> Iterator[Garbage]:
    tagged = set(store.tags().values())
    for key in (name for name in _names(store.root) if _FULL_KEY.fullmatch(name)):
        folder = store.folder(key)
        inside = folder.names()
        age = _age_days(store, key)
        complete = MANIFEST in inside
        limit = unused_days if complete else unfinished_days
        if key in tagged or limit is None or age < limit:
            yield from _temporaries(folder.root / TMP, key)
            continue
        state = f"unused for {age:.0f} days"
        if RECIPE in inside:
            summary = store.summary(key)
            if summary.problem is not None:
                continue
            state = f"{summary.state}, {state}"
        kind: Literal["unused", "unfinished"] = "unused" if complete else "unfinished"
        yield Garbage(kind, folder.root, bytes_in(folder.root), state, key)


def _leftovers(store: Store) -> Iterator[Garbage]:
    """What killed removals and taggings left."""
    removed = store.root / STATE / REMOVED
    for name in _names(removed):
        yield Garbage("temporary", removed / name, bytes_in(removed / name), "left by a removal that was killed")
    for name in (name for name in _names(store.root / TAGS) if name.startswith(".")):
        yield from _temporary(store.root / TAGS / name, None)


def _temporaries(folder: Path, key: str) -> Iterator[Garbage]:
    for name in _names(folder):
        yield from _temporary(folder / name, key)


def _temporary(path: Path, key: str | None) -> Iterator[Garbage]:
    try:
        facts = path.lstat()
    except FileNotFoundError:  # its writer lives and is done with it
        return
    if time.time() - facts.st_mtime >= _TEMPORARY_AGE:
        yield Garbage("temporary", path, facts.st_size, "left by a writer that was killed", key)


def _collect(store: Store, item: Garbage) -> None:
    if item.key is None:
        delete(item.path)
        item.removed = True
        return
    seen = last_use(store.use_file(item.key))
    try:
        with alone(store.use_file(item.key), f"cache {item.key[:12]}"):
            if last_use(store.use_file(item.key)) != seen and seen is not None:
                item.in_use = True  # since it was looked at, somebody used it
            elif item.kind == "temporary":
                delete(item.path)
                item.removed = True
            else:
                remove_cache(store, item.key)
                item.removed = True
    except CacheInUse:
        item.in_use = True


def _forget_uses(store: Store) -> None:
    """Notes about caches that are no more."""
    for name in _names(store.root / STATE / "uses"):
        if _FULL_KEY.fullmatch(name) and not os.path.lexists(store.path(name)):
            with contextlib.suppress(CacheInUse), alone(store.use_file(name), f"cache {name[:12]}"):
                # Looked at again: a writer says that it uses a cache before it makes the folder.
                if not os.path.lexists(store.path(name)):
                    store.use_file(name).unlink(missing_ok=True)


def _age_days(store: Store, key: str) -> float:
    """Since the last use; where that is unknown, since the newest of its files was made."""
    used = last_use(store.use_file(key))
    folder = store.path(key)
    files = [folder / RECIPE, folder / MANIFEST, folder / "records", folder]
    times = [used.timestamp()] if used else [path.stat().st_mtime for path in files if path.exists()]
    return (time.time() - max(times, default=time.time())) / _DAY


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
