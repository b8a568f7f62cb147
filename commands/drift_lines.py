"""What training did to the features, for people: in a terminal and on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpo.report import Page, Scatter, Table

WORDS = {"chosen": "on chosen completions", "rejected": "on rejected completions", "speech": "in its own speech"}

SHORT = {"speech": "in speech", "chosen": "on chosen", "rejected": "on rejected"}
"""Headings of drifts."""


def drift_lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines: list[str] = []
    for point in found["hookpoints"]:
        lines += [*([""] if lines else []), *facts(point), "", _table(point).text(), "", *told(point)]
    return lines


def facts(point: dict[str, Any]) -> list[str]:
    """What was looked at, and whether the SAE can be trusted with it."""
    policy, reference = (point["fit"][name] for name in ("policy", "reference"))
    spoken = f", {point['spoken']:,} of them completed by policy and reference" if point["spoken"] else ""
    lines = [
        f"features    {point['hookpoint']}, {point['groups']:,} held-out groups of {point['prompts']:,} prompts"
        f"{spoken}",
        f"SAE         FVU {policy['fvu']:.3f} and L0 {policy['l0']:.1f} on the policy, "
        f"{reference['fvu']:.3f} and {reference['l0']:.1f} on the reference",
    ]
    if point["misfit"]:
        lines.append("            it fits the policy far worse: a drift may be the misfit's rather than the model's")
    return lines


def told(point: dict[str, Any]) -> list[str]:
    """How well the gap told each drift."""
    lines: list[str] = []
    for name, one in point["gap_against"].items():
        r2, rank, slope = (one[key] for key in ("r2", "rank_correlation", "slope"))
        lines.append(
            f"{'gap told' if not lines else '':<12}{WORDS[name]:<27}R2 {_said(r2)}, rank correlation {_said(rank)}, "
            f"slope {_said(slope)} ({one['features']:,} features)"
        )
    return lines


def drift_page(found: dict[str, Any]) -> Page:
    """The same with figures."""
    from fpo.report import Page, Section

    sections = []
    for point in found["hookpoints"]:
        spoken = f" {point['spoken']:,} of them were completed by policy and reference." if point["spoken"] else ""
        text = f"{point['groups']:,} held-out groups of {point['prompts']:,} prompts.{spoken}"
        text += " The SAE fits the policy far worse: a drift may be the misfit's." * point["misfit"]
        sides = [side for side in ("speech", "chosen") if side in point["gap_against"]]
        figures = [_scatter(point, side) for side in sides]
        sections.append(Section(point["hookpoint"], text, [*figures, _told_table(point), _fit(point), _table(point)]))
    title = f"What training did to the features of {found['run']}"
    lead = (
        "Every feature in the policy less what it is in the reference, and how well its gap told that before training."
    )
    return Page(title, lead, sections, found)


def _scatter(point: dict[str, Any], side: str) -> Scatter:
    from fpo.report import Point, Scatter

    points = [Point(str(one["feature"]), one["gap"], one[side]) for one in point["points"]]
    gap = "gap before training: chosen minus rejected"
    return Scatter(f"Gap against drift {WORDS[side]}", gap, "drift", points)


def _told_table(point: dict[str, Any]) -> Table:
    from fpo.report import Column, Table

    measures = {"r2": "R2", "rank_correlation": "rank correlation", "slope": "slope"}
    rows = [
        {
            "drift": WORDS[side],
            "features": one["features"],
            **{name: one[name]["value"] for name in measures},
            **{f"{name} {end}": one[name][end] for name in measures for end in ("low", "high")},
        }
        for side, one in point["gap_against"].items()
    ]
    columns = [
        Column("drift"),
        *(Column(name, label, ".2f", (f"{name} low", f"{name} high")) for name, label in measures.items()),
        Column("features", format=","),
    ]
    return Table("How well the gap told the drift", columns, rows)


def _fit(point: dict[str, Any]) -> Table:
    from fpo.report import Column, Table

    columns = [Column("model"), Column("fvu", "FVU", ".3f"), Column("l0", "L0", ".1f")]
    rows = [{"model": model, **point["fit"][model]} for model in ("policy", "reference")]
    return Table("How the SAE fits", columns, rows)


def _table(point: dict[str, Any]) -> Table:
    from fpo.report import Column, Table

    sides = [side for side in SHORT if f"{side}_low" in (point["features"] or [{}])[0]]
    columns = [
        Column("feature", format="d"),
        *(Column(side, SHORT[side], "+.4f", (f"{side}_low", f"{side}_high")) for side in sides),
        Column("gap", "gap before", "+.4f", ("gap_low", "gap_high")),
        Column("fires", "fires", ".1%"),
        *([Column("label", "name", link="link")] if any(row["label"] for row in point["features"]) else []),
    ]
    return Table("Features that moved most surely", columns, point["features"])


def _said(mean: dict[str, Any]) -> str:
    if mean["value"] is None:
        return "-"
    return f"{mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]"
