"""A comparison of runs as a table and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpo.commands.wording import size
from fpo.progress import duration
from fpo.report import Bar, Bars, Column, Figure, Item, Line, Page, Point, Scatter, Section, Series, Table

if TYPE_CHECKING:
    from fpo.evaluation.compare import ComparedRun, Comparison, Estimate

ACCURACY = "held-out pairs whose chosen completion has the larger implicit reward"
MEASURES = {
    "accuracy": Column("accuracy", "reward accuracy", ".3f", about=ACCURACY),
    "kl": Column("kl", "KL", ".2f", about="to the reference, nats per completion, on the policy's own samples"),
    "both_fall": Column(
        "both_fall", "both fall", ".1%", about="held-out pairs both of whose completions lost likelihood"
    ),
    "chosen_moves": Column("chosen_moves", "chosen moves", "+.2f", about="log-probability, nats per completion"),
    "rejected_moves": Column("rejected_moves", "rejected moves", "+.2f", about="log-probability, nats per completion"),
    "distance_chosen": Column(
        "distance_chosen", "drift, chosen", ".2e", about="distance of the features to the reference's"
    ),
    "distance_rejected": Column("distance_rejected", "drift, rejected", ".2e", about="as on chosen completions"),
}
"""How a measure is shown, in this order; those that no run knows have no column."""
COST = [
    Column("seconds", "time", duration),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("peak_bytes", "memory", size, about="of the first process at its peak"),
]


def comparison_page(comparison: Comparison) -> Page:
    """Recipes and numbers in one table, then pictures of them."""
    sections = [
        Section("Runs", _differences(comparison), [runs_table(comparison), *comparison.notes]),
        _section("Where they end", _ends(comparison.runs)),
        _section("What both sides lost or gained", _moves(comparison.runs)),
        _section("How they got there", [_curve(metric, comparison) for metric in comparison.curves]),
    ]
    lead = f"{_best(comparison.runs)} Press a run to bring it to the front everywhere."
    shown = [section for section in sections if section.items]
    return Page(_title(comparison.runs), lead, shown, comparison.facts())


def runs_table(comparison: Comparison) -> Table:
    """A row for each run: what its recipe has of its own, then what it came to."""
    known = [name for name in MEASURES if any(name in run.measures for run in comparison.runs)]
    settings = [Column(field, label) for field, label in zip(comparison.fields, _short(comparison.fields), strict=True)]
    measures = [_with_interval(MEASURES[name]) for name in known]
    return Table(
        "runs", [Column("run"), *settings, *measures, *COST], [_row(run) for run in comparison.runs], series="run"
    )


def _row(run: ComparedRun) -> dict[str, Any]:
    measures = {
        key: value
        for name, (middle, low, high) in run.measures.items()
        for key, value in ((name, middle), (f"{name} low", low), (f"{name} high", high))
    }
    cost = {column.key: getattr(run, column.key) for column in COST}
    return {"run": run.name, **run.settings, **measures, **cost}


def _with_interval(column: Column) -> Column:
    ends = (f"{column.key} low", f"{column.key} high")
    return Column(column.key, column.label, column.format, ends, about=column.about)


def _short(fields: Sequence[str]) -> list[str]:
    """The ends of these names, as far as it takes to tell them apart; of the objective's own the other one."""
    tails = [["objective"] if field == "objective.name" else field.split(".") for field in fields]
    lasts = [tail[-1] for tail in tails]
    return [last if lasts.count(last) == 1 else ".".join(tail[-2:]) for last, tail in zip(lasts, tails, strict=True)]


def _section(title: str, figures: Sequence[Figure]) -> Section:
    items: list[Item] = list(figures)
    return Section(title, items=items)


def _ends(runs: Sequence[ComparedRun]) -> list[Figure]:
    figures: list[Figure] = _bars("accuracy", "Held-out reward accuracy", runs)
    both = [run for run in runs if {"kl", "accuracy"} <= set(run.measures)]
    if both:
        points = [_point(run.name, run.measures["kl"], run.measures["accuracy"]) for run in both]
        figures.append(Scatter("Accuracy against KL", "KL to the reference, nats", "accuracy", points))
    return figures


def _moves(runs: Sequence[ComparedRun]) -> list[Figure]:
    figures: list[Figure] = []
    both = [run for run in runs if {"chosen_moves", "rejected_moves"} <= set(run.measures)]
    if both:
        points = [_point(run.name, run.measures["rejected_moves"], run.measures["chosen_moves"]) for run in both]
        figures.append(
            Scatter("Change of log-probability", "of rejected, nats", "of chosen, nats", points, diagonal=True)
        )
    return figures + _bars("both_fall", "Pairs that lost likelihood on both sides", runs)


def _bars(measure: str, title: str, runs: Sequence[ComparedRun]) -> list[Figure]:
    bars = [Bar(run.name, *run.measures[measure], run.name) for run in runs if measure in run.measures]
    return [Bars(title, MEASURES[measure].label, bars)] if bars else []


def _point(name: str, x: Estimate, y: Estimate) -> Point:
    return Point(name, x.value, y.value, y.low, y.high, x.low, x.high, name)


def _curve(metric: str, comparison: Comparison) -> Line:
    return Line(metric, "step", "", [Series(run, steps, values) for run, steps, values in comparison.curves[metric]])


def _title(runs: Sequence[ComparedRun]) -> str:
    return f"{len(runs)} runs beside each other" if len(runs) > 1 else f"One run: {runs[0].name}"


def _differences(comparison: Comparison) -> str:
    if len(comparison.runs) == 1:
        return ""
    if not comparison.fields:
        return "Their recipes are the same."
    return f"Their recipes differ in {', '.join(comparison.fields)}."


def _best(runs: Sequence[ComparedRun]) -> str:
    """The headline, and whether its interval is clear of the next."""
    known = sorted((run for run in runs if "accuracy" in run.measures), key=lambda run: -run.measures["accuracy"].value)
    if not known:
        return "None of them has been evaluated."
    first = known[0].measures["accuracy"]
    interval = "" if first.low is None else f" [{first.low:.3f}, {first.high:.3f}]"
    said = f"{known[0].name} ranks {first.value:.3f}{interval} of the held-out pairs right"
    alike = [run.name for run in known[1:] if first.low is not None and run.measures["accuracy"].value >= first.low]
    if len(known) == 1:
        return f"{said}."
    return (
        f"{said}, the most of all; {len(alike)} more lie within its interval." if alike else f"{said}, the most of all."
    )
