"""What is wrong with a recipe, in a line per field: field, value and the nearest valid name."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import ValidationError

from fpo.nearest import nearest
from fpo.objectives import OBJECTIVES, FeatureTerm
from fpo.objectives.trl_names import LOSSES
from fpo.recipe.experiment import Recipe
from fpo.section import Section

_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def explanations(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """One line per field that is wrong."""
    lines: dict[str, str] = {}
    for item in error.errors():
        # The alternatives of a union stand in the location as parts of their own, and each has its own complaint:
        # for text it is the one about names that helps, for the rest the one about types.
        *outer, last = item["loc"] or ("",)
        unknown = item["type"] == "extra_forbidden"  # the last part is what the user wrote, whatever it looks like
        parts = [p for p in (outer if unknown else [*outer, last]) if isinstance(p, int) or _NAME.fullmatch(p)]
        location = [part for part in parts if part not in OBJECTIVES] + ([last] if unknown else [])
        field = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in location))
        if field not in lines or (item["type"] == "literal_error" and isinstance(item["input"], str)):
            lines[field] = _explain(item, field, location, raw)
    return list(lines.values())


def _explain(error: Any, field: str, location: list[Any], raw: dict[str, Any]) -> str:
    """Field, value and nearest valid name of one pydantic error."""
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        valid = _fields_at(location[:-1], raw)
        if len(location) == 2 and location[0] == "objective" and (owner := _objective_with(str(location[-1]))):
            name = raw["objective"].get("name")
            if location[-1] == "features" and issubclass(OBJECTIVES[name], FeatureTerm):
                return f"{field}: {name} has the fields of a feature term as its own, objective.alpha and the rest"
            return (
                f"{field}: {name} has no such field, {owner} has; another objective is given whole: "
                f"--set 'objective={{name: {name}}}'"
            )
        near = nearest(str(location[-1]), valid)
        return f"{field}: no such field; " + (f"nearest is {near}" if near else f"valid are {', '.join(valid)}")
    if kind == "missing":
        return f"{field}: this field is required"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        valid = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected_tags", ""))) or list(OBJECTIVES)
        if str(name) in LOSSES:
            return f"{field}.name: {name}: {LOSSES[str(name)]}; valid are {', '.join(valid)}"
        if str(name) in OBJECTIVES:
            return (
                f"{field}.name: {name} is no loss over pairs, of which a mixture is made; valid are {', '.join(valid)}"
            )
        near = nearest(str(name), valid) or ", ".join(valid)
        return f"{field}.name: {name!r} is no objective; nearest is {near}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
        near = nearest(str(value), valid) or ", ".join(valid)
        return f"{field}: {value!r} is not valid; nearest is {near}"
    message = error["msg"].replace("Input should be", "must be").replace("Input", "it")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be a mapping of fields"
    elif kind in ("tuple_type", "list_type"):
        message = "must be a list"
    return f"{field}: {message}, not {value!r}"


def _objective_with(field: str) -> str | None:
    """An objective that has this field."""
    return next((name for name, model in OBJECTIVES.items() if field in model.model_fields), None)


def _fields_at(location: list[Any], raw: dict[str, Any]) -> list[str]:
    """Names of the fields that the section at `location` has."""
    model: Any = Recipe
    written: Any = raw
    for part in location:
        written = written[part]
        if isinstance(part, str):
            model = model.model_fields[part].annotation
        # One of several objectives, by the name that stands there.
        named = isinstance(written, dict) and "name" in written
        kind = OBJECTIVES.get(str(written["name"])) if named else None
        model = kind or (model if isinstance(written, list) else _section_type(model))
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[Section] | None:
    """The first Section inside an annotation such as `tuple[Feature, ...]` or `Lora | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_type, get_args(annotation))), None)
