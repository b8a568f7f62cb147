"""
Why two caches are not one: the fields of their recipes that differ, by dotted name, with both values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo.store.files import printable
from fpo.store.format.key import cache_key
from fpo.store.format.manifest import MAX_RECIPE_BYTES, RECIPE, parse_recipe
from fpo.store.local import Store
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.summaries import Summary

ABSENT = "-"

_MEANING = {
    "scorer.reference.weights": "other weights",
    "scorer.reference.dtype": "computed in another precision",
    "groups.digest": "other tokens or labels: data, split, tokenizer, chat template, max_length or scores differ",
    "groups.score_mask": "other tokens count",
    "groups.seed": "the same groups in another order",
    "groups.shard_groups": "cut into other shards",
}


@dataclass(frozen=True)
class Difference:
    """One field. A value is as JSON shows it, "-" where the field is absent."""

    field: str
    """scorer.reference.dtype"""
    here: str
    there: str
    meaning: str = ""
    """In words, where the name of the field does not say it."""

    def __str__(self) -> str:
        meaning = f"  ({self.meaning})" if self.meaning else ""
        return printable(f"{self.field}: {_short(self.here)} -> {_short(self.there)}{meaning}", 1000)


@dataclass(frozen=True)
class DiffReport:
    """What `diff` says about two caches."""

    here: str
    """Key of the first."""
    there: str
    recipe: tuple[Difference, ...]
    """What makes the keys differ; empty for one and the same cache."""
    inputs: tuple[Difference, ...]
    """The names behind the digests, as the makers wrote them down; decides nothing."""
    only_here: tuple[str, ...] = ()
    """Complete columns that the first has and the second lacks, in words: they decide nothing either."""
    only_there: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nearest:
    """The cache that comes closest to a recipe which no cache here fits."""

    summary: Summary
    differences: tuple[Difference, ...]
    """From the cache to the recipe."""
    inputs: tuple[Difference, ...] = ()
    """The names behind the digests, where the cache's maker wrote them down: what a digest of tokens cannot say."""

    @property
    def key(self) -> str:
        return self.summary.key

    def lines(self, most: int = 5) -> list[str]:
        """For people: the fields that differ, and of what the groups were made."""
        said = [str(difference) for difference in self.differences[:most]]
        if any(difference.field == "groups.digest" for difference in self.differences):
            said += [f"made from {difference}" for difference in self.inputs[:most]]
        return said


def diff(store: Store | RemoteStore | Path | str, here: str, there: str) -> DiffReport:
    """Compare two caches of a store, finished or not, and which columns stand beside one alone. Raises CacheError."""
    store = open_store(store)
    a, b = _summary(store, here), _summary(store, there)
    return DiffReport(
        a.key,
        b.key,
        differences(_recipe(store, a.key), _recipe(store, b.key)),
        differences(a.inputs, b.inputs),
        _lacking(a, b),
        _lacking(b, a),
    )


def nearest(
    store: Store | RemoteStore | Path | str, recipe: dict[str, Any], inputs: dict[str, Any] | None = None
) -> Nearest | None:
    """
    The cache with the fewest fields that differ from a recipe ({"format", "scorer", "groups"}), then with the fewest
    names that do, finished ones and then the youngest first among equals; None where the store holds none but the
    recipe's own.

    inputs: the names that the recipe has for what it is made from, see `describe`.
    """
    store = open_store(store)
    own = cache_key(recipe)
    found = [
        Nearest(
            summary,
            differences(summary.recipe, recipe),
            differences(summary.inputs, inputs) if inputs and summary.inputs else (),
        )
        for summary in store.summaries()
        if summary.problem is None and summary.key != own
    ]
    # Another digest is one field whether a row differs or all do: the names behind it tell which it is.
    rank = [
        (len(one.differences), len(one.inputs), not one.summary.complete, -one.summary.created.timestamp())
        for one in found
    ]
    return found[rank.index(min(rank))] if found else None


def differences(here: dict[str, Any], there: dict[str, Any]) -> tuple[Difference, ...]:
    """The fields of two JSON objects that differ, sorted by name."""
    a, b = dict(_leaves(here, "")), dict(_leaves(there, ""))
    return tuple(
        Difference(field, a.get(field, ABSENT), b.get(field, ABSENT), _MEANING.get(field, ""))
        for field in sorted(a.keys() | b.keys())
        if a.get(field) != b.get(field)
    )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names with their values as JSON; a list without objects inside is one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for n, item in enumerate(value):
            yield from _leaves(item, f"{name}[{n}]")
    elif name:
        yield name, json.dumps(value, ensure_ascii=False)


def _lacking(here: Summary, there: Summary) -> tuple[str, ...]:
    """Complete columns that only the first has, whatever their keys, which name the base."""
    specs = [column.spec for column in there.columns if column.complete]
    return tuple(column.label for column in here.columns if column.complete and column.spec not in specs)


def _summary(store: Store | RemoteStore, name: str) -> Summary:
    if isinstance(store, Store):
        return store.summary(name)
    key = store.resolve(name)
    return next(summary for summary in store.summaries() if summary.key == key)


def _recipe(store: Store | RemoteStore, key: str) -> dict[str, Any]:
    folder = store.folder(key)
    return parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE))


def _short(value: str, width: int = 48) -> str:
    """A digest by its first digits, a long list by its beginning."""
    text = value.strip('"')
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return value if len(value) <= width else f"{value[: width - 3]}..."
