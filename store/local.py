"""
A store on this machine: a folder of caches, each named by its key.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheError, CacheMissing
from fpo.store.files import Folder, explained, make_durable_dirs, refuse_links, replace_file
from fpo.store.format.key import is_key
from fpo.store.format.manifest import RECIPE
from fpo.store.summaries import Summary, look
from fpo.store.upkeep.tags import read_tag, read_tags, refuse_other_tag, write_tag
from fpo.store.upkeep.use import Use, last_use, moment

STATE = ".state"
"""What the store keeps about its caches besides them: who uses them, and what is being removed."""

USES = f"{STATE}/uses"
NAMES = f"{STATE}/names"
"""What unfinished caches are made from, in words: no record of theirs may say it yet."""
_MAX_NAMES_BYTES = 2**16
TOKENS = f"{STATE}/tokens"
"""Token ids of data that caches are made from, a folder each; only time is lost without them."""
TOKENS_JSON = "tokens.json"
"""Makes such a folder whole; its modification time is the last use."""

URL = re.compile(r"([a-z][a-z0-9+.-]+)://?(?=[^/])(.*)", re.IGNORECASE)
"""Scheme and rest. One slash is what a Path leaves of two."""


def default_store() -> Path:
    """$FPO_STORE, else ~/.cache/fpo. Raises CacheError for a user without a home, as containers have them."""
    try:
        return Path(os.environ.get("FPO_STORE") or "~/.cache/fpo").expanduser()
    except RuntimeError:
        raise CacheError("this user has no home folder; say where caches are kept: --store or FPO_STORE") from None


class Store:
    """The caches under one folder, which need not exist yet."""

    def __init__(self, root: Path | str) -> None:
        if URL.fullmatch(os.fspath(root)):
            raise CacheError(
                f"{root} is a URL: caches are built, tagged and removed in a folder; build there, then fpo store push"
            )
        self.root = Path(root).expanduser()

    def keys(self) -> list[str]:
        """Of every cache here, complete or not, sorted."""
        names = Folder(self.root).names()
        return [name for name in names if is_key(name) and _holds_a_cache(self.folder(name))]

    def path(self, key: str) -> Path:
        """Where the cache of this full key lies, or would lie."""
        if not is_key(key):
            raise ValueError(f"a key has 64 hex digits, got {key!r}")
        return self.root / key

    def folder(self, key: str) -> Folder:
        """The objects of the cache of this full key."""
        return Folder(self.path(key), self.root)

    def use_file(self, key: str) -> Path:
        """Where the uses of a cache are noted, see `use`."""
        return self.root / USES / key

    def use(self, key: str, counts: bool = True) -> Use:
        """
        Say that the cache of this full key is being read or written: nobody removes it meanwhile.

        counts: whether it becomes the cache's last use; checking a cache is none.
        """
        return Use(self.use_file(key), counts)

    def tags(self) -> dict[str, str]:
        """Every tag and the key that it stands for."""
        return read_tags(Folder(self.root))

    def tags_of(self, key: str) -> tuple[str, ...]:
        """The tags of the cache of this full key."""
        return tuple(name for name, tagged in self.tags().items() if tagged == key)

    def tag_of(self, name: str, key: str) -> str | None:
        """`name` if it is a tag of this cache."""
        return name if read_tag(Folder(self.root), name) == key else None

    def refuse_other_tag(self, name: str, key: str) -> None:
        """Raises CacheConflict where the tag stands for another cache."""
        refuse_other_tag(Folder(self.root), name, key)

    def carry_tag(self, name: str, key: str) -> None:
        """Let `name` stand for a cache that was just brought here. Raises CacheConflict where it is another's."""
        self.refuse_other_tag(name, key)
        write_tag(self.root, name, key)

    def resolve(self, name: str) -> str:
        """
        The one key here that starts with `name`, or that the tag `name` stands for.

        Raises CacheMissing, which lists what is here, where none or several do.
        """
        if is_key(name) and _holds_a_cache(self.folder(name)):
            return name
        keys = self.keys()
        tagged = read_tag(Folder(self.root), name)
        if tagged is not None:
            if tagged not in keys:
                raise CacheMissing(
                    f"the tag {name} in {self.root} stands for {tagged[:12]}, which is not here; "
                    f"pull it, or remove the tag with: fpo store untag {name}"
                )
            return tagged
        found = [key for key in keys if name and key.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CacheMissing(
                f"{name} is the start of {len(found)} keys in {self.root}; give more digits\n" + _indented(found)
            )
        listing = f"it holds\n{_indented(keys)}" if keys else "it is empty; build a cache with fpo cache RECIPE"
        if not self.root.exists():
            listing = "there is no such folder; build a cache with fpo cache RECIPE, or name another with --store"
        raise CacheMissing(f"no cache in {self.root} has the tag {name!r} or a key that starts so; {listing}")

    def summaries(self) -> list[Summary]:
        """Every cache here, in key order; a damaged one carries its problem instead of raising."""
        names: dict[str, list[str]] = {}
        for name, key in self.tags().items():
            names.setdefault(key, []).append(name)
        found = (self.look(key, tuple(names.get(key, ()))) for key in self.keys())
        return [summary for summary in found if summary is not None]

    def summary(self, name: str) -> Summary:
        """The cache that `name` resolves to. Raises CacheMissing."""
        key = self.resolve(name)
        summary = self.look(key, self.tags_of(key))
        if summary is None:
            raise CacheMissing(f"{self.path(key)} was removed just now")
        return summary

    def look(self, key: str, tags: tuple[str, ...] = ()) -> Summary | None:
        """The cache of this full key, which has these tags; None where there is none."""
        folder = self.folder(key)
        created = _created(folder)
        if created is None:
            return None
        try:
            used = last_use(self.use_file(key))
        except CacheError:  # unknown; who wants to lock or remove it will be told
            used = None
        summary = look(folder, key, created, used, tags)
        if summary.problem is not None and not os.path.lexists(folder.root):
            return None
        return summary if summary.inputs else replace(summary, base=replace(summary.base, inputs=self._names(key)))

    def note_names(self, key: str, inputs: dict[str, Any]) -> None:
        """Write down what a cache that is begun is made from (see `describe`), for `ls`. Raises CacheError."""
        folder = self.root / NAMES
        refuse_links(folder, self.root)
        with explained("write", folder / key):
            make_durable_dirs(folder, like=self.root)
            replace_file(folder / key, checked_json(inputs))

    def _names(self, key: str) -> dict[str, Any]:
        try:
            return parse_checked_json(Folder(self.root).read(f"{NAMES}/{key}", _MAX_NAMES_BYTES))
        except (CacheError, ValueError, RecursionError):
            return {}


def _created(folder: Folder) -> datetime | None:
    """When its recipe was written, else the folder; None where neither is there (any more)."""
    for path in (folder.root / RECIPE, folder.root):
        try:
            return moment(path.lstat().st_mtime)
        except FileNotFoundError:
            return None
        except OSError:  # not ours to look into: its problem is told by who reads it
            continue
    return moment(0)


def _holds_a_cache(folder: Folder) -> bool:
    try:
        return RECIPE in folder.names()
    except CacheError:
        # Another user's, say: it is listed with its problem, and does not hide the others.
        return True


def _indented(keys: list[str]) -> str:
    shown = [f"  {key}" for key in keys[:10]]
    return "\n".join([*shown, *([f"  and {len(keys) - 10} more"] if len(keys) > 10 else [])])
