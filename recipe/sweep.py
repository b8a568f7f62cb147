"""
Several values for a field: `--set objective.alpha=0.1,0.5,1` is three recipes, and two such fields are their product.

Commas inside brackets and quotes separate nothing, so YAML's own lists and mappings stay one value.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fpo.errors import RecipeError
from fpo.recipe.experiment import Recipe
from fpo.recipe.loading import load_recipe
from fpo.recipe.parsing import parse_yaml, split_values

# They say which groups the cache holds and who scored them; features are columns beside it, each with a key of its own.
_OF_THE_CACHE = ("reference", "data", "cache")
# File systems end a name at 255 bytes.
_NAME_LENGTH = 200


class Variant(NamedTuple):
    """One recipe of a sweep."""

    overrides: list[str]
    """What it overrides, one value for every field."""
    swept: dict[str, str]
    """The fields that have several values in the sweep, and this one's, as it was written."""
    recipe: Recipe

    @property
    def values(self) -> dict[str, Any]:
        """`swept`, as YAML reads it."""
        return {field: parse_yaml(text, f"--set {field}") for field, text in self.swept.items()}

    @property
    def name(self) -> str:
        """
        Of its run's folder: `objective.alpha=0.5__training.learning_rate=5e-7`. One value has one name, however it was
        written; what is no letter, digit, dot, dash or underscore is a dash.
        """
        name = "__".join(f"{_spelled(field)}={_spelled(value)}" for field, value in self.values.items())
        if len(name) <= _NAME_LENGTH:
            return name
        return f"{name[: _NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def load_variants(path: Path, overrides: list[str] | None = None) -> list[Variant]:
    """
    The recipes that overrides with several values ask for, the last field's values changing fastest; without such one
    recipe. All read the same cache, beside it maybe other columns.

    Raises RecipeError, also where two of them would be one run or need another cache.
    """
    given = [(override, _values(override)) for override in overrides or []]
    swept = {override.partition("=")[0] for override, values in given if len(values) > 1}
    variants = []
    for chosen in itertools.product(*(values for _, values in given)):
        settings = dict(override.split("=", 1) for override in chosen if override.partition("=")[0] in swept)
        variants.append(Variant(list(chosen), settings, load_recipe(path, list(chosen))))
    _check_names(variants)
    for field in swept:
        _check_cache(field, variants)
    return variants


def _values(override: str) -> list[str]:
    """An override for each of its values."""
    field, _, text = override.partition("=")
    values = split_values(text)
    if len(values) == 1:
        return [override]
    if "" in values:
        raise RecipeError(f"--set {override}: a value between the commas is empty; where none is meant, write null")
    return [f"{field}={value}" for value in values]


def _check_names(variants: list[Variant]) -> None:
    """File systems that do not tell capitals from small letters are met too."""
    counts = Counter(variant.name.lower() for variant in variants)
    twice = next((variant.name for variant in variants if counts[variant.name.lower()] > 1), None)
    if twice is not None:
        raise RecipeError(
            f"--set: two runs of this sweep would be one, {twice}; give every value once, and values that differ in "
            "letters or digits"
        )


def _check_cache(field: str, variants: list[Variant]) -> None:
    section = field.partition(".")[0]
    if section in _OF_THE_CACHE and any(
        _of_the_cache(variant.recipe, section) != _of_the_cache(variants[0].recipe, section) for variant in variants
    ):
        values = ", ".join(dict.fromkeys(variant.swept[field] for variant in variants))
        raise RecipeError(
            f"--set {field}: a sweep trains from one cache, and {values} need several; build and train each by itself: "
            f"fpo cache and fpo align with --set {field}={variants[0].swept[field]}"
        )


def _of_the_cache(recipe: Recipe, section: str) -> Any:
    # What is left out of training stands in the cache.
    return recipe.data.model_copy(update={"filter": None}) if section == "data" else getattr(recipe, section)


def _spelled(value: Any) -> str:
    """A value as a part of a file's name."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        short = f"{value:g}"
        text = short if float(short) == value else repr(value).removesuffix(".0")
        return re.sub(r"e\+?(-?)0*", r"e\1", text)  # 5e-07 and 1e+09 are 5e-7 and 1e9
    if isinstance(value, dict):
        return "-".join(f"{_spelled(name)}-{_spelled(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "-".join(map(_spelled, value))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-")
