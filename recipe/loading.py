"""A recipe from its file, overridden and checked; and back into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fpo.errors import RecipeError
from fpo.nearest import nearest
from fpo.recipe.evaluation import check_evaluation
from fpo.recipe.experiment import Recipe
from fpo.recipe.explanations import explanations
from fpo.recipe.parsing import parse_yaml, split_values, write_yaml
from fpo.recipe.training import PUBLISHING_ARGUMENTS, check_publishing, check_training


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """
    Read, override and validate a recipe.

    path       the YAML file
    overrides  `section.field=value` strings, the value in YAML; several are for `load_variants`
    Raises RecipeError naming the field, the value and the nearest valid name.
    """
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = nearest(path.name, [p.name for p in folder.glob("*.y*ml")])
        hint = f"; nearest is {folder / near}" if near else ""
        raise RecipeError(f"{path}: no such recipe{hint}")
    raw = parse_yaml(_text(path), str(path))
    if raw is None:
        raise RecipeError(f"{path}: the recipe is empty; it needs reference and data at least (docs/recipe.md)")
    if not isinstance(raw, dict):
        kind = "a list" if isinstance(raw, list) else "plain text" if isinstance(raw, str) else f"the value {raw!r}"
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {kind}")
    if raw.get("training", {}) is None:
        raw["training"] = {}  # `training:` with nothing under it
    check_publishing(raw, str(path))
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_recipe(raw, str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}: line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None


def validate_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """A Recipe from plain data; `origin` stands at the start of error messages."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "\n  ".join(explanations(error, raw))) from None
    check_training(recipe.training, origin)
    check_evaluation(recipe, origin)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field, defaults included, but for what a file may not hold."""
    raw = recipe.model_dump(mode="json")
    raw["training"] = {name: value for name, value in raw["training"].items() if name not in PUBLISHING_ARGUMENTS}
    return write_yaml(raw, allow_unicode=True)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as section.field=value")
    if len(split_values(value)) > 1:
        raise RecipeError(
            f"--set {override}: several values are a sweep, which fpo align alone trains; a text that holds a comma "
            f"goes in quotes: --set '{path}=\"{value}\"'"
        )
    target: Any = raw
    *parents, last = path.split(".")
    for name in parents:
        if isinstance(target, list):
            target = target[_position(name, target, override)]
        else:
            if target.get(name) is None:
                target[name] = {}
            target = target[name]
        if not isinstance(target, dict | list):
            raise RecipeError(f"--set {override}: {name} has no fields")
    parsed = parse_yaml(value, f"--set {override}")
    if isinstance(target, list):
        target[_position(last, target, override)] = parsed
    else:
        target[last] = parsed


def _position(name: str, items: list[Any], override: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise RecipeError(f"--set {override}: {name} is not one of the {len(items)} entries, counted from 0")
    return int(name)
