"""
Keeping a store in order: tags, removing a cache or a column of it.

What is removed disappears in one step, a rename into STORE/.state/removed, and is deleted there: killed anywhere, no
half of it is left under its key, and the next collection finishes the work. What is in use is never touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpo.errors import CacheError, CacheMissing
from fpo.store.choose import choose_columns
from fpo.store.files import Folder, explained, make_durable_dirs, refuse_links
from fpo.store.format.manifest import COLUMNS
from fpo.store.local import NAMES, STATE, USES, Store
from fpo.store.summaries import ColumnSummary, Summary, look_at_column
from fpo.store.upkeep.tags import check_tag_name, remove_tag, write_tag
from fpo.store.upkeep.use import alone

REMOVED = f"{STATE}/removed"

FEWEST_DIGITS = 4
"""Of a key, to remove its cache: one digit is soon typed."""


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
    """Of the cache or of the column that went."""
    n_bytes: int


def tag(store: Store | Path | str, name: str, new: str) -> Tagged:
    """
    Let the tag `new` stand for the cache that `name` resolves to; a tag that exists moves.

    Raises CacheMissing, or CacheError for a name that is none or could be the start of a key.
    """
    store = store if isinstance(store, Store) else Store(store)
    check_tag_name(new)
    key = store.resolve(name)
    # Nobody removes it between the last look and its name, which then keeps it.
    use = store.use(key)
    try:
        if store.look(key) is None:
            raise CacheMissing(f"{store.path(key)} was removed just now")
        before = write_tag(store.root, new, key)
    finally:
        use.end()
    return Tagged(new, key, before if before != key else None)


def untag(store: Store | Path | str, name: str) -> Tagged:
    """Forget a tag; its cache stays. Raises CacheMissing where there is no such tag."""
    store = store if isinstance(store, Store) else Store(store)
    return Tagged(name, remove_tag(store.root, name))


def removable(store: Store | Path | str, name: str) -> Summary:
    """
    The cache that `rm` would remove. Raises CacheMissing, or CacheError for one with a tag or where `name` is the
    start of its key and shorter than FEWEST_DIGITS.
    """
    store = store if isinstance(store, Store) else Store(store)
    summary = store.summary(name)
    if summary.key.startswith(name) and len(name) < FEWEST_DIGITS:
        raise CacheError(f"{name} is short for a key to remove; give at least {FEWEST_DIGITS} digits of {summary.key}")
    _refuse_tagged(summary.key, summary.tags)
    return summary


def removable_column(store: Store | Path | str, name: str, column: str) -> ColumnSummary:
    """
    The column beside the cache `name` that `rm` would remove, whose key starts with `column`. Raises as `removable`
    does, for the cache as for the column.
    """
    store = store if isinstance(store, Store) else Store(store)
    base = removable(store, name).key
    (key,) = choose_columns(store.folder(base), [column])
    if len(column) < FEWEST_DIGITS:
        raise CacheError(f"{column} is short for a column to remove; give at least {FEWEST_DIGITS} digits of {key}")
    return look_at_column(store.folder(base), base, key)


def rm(store: Store | Path | str, name: str, column: str | None = None) -> Removed:
    """
    Remove a cache with all its columns, finished or not, or of its columns the one whose key starts with `column`.

    Raises as `removable` does, or CacheInUse naming who reads or writes the cache.
    """
    store = store if isinstance(store, Store) else Store(store)
    key = removable(store, name).key
    doomed = None if column is None else removable_column(store, name, column).key
    with alone(store.use_file(key), f"cache {key[:12]} in {store.root}"):
        _refuse_tagged(key, store.tags_of(key))
        return remove_cache(store, key) if doomed is None else remove_column(store, key, doomed)


def _refuse_tagged(key: str, tags: tuple[str, ...]) -> None:
    if tags:
        raise CacheError(
            f"cache {key[:12]} has the {'tag' if len(tags) == 1 else 'tags'} {', '.join(tags)}, which keeps it; "
            f"take that away first: fpo store untag {tags[0]}"
        )


def remove_cache(store: Store, key: str) -> Removed:
    """Remove a cache that nobody uses, see `alone`, and that has no tag."""
    return _remove(store, store.folder(key), key, (f"{USES}/{key}", f"{NAMES}/{key}"))


def remove_column(store: Store, base: str, key: str) -> Removed:
    """Remove a column of a cache that nobody uses, see `alone`."""
    return _remove(store, store.folder(base).inside(f"{COLUMNS}/{key}"), key, ())


def _remove(store: Store, folder: Folder, key: str, notes: Sequence[str]) -> Removed:
    place = Folder(store.root)
    n_bytes = bytes_in(folder.root)
    grave = f"{REMOVED}/{key}.{secrets.token_hex(8)}"
    refuse_links((store.root / grave).parent, store.root)
    with explained("make", store.root / REMOVED):
        make_durable_dirs(store.root / REMOVED, like=store.root)
    folder.move_away(store.root / grave)
    for note in notes:
        place.remove(note)
    place.delete(grave)
    return Removed(key, n_bytes)


def bytes_in(path: Path) -> int:
    """Of all files below; links are not followed. Raises CacheError."""
    total = 0
    with explained("read", path), contextlib.suppress(FileNotFoundError):
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            return facts.st_size
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total
