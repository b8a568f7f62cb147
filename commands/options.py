"""Arguments and options that several commands take, and the command line that gives them again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set objective.alpha=1.", metavar="FIELD=VALUE"),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or URL of caches (s3, gs, az, hf, https); else $FPO_STORE, else ~/.cache/fpo"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def command_line(name: str, recipe: Path, store: str | None, overrides: list[str] | None) -> str:
    """A command line for the same recipe, store and overrides."""
    options = ["--store", store] if store else []
    for override in overrides or []:
        options += ["--set", override]
    return shlex.join(["fpo", name, str(recipe), *options])
