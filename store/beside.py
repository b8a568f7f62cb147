"""
The columns of a cache: which are there, which of them serves what is asked for, and their rows beside the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.store.format.columns import Column, Spec, column_name, covers, cut
from fpo.store.format.encoding import ColumnRows
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import Invalid, check_beside
from fpo.store.format.key import FORMAT_VERSION, cache_key, is_key
from fpo.store.format.manifest import (
    COLUMNS,
    MANIFEST,
    MAX_RECIPE_BYTES,
    RECIPE,
    REPAIR_SHARD,
    ColumnFacts,
    parse_recipe,
    recipe_facts,
    shard_name,
)
from fpo.store.format.plan import shards_within
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.sealed import Sealed
from fpo.store.shards import fetch_parsed

MAX_COLUMNS = 256
"""Of one cache: more are not listed."""


def column_recipe(base: str, spec: Spec, shard_groups: Sequence[int]) -> dict[str, object]:
    """The recipe.json of the column `spec` beside the cache `base`, whose shards hold so many groups."""
    return {"format": FORMAT_VERSION, "base": base, "column": spec, "shard_groups": list(shard_groups)}


def column_keys(folder: Objects) -> list[str]:
    """The columns beside the cache in `folder`, complete or not, sorted."""
    return [name for name in folder.names(COLUMNS) if is_key(name)][:MAX_COLUMNS]


def column_facts(folder: Objects, base: str, key: str) -> ColumnFacts:
    """What the recipe of a column says. Raises CacheDamaged for one that does not belong to this base."""
    place = folder.inside(f"{COLUMNS}/{key}")

    def parse(data: bytes) -> ColumnFacts:
        facts = recipe_facts(parse_recipe(data, key, place.where(RECIPE)))
        if not isinstance(facts, ColumnFacts) or facts.base != base:
            raise CacheDamaged(f"{place.where(RECIPE)} is no column of cache {base[:12]}; remove {place.where('')}")
        return facts

    return fetch_parsed(place, RECIPE, MAX_RECIPE_BYTES, parse)[1]


@dataclass(frozen=True)
class HeldColumn:
    """A complete column, as its recipe says."""

    key: str
    spec: Spec


def held_columns(folder: Objects, base: str, shard_groups: Sequence[int], wanted: Sequence[Spec]) -> list[HeldColumn]:
    """
    The complete columns beside a cache, sorted by key; on a server without a listing, those of exactly the `wanted`
    specs that are cut as the base is. What cannot be read is left out: `verify` tells.
    """
    if isinstance(folder, RemoteObjects) and not folder.listable:
        keys = [cache_key(column_recipe(base, spec, shard_groups)) for spec in wanted]
    else:
        keys = column_keys(folder)
    return list(_complete(folder, base, keys))


def _complete(folder: Objects, base: str, keys: Sequence[str]) -> Iterator[HeldColumn]:
    for key in keys:
        try:
            if folder.inside(f"{COLUMNS}/{key}").sizes([MANIFEST]):
                yield HeldColumn(key, column_facts(folder, base, key).spec)
        except CacheError:
            continue


def serving(held: Sequence[HeldColumn], spec: Spec) -> HeldColumn | None:
    """The column that covers `spec` with the least beyond it; None where none does."""
    fitting = [column for column in held if covers(column.spec, spec)]
    return min(fitting, key=lambda column: (column.spec != spec, _excess(column.spec), column.key), default=None)


def _excess(spec: Spec) -> float:
    return float("inf") if spec.get("top_k") == "all" else float(spec.get("top_k", 0) + spec.get("m", 0))


class OpenColumn:
    """A complete column beside its base, read as the spec that was asked for."""

    def __init__(self, folder: Objects, held: HeldColumn, wanted: Spec, shard_groups: Sequence[int]) -> None:
        """
        folder: of the column. shard_groups: of the base.

        Raises as `Sealed` does, CacheDamaged also where its shards are not cut from the base's.
        """
        self.sealed = Sealed(folder, held.key)
        self.held, self.wanted = held.spec, wanted
        within = shards_within(shard_groups, self.sealed.facts.shard_groups)
        if within is None:
            raise cut_elsewhere(folder)
        self.within = within
        """Its shards within each of the base's."""

    def names(self, sid: int) -> list[str]:
        """The shard files that hold the groups of shard `sid` of the base."""
        return [shard_name(own) for own in self.within[sid]]

    def rows(self, groups: Groups, sid: int) -> Column:
        """The rows of these groups, shard `sid` of the base. Raises CacheDamaged where they are rows of others."""
        parts = [self.sealed.shard(own) for own in self.within[sid]]
        found = [part for part in parts if isinstance(part, ColumnRows)]
        return cut(joined_beside(self.sealed.folder.where(""), found, groups), self.held, self.wanted)


def cut_elsewhere(folder: Objects) -> CacheDamaged:
    """A column whose shards do not lie within those of its base."""
    return CacheDamaged(f"{folder.where(RECIPE)}: its shards are not cut from the base's; remove the column")


def joined_beside(where: str, parts: Sequence[ColumnRows], groups: Groups) -> Column:
    """The rows of a column's shards, all that belong to one shard of the base. CacheDamaged where others' are there."""
    column = type(parts[0].column).concat([part.column for part in parts])
    try:
        if not np.array_equal(np.concatenate([part.group_id for part in parts]), groups.group_id):
            raise Invalid("it holds other groups than the base")
        check_beside(column, groups)
    except Invalid as error:
        raise CacheDamaged(f"{where} is damaged: {error}; {REPAIR_SHARD}") from None
    return column


def lacks(where: str, spec: Spec) -> CacheMissing:
    """A base without a column: how to add it."""
    return CacheMissing(
        f"{where} has no column of {column_name(spec)} [{_short(spec)}]; add it with: fpo cache RECIPE "
        "(the base stays, one pass for the column)"
    )


def _short(spec: Spec) -> str:
    sae = spec.get("sae")
    weights = sae.get("weights") if isinstance(sae, dict) else None
    return str(weights)[:8] if weights else cache_key({"column": spec})[:8]
