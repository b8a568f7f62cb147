"""What runs are reported as: for people in lines and a table, for scripts in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fpo.commands.wording import groups_word, size

if TYPE_CHECKING:
    from fpo.stage2_align import AlignReport, Cost
    from fpo.store import Cache


def cache_lines(cache: Cache) -> list[str]:
    what = groups_word(cache.n_groups, cache.n_completions)
    return [f"cache       {cache.key[:12]} (manifest {cache.digest[:12]}), {cache.n_groups:,} {what}"]


def column_lines(cache: Cache) -> list[str]:
    """The columns that are read beside it."""
    from fpo.store import column_name

    return [
        f"column      {column.sealed.key[:12]} (manifest {column.sealed.digest[:12]}), {column_name(column.wanted)}"
        f"{_kl_note(column.wanted)}"
        for column in cache.columns
    ]


def _kl_note(spec: Mapping[str, Any]) -> str:
    """Of top logits, what a KL divergence over them is."""
    if spec["kind"] != "top_logits":
        return ""
    others = spec["vocab_size"] - spec["m"]
    return ": kl is exact" if others <= 1 else f": kl is a lower bound, {others:,} other tokens count as one"


def align_facts(report: AlignReport) -> dict[str, Any]:
    return {
        "run": str(report.run),
        "steps": report.steps,
        "pairs_per_second": report.rate,
        "parity": report.parity,
        "seconds": report.seconds,
        "cost": report.cost._asdict(),
        "last": report.last,
        "best": report.best,
    }


def cost_lines(cost: Cost) -> list[str]:
    """Memory and compute, each beside what a reference in memory would have added."""
    memory = "not told by this system" if cost.peak_bytes is None else f"{size(cost.peak_bytes)} at the peak"
    compute = f"{cost.tokens:,} tokens forward and backward"
    if cost.peak_bytes is not None:
        memory += f" ({cost.peak_of})"
    if cost.reference_bytes is not None and cost.reference_share is not None:
        weights = f"{size(cost.reference_bytes)} of weights"
        added = weights if cost.reference_bytes else "nothing: it is the policy with its adapter off"
        memory += f"; a reference in memory would add {added}"
        share = f"+{100 * cost.reference_share:.0f} % of the matrix products"
        compute += f"; a reference would add a forward of them, {share}"
    elif not cost.needs_reference:
        compute += "; the objective needs no reference"
    return [f"memory      {memory}", f"compute     {compute}"]


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what stands in them: numbers to the right, the rest to the left."""
    columns = list(zip(names, *rows, strict=True))
    cells = [_aligned(column) for column in columns]
    for row in zip(*cells, strict=True):
        print("  ".join(row).rstrip())


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    numbers = all(re.match(r"[-+.]?\d|-$", cell) for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]
