"""
A store on this machine: a folder of caches, each named by its key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from errors import CacheError, CacheMissing
from store.describe import INPUTS, data_label, feature_labels, reference_label
from store.files import Folder
from store.manifest import (
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
from store.objects import Objects
from store.tags import read_tag, read_tags, refuse_other_tag, write_tag
from store.use import Use, last_use

STATE = ".state"
"""What the store keeps about its caches besides them: who uses them, and what is being removed."""

_KEY = re.compile(r"[0-9a-f]{64}")

URL = re.compile(r"([a-z][a-z0-9+.-]+)://?(?=[^/])(.*)", re.IGNORECASE)
"""Scheme and rest. One slash is what a Path leaves of two."""


def default_store() -> Path:
    """$FPO_STORE, else ~/.cache/fpo."""
    return Path(os.environ.get("FPO_STORE") or "~/.cache/fpo").expanduser()


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
        return "complete" if self.complete else f"{self.shards_done} of {self.shards_total} shards"

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
        return [name for name in names if _KEY.fullmatch(name) and _holds_a_cache(Folder(self.root / name))]

    def path(self, key: str) -> Path:
        """Where the cache of this full key lies, or would lie."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key has 64 hex digits, got {key!r}")
        return self.root / key

    def folder(self, key: str) -> Folder:
        """The objects of the cache of this full key."""
        return Folder(self.path(key))

    def use_file(self, key: str) -> Path:
        """Where the uses of a cache are noted, see `use`."""
        return self.root / STATE / "uses" / key

    def use(self, key: str, counts: bool = True) -> Use:
        """
        Say that the cache of this full key is being read or written: nobody removes it meanwhile.

        counts: whether it becomes the cache's last use; checking a cache is none.
        """
        return Use(self.use_file(key), counts)

    def tags(self) -> dict[str, str]:
        """Every tag and the key that it stands for."""
        return read_tags(Folder(self.root))

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
        raise CacheMissing(f"no cache in {self.root} has the tag {name!r} or a key that starts so; {listing}")

    def summaries(self) -> list[Summary]:
        """Every cache here, in key order; a damaged one carries its problem instead of raising."""
        names: dict[str, list[str]] = {}
        for name, key in self.tags().items():
            names.setdefault(key, []).append(name)
        found = (self._summary(key, tuple(names.get(key, ()))) for key in self.keys())
        return [summary for summary in found if summary is not None]

    def summary(self, name: str) -> Summary:
        """The cache that `name` resolves to. Raises CacheMissing."""
        key = self.resolve(name)
        summary = self._summary(key, tuple(tag for tag, tagged in self.tags().items() if tagged == key))
        if summary is None:
            raise CacheMissing(f"{self.path(key)} was removed just now")
        return summary

    def _summary(self, key: str, tags: tuple[str, ...]) -> Summary | None:
        folder = self.folder(key)
        try:
            created = datetime.fromtimestamp((folder.root / RECIPE).lstat().st_mtime, UTC)
        except FileNotFoundError:  # removed since it was listed
            return None
        except OSError:  # not ours to look into: its problem is told below
            created = datetime.fromtimestamp(folder.root.lstat().st_mtime, UTC)
        used = last_use(self.use_file(key))
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
            inputs_of(folder, key, done),
        )


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


def _holds_a_cache(folder: Folder) -> bool:
    try:
        return RECIPE in folder.names()
    except CacheError:
        # Another user's, say: it is listed with its problem, and does not hide the others.
        return True


def _indented(keys: list[str]) -> str:
    shown = [f"  {key}" for key in keys[:10]]
    return "\n".join([*shown, *([f"  and {len(keys) - 10} more"] if len(keys) > 10 else [])])
