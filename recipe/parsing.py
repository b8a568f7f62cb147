"""YAML as recipes have it, and lists of values as `--set` has them."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fpo.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `5e-7` is a number and a repeated key is an error; there are no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            # Ten lines of them, each naming the line above ten times, are ten billion values.
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"`*{event.anchor}` is an alias, which recipes do not have; write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", own[number].start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # 2026-99-99, !!int five
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"`{node.value}` is no {kind}; for text, write it in quotes", node.start_mark
            ) from None


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text: a commit may be called 12e4567."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def write_yaml(value: Any, **how: Any) -> str:
    """What `parse_yaml` reads as this value; `how` as PyYAML takes it."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, **how)
    return text


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML; RecipeError with line and column where it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{origin}: {where}{error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{origin}: line {line}: the character {chr(error.character)!r} is not allowed") from None
    except RecursionError:
        raise RecipeError(f"{origin}: it is nested too deeply for a recipe") from None


# Quotes count where a scalar begins, as in YAML: the apostrophe of `it's` is a letter.
_PIECE = re.compile(r"""(?<![^\s,\[{:])(?:"(?:\\.|[^"\\])*"|'(?:''|[^'])*')|.""", re.DOTALL)


def split_values(text: str) -> list[str]:
    """The values between the commas that stand outside brackets and quotes."""
    values, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth = max(depth + (piece in "[{") - (piece in "]}"), 0)
        if piece == "," and depth == 0:
            values.append("")
        else:
            values[-1] += piece
    return [value.strip() for value in values] if len(values) > 1 else [text]
