"""
Keeping a store in order: tags, removing a cache.

A cache disappears in one step, a rename into STORE/.state/removed, and is deleted there: killed anywhere, no
half of it is left under its key, and the next collection finishes the work. What is in use is never touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from store.files import explained, make_durable_dirs
from store.local import STATE, Store
from store.tags import check_tag_name, remove_tag, write_tag
from store.use import alone

REMOVED = "removed"


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
        return remove_cache(store, key)


def remove_cache(store: Store, key: str) -> Removed:
    """Remove a cache that nobody uses, see `alone`."""
    folder = store.folder(key)
    n_bytes = bytes_in(folder.root)
    grave = store.root / STATE / REMOVED / f"{key}.{secrets.token_hex(8)}"
    with explained("make", grave.parent):
        make_durable_dirs(grave.parent)
    folder.move_away(grave)
    tags = tuple(name for name, tagged in store.tags().items() if tagged == key)
    for name in tags:
        remove_tag(store.root, name)
    store.use_file(key).unlink(missing_ok=True)
    delete(grave)
    return Removed(key, n_bytes, tags)


def bytes_in(path: Path) -> int:
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


def delete(path: Path) -> None:
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
