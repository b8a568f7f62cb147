"""
What is known of a cache and of its columns without reading a shard: the lines of `fpo store ls`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from fpo.errors import CacheDamaged, CacheError
from fpo.store.beside import column_facts, column_keys
from fpo.store.files import printable
from fpo.store.format.columns import Spec, column_name
from fpo.store.format.manifest import (
    COLUMNS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    BaseFacts,
    RecipeFacts,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.sealed import finished_shards
from fpo.store.shards import fetch_parsed
from fpo.store.upkeep.describe import INPUTS, column_label, counted, data_label, reference_label


@dataclass(frozen=True)
class Extent:
    """How much of a base or of a column is there."""

    complete: bool = False
    shards_done: int = 0
    shards_total: int = 0
    n_bytes: int = 0
    """Of the shard files that are there."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Names of what it was made from, as its maker wrote them down; see `describe`."""

    @property
    def state(self) -> str:
        return "complete" if self.complete else f"{self.shards_done} of {counted(self.shards_total, 'shard')}"


@dataclass(frozen=True)
class ColumnSummary:
    """One column of a cache."""

    key: str
    spec: Spec
    """What it holds, see `format.columns`; empty where it cannot be read."""
    extent: Extent
    problem: str | None = None
    """Why it cannot be read, where it cannot."""

    @property
    def name(self) -> str:
        """features at model.layers.12, top 64"""
        return printable(column_name(self.spec), 300) if self.spec else "a column that cannot be read"

    @property
    def label(self) -> str:
        """The same with the SAE, by its maker's name for it and the first digits of its weights' digest."""
        return column_label(self.spec, self.extent.inputs) if self.spec else self.name

    @property
    def complete(self) -> bool:
        return self.extent.complete

    @property
    def n_bytes(self) -> int:
        """Of its shard files that are there."""
        return self.extent.n_bytes

    @property
    def state(self) -> str:
        return "damaged" if self.problem else self.extent.state


@dataclass(frozen=True)
class Summary:
    """One line of `fpo store ls`."""

    key: str
    created: datetime
    """When its recipe.json was written (UTC)."""
    recipe: dict[str, Any]
    problem: str | None = None
    """Why it cannot be read, where it cannot; the counts are then 0 and the recipe may be empty."""
    n_groups: int = 0
    """Groups and completions of the finished cache."""
    n_completions: int = 0
    base: Extent = field(default_factory=Extent)
    columns: tuple[ColumnSummary, ...] = ()
    """By key; none from a server that has no listing."""
    used: datetime | None = None
    """When somebody last opened or wrote it (UTC); None in a read-only store, which keeps no account."""
    tags: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether its base is: columns come and go beside it."""
        return self.base.complete

    @property
    def n_bytes(self) -> int:
        """Of all shard files that are there, columns included."""
        return self.base.n_bytes + sum(column.n_bytes for column in self.columns)

    @property
    def inputs(self) -> dict[str, Any]:
        return self.base.inputs

    @property
    def state(self) -> str:
        return "damaged" if self.problem else self.base.state

    @property
    def reference(self) -> str:
        """Name, where known, and the first digits of the weights' digest."""
        return reference_label(self.recipe, self.inputs)

    @property
    def data(self) -> str:
        """Source and split, where known."""
        return data_label(self.inputs)


def look(folder: Objects, key: str, created: datetime, used: datetime | None, tags: tuple[str, ...]) -> Summary:
    """The cache `key` in `folder`; a damaged one carries its problem instead of raising."""
    recipe: dict[str, Any] = {}
    try:
        recipe = _recipe(folder, key)
        facts = recipe_facts(recipe)
        if not isinstance(facts, BaseFacts):
            raise CacheDamaged(f"{folder.where('')} is a column, not a cache; move it away")
        groups, extent = facts.groups, extent_of(folder, key, facts)
        columns = look_at_columns(folder, key)
    except CacheError as error:
        return Summary(key, created, recipe, str(error), used=used, tags=tags)
    return Summary(key, created, recipe, None, groups.n_groups, groups.n_completions, extent, columns, used, tags)


def look_at_columns(folder: Objects, base: str) -> tuple[ColumnSummary, ...]:
    """The columns beside the cache `base`, by key, finished or not; none where the place has no listing."""
    if isinstance(folder, RemoteObjects) and not folder.listable:
        return ()
    return tuple(look_at_column(folder, base, key) for key in column_keys(folder) if _is_shown(folder, key))


def look_at_column(folder: Objects, base: str, key: str) -> ColumnSummary:
    """One column beside the cache `base`; a damaged one carries its problem instead of raising."""
    spec: Spec = {}
    try:
        facts = column_facts(folder, base, key)
        spec = facts.spec
        return ColumnSummary(key, spec, extent_of(folder.inside(f"{COLUMNS}/{key}"), key, facts))
    except CacheError as error:
        return ColumnSummary(key, spec, Extent(), str(error))


def is_begun(column: Objects) -> bool:
    """Whether anything says what a column's folder is to hold: a writer may have been killed before."""
    return bool(column.sizes([RECIPE, MANIFEST]))


def _is_shown(folder: Objects, key: str) -> bool:
    try:
        return is_begun(folder.inside(f"{COLUMNS}/{key}"))
    except CacheError:  # a link, say: it is listed with its problem, and does not hide the others
        return True


def extent_of(folder: Objects, key: str, facts: RecipeFacts) -> Extent:
    """How much is there of the base or column whose recipe says `facts`. Raises CacheError."""
    total = len(facts.shard_groups)
    if not folder.sizes([MANIFEST]):
        done = finished_shards(folder, total)
        sizes = folder.sizes([shard_name(sid) for sid in done])
        return Extent(False, len(done), total, sum(sizes.values()), inputs_of(folder, key, done))
    _, manifest = fetch_parsed(
        folder, MANIFEST, MAX_MANIFEST_BYTES, lambda data: parse_manifest(data, key, facts, folder.where(MANIFEST))
    )
    return Extent(True, total, total, manifest.n_bytes, inputs_of(folder, key, range(total)))


def inputs_of(folder: Objects, key: str, done: Iterable[int]) -> dict[str, Any]:
    """The names in one of the first records; {} where none has them. Damaged ones are for `verify` to tell."""
    # More than one: a record that was written for a killed process says nothing but that.
    for sid in list(done)[:4]:
        name = record_name(sid)
        try:
            record = parse_record(folder.read(name, MAX_RECORD_BYTES), key, sid, folder.where(name))
        except CacheError:
            continue
        inputs = record.provenance.get(INPUTS)
        if isinstance(inputs, dict):
            return inputs
    return {}


def _recipe(folder: Objects, key: str) -> dict[str, Any]:
    return fetch_parsed(folder, RECIPE, MAX_RECIPE_BYTES, partial(parse_recipe, key=key, where=folder.where(RECIPE)))[1]
