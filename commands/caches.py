"""Which store a command means, and which cache in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fpo.commands.options import command_line
from fpo.errors import CacheIncomplete, CacheMissing, FpoError

if TYPE_CHECKING:
    from fpo.recipe import Recipe, Variant
    from fpo.store import Cache


def store_root(option: str | None) -> str:
    """--store, else $FPO_STORE, else ~/.cache/fpo."""
    from fpo.store import default_store

    return option or str(default_store())


def existing_root(option: str | None) -> str:
    """`store_root`; a folder that was named and is not there is an error, not an empty store."""
    from fpo.store import is_url

    root = store_root(option)
    named = option or os.environ.get("FPO_STORE")
    if named and not is_url(root) and not Path(root).expanduser().exists():
        raise FpoError(f"there is no folder {root}; check --store and FPO_STORE, or make one with: fpo cache RECIPE")
    return root


def recipe_cache(
    recipe: Recipe, path: Path, store: str | None, overrides: list[str] | None, *, held_out: bool = False
) -> Cache:
    """The recipe's cache; where it is missing, how to build it."""
    from fpo.stage1_cache import find_cache

    with _how_to_build(path, store, overrides):
        return find_cache(recipe, store_root(store or recipe.cache.store), held_out=held_out)


def sweep_cache(variants: Sequence[Variant], path: Path, store: str | None, *, held_out: bool = False) -> Cache:
    """The one cache of a sweep, which has the columns of all its recipes."""
    from fpo.stage1_cache import read_beside

    cache = recipe_cache(variants[0].recipe, path, store, variants[0].overrides, held_out=held_out)
    for variant in variants[1:]:
        with _how_to_build(path, store, variant.overrides):
            read_beside(cache, variant.recipe)
    return cache


@contextmanager
def _how_to_build(path: Path, store: str | None, overrides: list[str] | None) -> Iterator[None]:
    """Adds the command that builds what is missing."""
    try:
        yield
    except (CacheMissing, CacheIncomplete) as error:
        command, said = command_line("cache", path, store, overrides), str(error)
        if "fpo cache RECIPE" in said:  # the store's own advice, with the recipe's name in it
            raise type(error)(said.replace("fpo cache RECIPE", command)) from None
        raise type(error)(f"{said}\n  build it with: {command}") from None
