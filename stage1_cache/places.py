"""Where SAEs read: every name of a place that a recipe may use becomes a module path of its reference."""

from __future__ import annotations

from typing import Any

from fpo.errors import ModelError, RecipeError
from fpo.recipe import Feature, Recipe, validate_recipe
from fpo.scoring import model_config, model_folder
from fpo.scoring.hook_names import in_our_words
from fpo.scoring.hookpoints import check_hookpoint
from fpo.scoring.sae import sae_facts


def with_module_paths(recipe: Recipe) -> Recipe:
    """
    The recipe with its hookpoints as module paths: translated where they are another library's names, and taken from
    the SAE's files where they are left out.

    Raises RecipeError for a place that the reference cannot have, or that nobody names; ModelError, SaeError for files
    that cannot be read.
    """
    if not recipe.features:
        return recipe
    reference = recipe.reference
    config = model_config(model_folder(reference.model, reference.revision)).to_dict()
    found = [_module_path(feature, index, config) for index, feature in enumerate(recipe.features)]
    if found == [feature.hookpoint for feature in recipe.features]:
        return recipe
    meant = {feature.hookpoint: path for feature, path in zip(recipe.features, found, strict=True)}
    raw = recipe.model_dump(mode="json")
    for entry, path in zip(raw["features"], found, strict=True):
        entry["hookpoint"] = path
    for term in (raw["objective"], raw["objective"].get("features")):
        if term and term.get("hookpoints"):
            term["hookpoints"] = [meant[name] for name in term["hookpoints"]]
    return validate_recipe(raw, "features")


def _module_path(feature: Feature, index: int, config: dict[str, Any]) -> str:
    field = f"features[{index}].hookpoint"
    name = feature.hookpoint or sae_facts(feature.sae).hook_hint
    if not name:
        raise RecipeError(f"{field}: the files of {feature.sae} do not say where it reads; name the module")
    path = in_our_words(name, str(config.get("model_type", "")))
    try:
        check_hookpoint(config, path)
    except ModelError as error:
        raise RecipeError(f"{field}: {error}") from None
    return path
