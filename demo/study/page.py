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
from pathlib import Path
from typing import Any

from fpo.demo.study.plan import Place
from fpo.demo.study.summary import Measured, summary
from fpo.errors import FpoError
from fpo.report import Bar, Bars, Figure, Point, Scatter, save_figure
from fpo.report.axes import MINUS

GOLD, KL = "gold reward of the policy's own stories", "KL(policy || reference), nats per story"
Told = Mapping[str, Any]

MEASURES = {
    "gold": ("gold reward", ".3f"),
    "kl": ("KL, nats", ".2f"),
    "above_price": ("gold beyond its KL", "+.3f"),
    "accuracy": ("held-out accuracy", ".1%"),
    "distinct_3": ("distinct-3", ".3f"),
    "entropy": ("entropy", ".3f"),
}
"""Columns of the tables: their headings, and how numbers are written."""


def write(told: Told, page: Path) -> None:
    """Bring the page's tables and figures up to a summary."""
    beside = page.with_suffix("")
    beside.mkdir(exist_ok=True)
    for name, figure in figures(told).items():
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
    methods, ablations, against = told["methods"], told["ablations"], told["against_fpo"]
    settings = [{**one, "settings": _settings(one)} for one in methods]
    return {
        "budget": _budget(told),
        "methods": _table(
            ["method", "chosen", *_headings()], [[one["label"], one["settings"], *_row(one)] for one in settings]
        ),
        "against-fpo": _table(["minus FPO", *_headings()], [[one["label"], *_row(one, "+")] for one in against]),
        "tuning": _tuning(told),
        "ablations": _table(
            ["FPO with", "alpha", *_headings()], [[one["label"], _alpha(one), *_row(one)] for one in ablations]
        ),
        "features": _features(told["features"]),
        "displacement": _displacement(methods),
    }


def _headings() -> list[str]:
    return [heading for heading, _ in MEASURES.values()]


def _row(one: Measured, sign: str = "") -> list[str]:
    return [said(one[name], form if form.startswith("+") else sign + form) for name, (_, form) in MEASURES.items()]


def said(mean: Measured | None, form: str) -> str:
    """0.52 ± 0.03"""
    if mean is None:
        return "-"
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
    return (
        f"{runs['done']} trainings: {len(told['tried'])} to tune, {runs['methods']} of {planned['methods']} of the"
        f" methods over seeds (the first seed's are among those of tuning), {runs['ablations']} of"
        f" {planned['ablations']} ablations; {runs['seconds'] / 60:.0f} minutes of training on one core each, two at a"
        " time."
    )


def _tuning(told: Told) -> str:
    labels = {one["name"]: one["label"] for one in told["methods"]}
    rows = []
    for one in told["tried"]:
        chosen = told["chosen"][one["method"]]
        mark = "**" if (one["objective"], one["rate"]) == (chosen["objective"], chosen["rate"]) else ""
        label = labels.get(one["method"], one["method"])
        settings = [f"{mark}{_settings(one)}{mark}", f"{one['margin_effect']:.3f}"]
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
    forms = {
        "chosen": "+.2f",
        "rejected": "+.2f",
        "both_fall": ".1%",
        "reward_accuracy": ".1%",
        "entropy_of_data": ".3f",
    }
    rows = [[one["label"], *(said(one[name], form) for name, form in forms.items())] for one in methods]
    return _table(
        [
            "method",
            "logratio of chosen",
            "of rejected",
            "pairs where both fall",
            "accuracy of its own reward",
            "entropy on the pairs",
        ],
        rows,
    )


def figures(told: Told) -> dict[str, Figure]:
    """By the name of their file."""
    methods = told["methods"]
    labels = {one["name"]: one["label"] for one in methods}
    start = told["reference"]["gold"]
    reference = Point("reference", 0.0, start["value"], start["low"], start["high"], series="reference")
    tried = [_point(one, labels.get(one["method"], one["method"]), bars=False) for one in told["tried"]]
    return {
        "gold-against-kl": Scatter(
            "As tuned, five seeds", KL, GOLD, [*(_point(one, one["label"]) for one in methods), reference]
        ),
        "tried": Scatter("Every setting that was tried, one seed", KL, GOLD, [*tried, reference]),
        "accuracy": _bars("Held-out pairs ordered rightly by logratios", "share of 200 pairs", methods, "accuracy"),
        "beyond-kl": _bars(
            "Gold reward beyond what the KL buys", "gold reward above the common curve", methods, "above_price"
        ),
        "diversity": _bars("Diversity of the policy's own stories", "distinct-3", methods, "distinct_3"),
        "ablations": _bars(
            "FPO with one thing changed", "gold reward above the common curve", told["ablations"], "above_price"
        ),
        "ablations-kl": _bars("FPO with one thing changed", KL, told["ablations"], "kl"),
    }


def _point(one: Measured, label: str, bars: bool = True) -> Point:
    gold, kl = one["gold"], one["kl"]
    if not bars:
        return Point(label, kl["value"], gold["value"], series=label)
    return Point(label, kl["value"], gold["value"], gold["low"], gold["high"], kl["low"], kl["high"], label)


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
