"""`fpo schema`: what a recipe may say, for editors."""

from __future__ import annotations

import json


def schema_command() -> None:
    """
    The JSON schema of recipes, for editors: save it as recipe.schema.json, and a recipe with the line
    `# yaml-language-server: $schema=recipe.schema.json` is completed and checked as it is written.
    """
    from fpo.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
