"""`fpo align` with several values for a field: a run for each, from one cache, and a table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fpo.commands.caches import sweep_cache
from fpo.commands.options import command_line
from fpo.commands.reports import align_facts, cache_lines, column_lines, print_table
from fpo.errors import FpoError, RunInterrupted
from fpo.interrupts import exit_code, interruptible
from fpo.progress import duration, say

if TYPE_CHECKING:
    from fpo.recipe import Variant
    from fpo.stage2_align import AlignReport
    from fpo.store import Cache


class _Outcome(NamedTuple):
    """What became of one run."""

    variant: Variant
    run: Path
    report: AlignReport | None
    """None where it failed."""
    error: str = ""

    @property
    def state(self) -> str:
        if self.report is None:
            return "failed"
        return "finished before" if self.report.layout is None else "trained"


def align_sweep(
    recipe: Path,
    store: str | None,
    output: Path | None,
    overrides: list[str] | None,
    variants: Sequence[Variant],
    as_json: bool,
) -> None:
    """
    Train what is not finished of the variants, each in its folder below `output`; FpoError where one of them failed,
    when all were tried.
    """
    from fpo.recipe import reads_held_out
    from fpo.stage2_align import check_sweep

    folder = output or Path("runs") / f"{recipe.stem}-sweep"
    check_sweep([variant.recipe for variant in variants], folder)
    again = f"{command_line('align', recipe, store, overrides)} --output {shlex.quote(str(folder))}"
    outcomes: list[_Outcome] = []
    columns: list[str] = []
    with interruptible(f"continue with: {again}"):
        cache, held_out = sweep_cache(variants, recipe, store), None
        evaluated = [variant for variant in variants if reads_held_out(variant.recipe)]
        if evaluated:
            held_out = sweep_cache(evaluated, recipe, store, held_out=True)
        for number, variant in enumerate(variants, 1):
            say(f"run {number} of {len(variants)}: {_said(variant)}")
            outcomes.append(_outcome(variant, cache, held_out, folder / variant.name, again))
            columns += [line for line in column_lines(cache) if line not in columns]
    if as_json:
        print(json.dumps([_facts(outcome) for outcome in outcomes], indent=2))
    else:
        print(f"runs        {folder}")
        print("\n".join([*cache_lines(cache), *columns, ""]))
        _print_outcomes(outcomes)
    failed = [outcome.variant.name for outcome in outcomes if outcome.report is None]
    if failed:
        raise FpoError(f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}")


def _outcome(variant: Variant, cache: Cache, held_out: Cache | None, run: Path, again: str) -> _Outcome:
    from fpo.recipe import reads_held_out
    from fpo.stage1_cache import read_beside
    from fpo.stage2_align import align_in_turn

    own = held_out if reads_held_out(variant.recipe) else None
    try:
        for one in filter(None, (cache, own)):
            read_beside(one, variant.recipe)
        return _Outcome(variant, run, align_in_turn(variant.recipe, cache, run, own))
    except RunInterrupted as error:
        print(f"{error}; continue with: {again}", file=sys.stderr)
        sys.exit(exit_code(error.signum))
    except FpoError as error:
        # Its text alone: a traceback would keep the model.
        say(f"failed: {error}")
        return _Outcome(variant, run, None, str(error))


def _said(variant: Variant) -> str:
    return " ".join(f"{field}={value}" for field, value in variant.swept.items())


def _facts(outcome: _Outcome) -> dict[str, Any]:
    facts = {"run": str(outcome.run), "set": outcome.variant.values, "state": outcome.state}
    if outcome.report is None:
        return {**facts, "error": outcome.error}
    return {**facts, **align_facts(outcome.report), "first": outcome.report.first}


def _print_outcomes(outcomes: Sequence[_Outcome]) -> None:
    names = ["first loss", "last loss", "rewards/accuracies", "rewards/margins", "time", ""]
    print_table([*outcomes[0].variant.swept, *names], [_row(outcome) for outcome in outcomes])


def _row(outcome: _Outcome) -> list[str]:
    values, report = list(outcome.variant.swept.values()), outcome.report
    if report is None:
        return [*values, *["-"] * 5, f"failed: {_short(outcome)}"]
    numbers = [report.first.get("loss"), *map(report.last.get, ("loss", "rewards/accuracies", "rewards/margins"))]
    figures = ["-" if number is None else f"{number:.4g}" for number in numbers]
    return [*values, *figures, duration(report.seconds), "" if outcome.state == "trained" else outcome.state]


def _short(outcome: _Outcome) -> str:
    """The first line of what went wrong, without the run, whose row it stands in."""
    return outcome.error.splitlines()[0].removeprefix(f"{outcome.run}: ")
