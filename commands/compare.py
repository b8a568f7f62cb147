"""`fpo compare`: runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson
from fpo.commands.wording import terminal_width


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of fpo align.", metavar="RUN...")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with figures.", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs in one table: where their recipes differ, what they came to on held-out pairs, what they cost."""
    quiet_libraries()
    from fpo.commands.comparison_page import comparison_page, runs_table
    from fpo.evaluation.compare import compare

    comparison = compare(runs, with_curves=as_json or html is not None)
    if html is not None:
        comparison_page(comparison).save(html)
    if as_json:
        print(json.dumps(comparison.facts(), indent=2))
        return
    notes = [
        *(f"note        {note}" for note in comparison.notes),
        *([f"page        {html}"] if html is not None else []),
    ]
    print("\n".join([runs_table(comparison).text(terminal_width()), *([""] if notes else []), *notes]))
