"""What a recipe's data holds, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fpo.report import Bins, Column, Histogram, Item, Page, Section, Table
from fpo.stage1_cache.drops import Spread

if TYPE_CHECKING:
    from fpo.stage1_cache import SplitReport


def data_page(recipe: str, reports: Sequence[SplitReport]) -> Page:
    """A section for each split: what became of its rows, then how its numbers are spread."""
    kept = ", ".join(
        f"{report.drops.kept:,} of {report.drops.read:,} {report.drops.unit} of {report.split}" for report in reports
    )
    sections = [Section(report.split, _said(report), _items(report)) for report in reports]
    return Page(f"Data of {recipe}", f"Kept: {kept}.", sections, [report.facts() for report in reports])


def _said(report: SplitReport) -> str:
    said = f"Prompts: {report.drops.prompt_line()}."
    if not report.trained_on:
        return said
    return f"{said} {report.trained_on:,} stand in the training split too, so they are not held out."


def _items(report: SplitReport) -> list[Item]:
    drops = report.drops
    rows = [
        {"fate": fate, "count": finding.count, "why": meaning, "rows": finding.examples}
        for fate, finding, meaning in drops.findings()
    ]
    columns = [Column("fate", " "), Column("count", "rows", ","), Column("why"), Column("rows", "such as")]
    found: list[Item] = [Table("Rows", columns, rows)] if rows else ["Nothing was dropped or noted."]
    lengths = drops.lengths()
    if prompt := lengths.pop("prompt", None):
        found.append(_histogram("Prompts", "tokens", {"prompt": prompt}))
    found.append(_histogram("Completions", "tokens", lengths))
    if margin := drops.spreads.get("score margin"):
        found.append(_histogram("Scores", "largest minus smallest score of a row", {"margin": margin}))
    return found


def _histogram(title: str, x: str, spreads: dict[str, Spread]) -> Histogram:
    bins = [Bins(name, [float(edge) for edge in spread.edges], spread.counts) for name, spread in spreads.items()]
    return Histogram(title, x, bins, "rows")
