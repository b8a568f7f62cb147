"""A feature report in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpo.commands.reports import print_table

if TYPE_CHECKING:
    from fpo.evaluation.feature_report import FeatureReport, FeatureRow, PartRow
    from fpo.evaluation.prediction import Share

LABEL = 48
"""Characters of a label in a table."""


def print_report(report: FeatureReport) -> None:
    """Facts in lines, then the features of both sides."""
    for name, line in report_facts(report):
        print(f"{name:<12}{line}")
    for lean in ("chosen", "rejected"):
        rows = [row for row in report.features if row.leans == lean]
        print(f"\nleaning to {lean}" + ("" if rows else ": none that fires often enough"))
        if rows:
            named = any(row.label for row in report.features)
            cells = [_cells(row) + ((_printable(row.label or "", LABEL),) if named else ()) for row in rows]
            print_table(_COLUMNS + (("name",) if named else ()), cells)
    if report.parts:
        print("\nby part of the pairs, the surest features of each (effect d)")
        print_table(("part", "pairs", "share", "lean", "chosen", "rejected"), [_part(part) for part in report.parts])
    print()
    for note in report.notes:
        print(f"note        {_printable(note, 300)}")


_COLUMNS = ("feature", "gap", "95 % interval", "d", "adj. p", "halves", "fires", "equal length", "cut")


def report_facts(report: FeatureReport) -> list[tuple[str, str]]:
    """What was asked of which cache, and what it comes to: a word and a line each."""
    sae = "" if report.sae is None else f", SAE {_printable(report.sae, 100)}"
    kept = "all" if report.top_k == "all" else f"top {report.top_k}"
    prompts = "" if report.prompts == report.pairs else f" of {report.prompts:,} prompts"
    prediction = report.prediction
    shares = [("length", prediction.length), ("features", prediction.features), ("both", prediction.both)]
    told = ", ".join(f"{name} {_share(one.auc)}" for name, one in shares)
    return [
        ("cache", f"{report.cache[:12]}, {report.pairs:,} pairs{prompts}"),
        ("features", f"{report.hookpoint}, {kept} of {report.d_sae:,}{sae}"),
        ("length", f"{report.chosen_tokens:.1f} tokens chosen, {report.rejected_tokens:.1f} rejected"),
        *([] if report.top_k == "all" else [("left out", _left_out(report))]),
        ("told", f"held-out AUC of {prediction.n_pairs:,} pairs: {told}"),
        (
            "lean",
            f"{report.leaning_chosen:,} features to chosen and {report.leaning_rejected:,} to rejected (at most "
            f"{100 * report.rate:.0f} % by chance), of {report.tests:,} that fire for {report.min_prompts} prompts",
        ),
    ]


def _left_out(report: FeatureReport) -> str:
    chosen, rejected = (100 * share for share in report.lost_share)
    any_chosen, any_rejected = (100 * share for share in report.lost_any)
    return (
        f"{chosen:.2g} % of chosen's squared activations, {rejected:.2g} % of rejected's, by the top k "
        f"(anything of {any_chosen:.0f} % and {any_rejected:.0f} % of them)"
    )


def _share(share: Share) -> str:
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def _cells(row: FeatureRow) -> tuple[str, ...]:
    return (
        str(row.feature),
        f"{row.gap:+.3g}",
        f"{row.low:+.3g} to {row.high:+.3g}",
        _number(row.d, "+.2f"),
        _number(row.adjusted_p, ".1e"),
        "agree" if row.sign_holds else "differ",
        f"{100 * row.fires_chosen:.3g} % / {100 * row.fires_rejected:.3g} %",
        f"{row.equal_length:+.3g}",
        f"{row.cut:.2g}",
    )


def _part(part: PartRow) -> tuple[str, ...]:
    name = f"topic {part.name}" if part.kind == "topic" else _printable(part.name, 24)
    if part.label:
        name += f" {_printable(part.label, 24)}"
    tops = [one for one in part.features if one.top and one.d is not None]
    sides = [
        ", ".join(f"{one.feature} ({one.d:+.2f})" for one in tops if (one.gap > 0) == positive) or "-"
        for positive in (True, False)
    ]
    return name, f"{part.pairs:,}", f"{100 * part.share:.0f} %", f"{part.discoveries:,}", *sides


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _printable(text: str, most: int) -> str:
    from fpo.store import printable

    return printable(text, most)
