"""
A store on this machine: a folder of caches, each named by its key.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from errors import CacheError, CacheMissing
from store.files import Folder
from store.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    RECIPE,
    RECORDS,
    SHARDS,
    parse_manifest,
    parse_recipe,
    recipe_facts,
    record_name,
    shard_name,
)

_KEY = re.compile(r"[0-9a-f]{64}")


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


class Store:
    """The caches under one folder, which need not exist yet."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()

    def keys(self) -> list[str]:
        """Of every cache here, complete or not, sorted."""
        names = Folder(self.root).names()
        return [name for name in names if _KEY.fullmatch(name) and RECIPE in Folder(self.root / name).names()]

    def path(self, key: str) -> Path:
        """Where the cache of this full key lies, or would lie."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key has 64 hex digits, got {key!r}")
        return self.root / key

    def folder(self, key: str) -> Folder:
        """The objects of the cache of this full key."""
        return Folder(self.path(key))

    def resolve(self, name: str) -> str:
        """
        The one key here that starts with `name`.

        Raises CacheMissing, which lists what is here, where none or several do.
        """
        keys = self.keys()
        found = [key for key in keys if name and key.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CacheMissing(
                f"{name} is the start of {len(found)} keys in {self.root}; give more digits\n" + _indented(found)
            )
        listing = f"it holds\n{_indented(keys)}" if keys else "it is empty; build a cache with fpo cache RECIPE"
        raise CacheMissing(f"no cache in {self.root} has a key that starts with {name!r}; {listing}")

    def summaries(self) -> list[Summary]:
        """Every cache here, in key order; a damaged one carries its problem instead of raising."""
        return [self._summary(key) for key in self.keys()]

    def _summary(self, key: str) -> Summary:
        folder = self.folder(key)
        created = datetime.fromtimestamp((folder.root / RECIPE).stat().st_mtime, UTC)
        recipe: dict[str, Any] = {}
        try:
            recipe = parse_recipe(folder.read(RECIPE, MAX_JSON_BYTES), key, folder.where(RECIPE))
            facts = recipe_facts(recipe)
            done = finished_shards(folder, len(facts.pairs.shard_pairs))
            complete = MANIFEST in folder.names()
            if complete:
                data = folder.read(MANIFEST, MAX_JSON_BYTES)
                n_bytes = parse_manifest(data, key, facts, folder.where(MANIFEST)).n_bytes
            else:
                n_bytes = sum(folder.size(shard_name(sid)) for sid in done)
        except CacheError as error:
            return Summary(key, False, 0, 0, 0, 0, created, recipe, str(error))
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
        )


def finished_shards(folder: Folder, n_shards: int) -> list[int]:
    """The shards that have a record, and the file that it commits, in order."""
    records, shards = set(folder.names(RECORDS)), set(folder.names(SHARDS))
    return [
        sid
        for sid in range(n_shards)
        if record_name(sid).removeprefix(f"{RECORDS}/") in records
        and shard_name(sid).removeprefix(f"{SHARDS}/") in shards
    ]


def _indented(keys: list[str]) -> str:
    shown = [f"  {key}" for key in keys[:10]]
    return "\n".join([*shown, *([f"  and {len(keys) - 10} more"] if len(keys) > 10 else [])])
