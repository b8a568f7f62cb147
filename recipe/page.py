"""What a recipe may say, printed from the definitions: docs/recipe.md, and the JSON schema for editors."""

from __future__ import annotations

import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fpo.objectives import OBJECTIVES, FeatureTerm
from fpo.recipe.experiment import Recipe
from fpo.recipe.sections import (
    CacheOptions,
    Data,
    Feature,
    Filter,
    Generate,
    Lora,
    Policy,
    Prompt,
    Reference,
    Source,
    Transform,
)
from fpo.recipe.training import OWNED_ARGUMENTS, PUBLISHING_ARGUMENTS, training_fields
from fpo.section import Section

_PAGE = (
    "Paths are relative to the folder in which a command is given, not to the recipe. `--set` overrides a field for",
    "one command, with its value in YAML: `--set objective.alpha=1`, `--set features.0.top_k=all`. An objective of",
    "another name has other fields, so it is set as a whole: `--set 'objective={name: dpo, beta: 0.1}'`.",
    "",
    "Under `fpo align`, commas separate values, and each trains a run of its own: `--set objective.alpha=0.1,0.5,1`,",
    "`--set 'objective={name: dpo},{name: simpo}'` ([runs.md](runs.md)). Inside brackets and quotes they do not, so a",
    "text that holds a comma goes in quotes: `--set 'data.source=\"a,b.jsonl\"'`.",
)


def reference_page() -> str:
    """docs/recipe.md: every section and field with type, default and documentation, from the definitions above."""
    lines = ["# The recipe", "", "<!-- written by `make docs` from recipe/ and objectives/ -->", ""]
    lines += [Recipe.__doc__ or "", "", *_PAGE]
    sections: list[tuple[str, type[Section]]] = [
        ("", Recipe),
        ("reference", Reference),
        ("features[]", Feature),
        ("data", Data),
        ("data.source[]", Source),
        ("data.transform", Transform),
        ("data.filter", Filter),
        ("cache", CacheOptions),
        ("policy", Policy),
        ("policy.lora", Lora),
        ("policy.prompt", Prompt),
        ("generate", Generate),
        *((f"objective ({name})", kind) for name, kind in OBJECTIVES.items()),
        ("objective.features", FeatureTerm),
    ]
    for name, section in sections:
        if name:
            lines += ["", f"## {name}", "", section.__doc__ or ""]
        lines += ["", "| field | type | default | meaning |", "|---|---|---|---|"]
        for field, info in section.model_fields.items():
            shape = "section" if name == "" and field != "training" else _type_name(info.annotation)
            default = "required" if info.is_required() else "" if name == "" else f"`{json.dumps(info.default)}`"
            meaning = " ".join((info.description or "").split())
            lines.append(f"| `{field}` | {shape} | {default} | {meaning} |")
    lines += ["", "## training", "", "Not set here, since the pipeline sets them or has no use for them:", ""]
    lines += ["| argument | instead |", "|---|---|"]
    lines += [f"| `{name}` | {instead} |" for name, instead in OWNED_ARGUMENTS.items()]
    only = ", ".join(f"`{name}`" for name in PUBLISHING_ARGUMENTS)
    lines += ["", f"From the command line alone (`--set`), since a recipe may be a stranger's: {only}."]
    return "\n".join(lines) + "\n"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(annotation))
    if annotation is type(None):
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, "list" if get_origin(annotation) in (list, tuple) else "mapping")


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe's file, with the documentation of every field; of `training` it knows the names."""
    schema = Recipe.model_json_schema()
    ours = (*OWNED_ARGUMENTS, *PUBLISHING_ARGUMENTS)
    names: dict[str, Any] = {name: {} for name in training_fields() if name not in ours}
    schema["properties"]["training"] |= {"properties": names, "additionalProperties": False}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
