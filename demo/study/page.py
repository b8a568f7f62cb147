"""
docs/study.md: what people wrote stays, and the tables between `<!-- table NAME -->` and `<!-- end -->` are the last
summary's. The figures and the summary itself stand beside it, in docs/study/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fpo.demo.study.plan import Place
from fpo.demo.study.summary import Measured, summary
from fpo.errors import FpoError
from fpo.report import Bar, Bars, Figure, Point, Scatter, save_figure
from fpo.report.axes import MINUS

GOLD = "gold reward of the policy's own stories"
KL, ROOT_KL = "KL(policy || reference), nats per story", "square root of KL(policy || reference), nats per story"
Told = Mapping[str, Any]

MEASURES = {
    "gold": ("gold reward", ".3f"),
    "kl": ("KL, nats", ".2f"),
    "accuracy": ("held-out accuracy", ".1%"),
    "distinct_3": ("distinct-3", ".3f"),
    "entropy": ("entropy", ".3f"),
}
DISPLACEMENT = {
    "chosen": ("logratio of chosen", "+.2f"),
    "rejected": ("of rejected", "+.2f"),
    "both_fall": ("pairs where both fall", ".1%"),
    "reward_accuracy": ("accuracy of its own reward", ".1%"),
    "entropy_of_data": ("entropy on the pairs", ".3f"),
}
"""Columns of tables: their headings, and how numbers are written."""


def write(told: Told, page: Path) -> None:
    """Bring the page's tables and figures up to a summary."""
    beside = page.with_suffix("")
    beside.mkdir(exist_ok=True)
    for name, figure in figures(told).items():
        if figure.table().rows:
            save_figure(figure, beside / f"{name}.svg")
    (beside / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    page.write_text(filled(page.read_text(encoding="utf-8"), tables(told)), encoding="utf-8")


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The text with each marked part replaced; KeyError where the text names one that there is none of."""
    return re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(?=<!-- end -->)",
        lambda found: f"{found[1]}{parts[found[2]]}\n",
        text,
        flags=re.DOTALL,
    )


def tables(told: Told) -> dict[str, str]:
    """In Markdown, by name."""
    methods, ablations = told["methods"], told["ablations"]
    labels = {one["name"]: one["label"] for one in ablations}
    return {
        "budget": _budget(told),
        "methods": _table(
            ["method", "chosen", "seeds", *_headings()],
            [[one["label"], _settings(one), str(len(one["seeds"])), *_row(one)] for one in methods],
        ),
        "against-fpo": _differences("minus FPO", told["against_fpo"]),
        "one-rate": _table(
            ["method", "seeds", *_headings()],
            [[one["label"], str(len(one["seeds"])), *_row(one)] for one in told["one_rate"]],
        ),
        "one-rate-against-fpo": _differences("minus FPO", told["one_rate_against_fpo"]),
        "tuning": _tuning(told),
        "ablations": _table(
            ["FPO with", "alpha", "seeds", *_headings()],
            [[one["label"], _alpha(one), str(len(one["seeds"])), *_row(one)] for one in ablations],
        ),
        "against-base": _table(
            ["FPO with", "minus that with", *_headings()],
            [[one["label"], labels[one["base"]], *_row(one, "+")] for one in told["against_base"]],
        ),
        "features": _features(told["features"]),
        "displacement": _displacement(told["one_rate"]),
    }


def _differences(against: str, found: Sequence[Measured]) -> str:
    return _table([against, *_headings()], [[one["label"], *_row(one, "+")] for one in found])


def _headings() -> list[str]:
    return [heading for heading, _ in MEASURES.values()]


def _row(one: Measured, sign: str = "") -> list[str]:
    return [said(one[name], form if form.startswith("+") else sign + form) for name, (_, form) in MEASURES.items()]


def said(mean: Measured, form: str) -> str:
    """0.52 ± 0.03"""
    if mean["low"] is None:
        return f"{mean['value']:{form}}".replace("-", MINUS)
    reach = (mean["high"] - mean["low"]) / 2
    return f"{mean['value']:{form}} ± {reach:{form.removeprefix('+')}}".replace("-", MINUS)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _settings(one: Measured) -> str:
    """beta 50, alpha 20, rate 1e-4"""
    own = dict(one["objective"])
    shown = [f"{field} {own[field]:g}" for field in ("beta", "gamma", "alpha") if field in own]
    return ", ".join([*shown, f"rate {_rate(one['rate'])}"])


def _rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _alpha(one: Measured) -> str:
    return f"{one['objective']['alpha']:g}"


def _budget(told: Told) -> str:
    runs, planned = told["runs"], told["planned"]
    parts = [
        f"{len(told['tried'])} to tune",
        f"{runs['methods']} of {planned['methods']} as tuned",
        f"{runs['one_rate']} of {planned['methods']} at one learning rate",
        f"{runs['ablations']} of {planned['ablations']} ablations",
    ]
    return (
        f"Trainings behind this page: {', '.join(parts)}; {runs['done']} in all, as some are several of these."
        f" They took {runs['seconds'] / 60:.0f} minutes of one core, two at a time."
    )


def _tuning(told: Told) -> str:
    labels = {one["name"]: one["label"] for one in told["methods"]}
    rows = []
    for one in told["tried"]:
        chosen = told["chosen"][one["method"]]
        mark = "**" if (one["objective"], one["rate"]) == (chosen["objective"], chosen["rate"]) else ""
        label = labels.get(one["method"], one["method"])
        settings = [f"{mark}{_settings(one)}{mark}", said(one["effect"], ".3f")]
        rows.append([label, *settings, *(said(one[name], MEASURES[name][1]) for name in ("accuracy", "gold", "kl"))])
    return _table(["method", "settings", "margin, in its spreads", "accuracy", "gold reward", "KL"], rows)


def _features(found: Sequence[Measured]) -> str:
    rows = [
        [one["label"], str(one["runs"]), *(said(one[side], "+.2f") for side in ("chosen", "rejected", "speech"))]
        for one in found
        if one["runs"]
    ]
    return _table(["method", "seeds", "drift on chosen", "drift on rejected", "drift in its own stories"], rows)


def _displacement(methods: Sequence[Measured]) -> str:
    headings = [heading for heading, _ in DISPLACEMENT.values()]
    rows = [[one["label"], *(said(one[name], form) for name, (_, form) in DISPLACEMENT.items())] for one in methods]
    return _table(["method", *headings], rows)


def figures(told: Told) -> dict[str, Figure]:
    """By the name of their file."""
    level, ablations = told["one_rate"], told["ablations"]
    labels = {one["name"]: one["label"] for one in level}
    foretold = [{**one, "rank": one["speech"]} for one in told["features"] if one["runs"]]
    tried = [_bare(_paid(one, labels.get(one["method"], one["method"]))) for one in told["tried"]]
    spread = [
        Point(name, x["value"], y["value"], y["low"], y["high"], x["low"], x["high"], name)
        for name, x, y in ((one["label"], one["entropy"], one["distinct_3"]) for one in level)
    ]
    return {
        "as-tuned": Scatter("As tuned", ROOT_KL, GOLD, [_paid(one, one["label"]) for one in told["methods"]]),
        "one-rate": Scatter("At one learning rate", ROOT_KL, GOLD, [_paid(one, one["label"]) for one in level]),
        "tried": Scatter("Every setting that was tried, one seed", ROOT_KL, GOLD, tried),
        "accuracy": _bars("Held-out pairs ordered rightly", "share of 200 pairs", level, "accuracy"),
        "diversity": Scatter("Diversity and entropy of own stories", "entropy, nats per token", "distinct-3", spread),
        "ablations": _bars("FPO with one thing changed: gold reward", GOLD, ablations, "gold"),
        "ablations-kl": _bars("FPO with one thing changed: KL", KL, ablations, "kl"),
        "gap-and-drift": _bars("How well gaps told the drift in own stories", "rank correlation", foretold, "rank"),
    }


def _paid(one: Measured, label: str) -> Point:
    """Gold reward over the root of the KL, which it grows with at first."""
    kl = {end: max(one["kl"][end], 0.0) ** 0.5 for end in ("value", "low", "high")}
    gold = one["gold"]
    return Point(label, kl["value"], gold["value"], gold["low"], gold["high"], kl["low"], kl["high"], label)


def _bare(point: Point) -> Point:
    """Where there are many, without the bars."""
    return replace(point, low=None, high=None, x_low=None, x_high=None)


def _bars(title: str, x: str, methods: Sequence[Measured], name: str) -> Bars:
    return Bars(title, x, [Bar(one["label"], *(one[name][end] for end in ("value", "low", "high"))) for one in methods])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fpo.demo.study.page", description="Bring docs/study.md up to what a study has done so far."
    )
    parser.add_argument("page", type=Path, metavar="PAGE", help="docs/study.md")
    parser.add_argument("--world", type=Path, default=Path("demo-world"), help="default: demo-world")
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="its folder (default: runs/study)")
    options = parser.parse_args(arguments)
    try:
        write(summary(Place(options.world.resolve(), options.study.resolve())), options.page)
    except FpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
