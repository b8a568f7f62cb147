"""
Keeping a store in order: tags, removing a cache, collecting what nobody needs.

A cache disappears in one step, a rename into STORE/.state/removed, and is deleted there: killed anywhere, no
half of it is left under its key, and the next collection finishes the work. What is in use is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from errors import CacheInUse
from store.files import TMP, explained, make_durable_dirs
from store.local import STATE, Store
from store.manifest import MANIFEST, RECIPE
from store.tags import TAGS, check_tag_name, remove_tag, write_tag
from store.use import alone, is_used, last_use

REMOVED = "removed"
UNFINISHED_DAYS = 14.0
"""How long an unfinished cache that nobody works on is kept by default: its shards are somebody's GPU hours."""

_DAY = 86400.0
_TEMPORARY_AGE = 3600.0
"""Seconds. Locks tell which temporary files are dead; this is for file systems whose locks lie."""
_FULL_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tagged:
    """What `tag` and `untag` did."""

    name: str
    key: str
    before: str | None = None
    """The key that the name stood for until now, if another."""


@dataclass(frozen=True)
class Removed:
    """What `rm` did."""

    key: str
    n_bytes: int
    tags: tuple[str, ...]
    """Its tags, which are gone too."""


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


def tag(store: Store | Path | str, name: str, new: str) -> Tagged:
    """
    Let the tag `new` stand for the cache that `name` resolves to; a tag that exists moves.

    Raises CacheMissing, or CacheError for a name that is none or could be the start of a key.
    """
    store = store if isinstance(store, Store) else Store(store)
    check_tag_name(new)
    key = store.resolve(name)
    before = write_tag(store.root, new, key)
    return Tagged(new, key, before if before != key else None)


def untag(store: Store | Path | str, name: str) -> Tagged:
    """Forget a tag; its cache stays. Raises CacheMissing where there is no such tag."""
    store = store if isinstance(store, Store) else Store(store)
    return Tagged(name, remove_tag(store.root, name))


def rm(store: Store | Path | str, name: str) -> Removed:
    """
    Remove a cache, finished or not, and its tags.

    Raises CacheMissing, or CacheInUse naming who reads or writes it.
    """
    store = store if isinstance(store, Store) else Store(store)
    key = store.resolve(name)
    with alone(store.use_file(key), f"cache {key[:12]} in {store.root}"):
        return _remove(store, key)


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


def _remove(store: Store, key: str) -> Removed:
    """Only where nobody uses the cache."""
    folder = store.folder(key)
    n_bytes = _bytes_in(folder.root)
    grave = store.root / STATE / REMOVED / f"{key}.{secrets.token_hex(8)}"
    with explained("make", grave.parent):
        make_durable_dirs(grave.parent)
    folder.move_away(grave)
    tags = tuple(name for name, tagged in store.tags().items() if tagged == key)
    for name in tags:
        remove_tag(store.root, name)
    store.use_file(key).unlink(missing_ok=True)
    _delete(grave)
    return Removed(key, n_bytes, tags)


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
        yield Garbage(kind, folder.root, _bytes_in(folder.root), state, key)


def _leftovers(store: Store) -> Iterator[Garbage]:
    """What killed removals and taggings left."""
    removed = store.root / STATE / REMOVED
    for name in _names(removed):
        yield Garbage("temporary", removed / name, _bytes_in(removed / name), "left by a removal that was killed")
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
        _delete(item.path)
        item.removed = True
        return
    seen = last_use(store.use_file(item.key))
    try:
        with alone(store.use_file(item.key), f"cache {item.key[:12]}"):
            if last_use(store.use_file(item.key)) != seen and seen is not None:
                item.in_use = True  # since it was looked at, somebody used it
            elif item.kind == "temporary":
                _delete(item.path)
                item.removed = True
            else:
                _remove(store, item.key)
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


def _bytes_in(path: Path) -> int:
    """Of all files below; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if os.path.lexists(path) else 0
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _delete(path: Path) -> None:
    """A file or a folder with all in it, which others may be deleting too."""
    with explained("remove", path):
        while os.path.lexists(path):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except FileNotFoundError:
                continue
