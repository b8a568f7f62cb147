"""
A complete cache, opened for reading: numpy out, every shard verified each time it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fpo.errors import CacheDamaged
from fpo.store.beside import HeldColumn, OpenColumn, held_columns, lacks, serving
from fpo.store.format.columns import Spec
from fpo.store.format.groups import Groups
from fpo.store.format.manifest import COLUMNS, BaseFacts, shard_name
from fpo.store.local import Store
from fpo.store.objects import Objects
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.remote.streaming import Shelf, StreamingFolder
from fpo.store.sealed import Sealed
from fpo.store.upkeep.use import Use

AllOrSpecs = Sequence[Spec] | Literal["all"]


def open_cache(
    store: Store | RemoteStore | Path | str,
    name: str,
    shelf: Shelf | None = None,
    counts: bool = True,
    columns: AllOrSpecs = (),
) -> Cache:
    """
    The complete cache whose key starts with `name`, or whose tag it is, in a folder or at a URL (see `open_store`).
    As long as it is open, nobody removes it from a folder. Shards of a URL pass through `shelf`, a bounded folder
    on this machine (default: `Shelf()`).

    counts: whether this is a use by which a folder's last use is told, or only a look.
    columns: what to read beside the base, see `Cache.read_columns`; nothing else is fetched.
    Raises CacheMissing (also for a column that is not there: how to add it), CacheIncomplete (how far it is and what
    to run) or CacheDamaged.
    """
    store = open_store(store)
    key = store.resolve(name)
    if isinstance(store, RemoteStore):
        cache = Cache(store.folder(key), key, shelf=shelf or Shelf())
    else:
        # Taken before the first look, so that what is found cannot be removed any more.
        use = store.use(key, counts)
        cache = Cache(store.folder(key), key, use)
    cache.read_columns(columns)
    return cache


class Kept(NamedTuple):
    """Some of a cache's groups."""

    rows: Sequence[np.ndarray]
    """Of each shard, the groups by their place in it, ascending."""
    n_completions: int
    """Of all of them."""


class Cache:
    """
    for i in range(len(cache.shard_groups)): groups = cache.shard(i)

    Holds recipes and manifests (about 1 kB per shard), never a shard.
    """

    def __init__(self, folder: Objects, key: str, use: Use | None = None, shelf: Shelf | None = None) -> None:
        """shelf: where shards of a place behind a URL are kept for a while; None for a folder."""
        self._use, self._shelf = use, shelf
        self.folder, self.key = folder, key
        self.base = self._streamed(Sealed(folder, key))
        """Recipe, manifest and shards of the cache itself; `columns` are read beside it."""
        if not isinstance(self.base.facts, BaseFacts):
            raise CacheDamaged(f"{folder.where('')} is a column, not a cache; move it away")
        self.facts: BaseFacts = self.base.facts
        self.recipe, self.manifest, self.digest = self.base.recipe, self.base.manifest, self.base.digest
        self.columns: tuple[OpenColumn, ...] = ()
        """What `shard` reads beside the base, in the order that was asked for."""
        self._kept: Kept | None = None

    @property
    def shard_groups(self) -> list[int]:
        """How many groups each shard holds, of those that are read."""
        if self._kept is not None:
            return [len(rows) for rows in self._kept.rows]
        return self._all_groups

    @cached_property
    def _all_groups(self) -> list[int]:
        return [entry.n_groups for entry in self.manifest.shards]

    @property
    def n_groups(self) -> int:
        return self.manifest.n_groups if self._kept is None else sum(self.shard_groups)

    @property
    def n_completions(self) -> int:
        return self.manifest.n_completions if self._kept is None else self._kept.n_completions

    def keep(self, kept: Kept | None) -> None:
        """From now on read these groups alone, as if the others were not there; None reads all."""
        self._kept = kept

    def held_columns(self, wanted: Sequence[Spec] = ()) -> list[HeldColumn]:
        """
        The complete columns that are there now, by key and spec.

        wanted: specs to ask for by name on a server without a listing.
        """
        return held_columns(self.folder, self.key, self.facts.shard_groups, wanted)

    def read_columns(self, wanted: AllOrSpecs) -> None:
        """
        Read these columns beside the base from now on: specs (see `format.columns`), each served by a column that
        covers it and cut to what was asked for, or all that are there.

        Raises CacheMissing for one that no column covers, with what adds it.
        """
        held = self.held_columns(() if wanted == "all" else wanted)
        specs = [column.spec for column in held] if wanted == "all" else wanted
        self.columns = tuple(self._column(spec, held) for spec in specs)

    def shard(self, sid: int) -> Groups:
        """
        The groups of one shard, 0..len(shard_groups)-1, with the columns that are read beside them.

        Raises CacheDamaged where size, checksum, encoding or an invariant is not as it must be.
        """
        groups = self.base.shard(sid)
        assert isinstance(groups, Groups)
        groups = groups.with_columns([column.rows(groups, sid) for column in self.columns])
        return groups if self._kept is None else groups.take(self._kept.rows[sid])

    def prefetch(self, sids: Sequence[int]) -> None:
        """
        A hint: these shards will be read next, in this order. Those of a URL are then fetched in the background, as
        far ahead as half of the shelf; a cache in a folder needs none. Replaces earlier hints.
        """
        self.base.folder.expect([shard_name(sid) for sid in sids])
        for column in self.columns:
            column.sealed.folder.expect([name for sid in sids for name in column.names(sid)])

    def _column(self, spec: Spec, held: Sequence[HeldColumn]) -> OpenColumn:
        found = serving(held, spec)
        if found is None:
            raise lacks(self.folder.where(""), spec)
        column = OpenColumn(self.folder.inside(f"{COLUMNS}/{found.key}"), found, spec, self._all_groups)
        column.sealed = self._streamed(column.sealed)
        return column

    def _streamed(self, sealed: Sealed) -> Sealed:
        """Its shards from now on through the shelf, where there is one."""
        if self._shelf is not None:
            sealed.folder = StreamingFolder(sealed.folder, sealed.manifest.shards, self._shelf)
        return sealed

    def __repr__(self) -> str:
        return f"Cache({self.key[:12]}, {self.n_groups} groups in {len(self.shard_groups)} shards)"
