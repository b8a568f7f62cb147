"""
A store on this machine: a folder of caches, each named by its key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheError, CacheMissing
from fpo.store.files import Folder, explained, make_durable_dirs, refuse_links, replace_file
from fpo.store.format.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    RECORDS,
    SHARDS,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.objects import Objects
from fpo.store.upkeep.describe import INPUTS, counted, data_label, feature_labels, reference_label
from fpo.store.upkeep.tags import read_tag, read_tags, refuse_other_tag, write_tag
from fpo.store.upkeep.use import Use, last_use, moment

STATE = ".state"
"""What the store keeps about its caches besides them: who uses them, and what is being removed."""

USES = f"{STATE}/uses"
NAMES = f"{STATE}/names"
"""What unfinished caches are made from, in words: no record of theirs may say it yet."""
_MAX_NAMES_BYTES = 2**16

_KEY = re.compile(r"[0-9a-f]{64}")

URL = re.compile(r"([a-z][a-z0-9+.-]+)://?(?=[^/])(.*)", re.IGNORECASE)
"""Scheme and rest. One slash is what a Path leaves of two."""


def default_store() -> Path:
    """$FPO_STORE, else ~/.cache/fpo. Raises CacheError for a user without a home, as containers have them."""
    try:
        return Path(os.environ.get("FPO_STORE") or "~/.cache/fpo").expanduser()
    except RuntimeError:
        raise CacheError("this user has no home folder; say where caches are kept: --store or FPO_STORE") from None


@dataclass(frozen=True)
class Summary:
    """One line of `fpo store ls`."""

    key: str
    complete: bool
    shards_done: int
    shards_total: int
    n_pairs: int
    """Pairs of the finished cache."""
    n_bytes: int
    """Of the shard files that are there."""
    created: datetime
    """When its recipe.json was written (UTC)."""
    recipe: dict[str, Any]
    problem: str | None
    """Why it cannot be read, where it cannot; the counts are then 0 and the recipe may be empty."""
    used: datetime | None = None
    """When somebody last opened or wrote it (UTC); None in a read-only store, which keeps no account."""
    tags: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    """Names of what it was made from, as its maker wrote them down; see `describe`."""

    @property
    def state(self) -> str:
        if self.problem:
            return "damaged"
        return "complete" if self.complete else f"{self.shards_done} of {counted(self.shards_total, 'shard')}"

    @property
    def reference(self) -> str:
        """Name, where known, and the first digits of the weights' digest."""
        return reference_label(self.recipe, self.inputs)

    @property
    def features(self) -> list[str]:
        """Hookpoint, top-k and SAE of each."""
        return feature_labels(self.recipe, self.inputs)

    @property
    def data(self) -> str:
        """Source and split, where known."""
        return data_label(self.inputs)


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
        return [name for name in names if _KEY.fullmatch(name) and _holds_a_cache(self.folder(name))]

    def path(self, key: str) -> Path:
        """Where the cache of this full key lies, or would lie."""
        if not _KEY.fullmatch(key):
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
        if _KEY.fullmatch(name) and _holds_a_cache(self.folder(name)):
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
        recipe: dict[str, Any] = {}
        try:
            recipe = parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE))
            facts = recipe_facts(recipe)
            done = finished_shards(folder, len(facts.pairs.shard_pairs))
            complete = MANIFEST in folder.names()
            if complete:
                data = folder.read(MANIFEST, MAX_MANIFEST_BYTES)
                n_bytes = parse_manifest(data, key, facts, folder.where(MANIFEST)).n_bytes
            else:
                n_bytes = sum(folder.size(shard_name(sid)) for sid in done)
        except CacheError as error:
            if not os.path.lexists(folder.root):
                return None
            return Summary(key, False, 0, 0, 0, 0, created, recipe, str(error), used, tags)
        total = len(facts.pairs.shard_pairs)
        return Summary(
            key,
            complete,
            total if complete else len(done),
            total,
            facts.pairs.n_pairs,
            n_bytes,
            created,
            recipe,
            None,
            used,
            tags,
            inputs_of(folder, key, done) or self._names(key),
        )

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


def finished_shards(folder: Objects, n_shards: int) -> list[int]:
    """The shards that have a record, and the file that it commits, in order."""
    records, shards = set(folder.names(RECORDS)), set(folder.names(SHARDS))
    return [
        sid
        for sid in range(n_shards)
        if record_name(sid).removeprefix(f"{RECORDS}/") in records
        and shard_name(sid).removeprefix(f"{SHARDS}/") in shards
    ]


def inputs_of(folder: Objects, key: str, done: Sequence[int]) -> dict[str, Any]:
    """The names in one of the first records; {} where none has them. Damaged ones are for `verify` to tell."""
    # More than one: a record that was written for a killed process says nothing but that.
    for sid in done[:4]:
        name = record_name(sid)
        try:
            record = parse_record(folder.read(name, MAX_RECORD_BYTES), key, sid, folder.where(name))
        except CacheError:
            continue
        inputs = record.provenance.get(INPUTS)
        if isinstance(inputs, dict):
            return inputs
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
