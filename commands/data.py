"""`fpo data`: what stage 1 would score, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, Overrides, RecipePath

if TYPE_CHECKING:
    from fpo.stage1_cache.drops import DropReport


def data_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with figures.", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """What the recipe's data holds: rows kept and dropped, with reasons and numbers, lengths and score margins."""
    from fpo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from fpo.stage1_cache import look_at_data

    reports = look_at_data(loaded)
    if html is not None:
        from fpo.commands.data_page import data_page

        data_page(recipe.stem, reports).save(html)
    if as_json:
        print(json.dumps([report.facts() for report in reports], indent=2))
        return
    for report in reports:
        print("\n".join([report.split, *(f"  {line}" for line in data_lines(report.drops, report.trained_on))]))
    if html is not None:
        print(f"page        {html}")


def data_lines(drops: DropReport, trained_on: int) -> list[str]:
    """Rows, where the prompts come from, and how long everything is; trained_on: as of a `SplitReport`."""
    lines = [f"{'data' if number == 0 else '':<12}{line.strip()}" for number, line in enumerate(drops.lines())]
    if trained_on:
        shared = f"noted {trained_on:,}: the training split holds them too, so they are not held out"
        lines.append(f"{'':<12}{shared}")
    lines.append(f"prompt      {drops.prompt_line()}")
    for number, (name, spread) in enumerate(drops.lengths().items()):
        lines.append(f"{'' if number else 'tokens':<12}{name} {spread.line()}")
    if margin := drops.spreads.get("score margin"):
        lines.append(f"{'scores':<12}margin {margin.line()}")
    return lines
