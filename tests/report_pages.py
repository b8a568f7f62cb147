"""Pages of the sizes that people make: many runs beside each other, many features with pairs to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from fpo.commands.data_page import data_page
from fpo.report import (
    Bar,
    Bars,
    Bins,
    Column,
    Histogram,
    Line,
    Page,
    Pair,
    Passage,
    Passages,
    Point,
    Scatter,
    Section,
    Series,
    Table,
)
from fpo.stage1_cache import SplitReport
from fpo.stage1_cache.drops import DROPPED, NOTED, DropReport, Finding, Spread

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \x1b[31mred\x07 ‮evil"
"""A label that would be markup, terminal codes and turned text if it were let."""
TOKENS = 32
"""Of a passage."""
CURVES = ("loss", "rewards/margins", "rewards/accuracies")


def comparison(n_runs: int = 20, steps: int = 60) -> Page:
    """Runs by recipe, headline and curves."""
    rng = np.random.default_rng(0)
    names = [f"{name}-seed{seed}" for seed in range(n_runs) for name in ("fpo", "dpo", "tdpo2", "simpo")][:n_runs]
    accuracy = rng.uniform(0.6, 0.8, n_runs)
    rows: list[dict[str, Any]] = [
        {
            "run": name,
            "objective": name.split("-")[0],
            "beta": float(rng.choice([0.05, 0.1, 0.5])),
            "accuracy": value,
            "low": value - 0.04,
            "high": value + 0.04,
            "kl": float(rng.uniform(0.5, 9)),
            "minutes": float(rng.uniform(2, 90)),
        }
        for name, value in zip(names, accuracy.tolist(), strict=True)
    ]
    columns = [
        Column("run"),
        Column("objective"),
        Column("beta"),
        Column("accuracy", "reward accuracy", ".3f", interval=("low", "high"), about="on held-out pairs"),
        Column("kl", "KL", ".2f"),
        Column("minutes", format=".1f"),
    ]
    at = list(range(5, 5 * steps + 1, 5))
    curves = {
        curve: [Series(name, at, _walk(rng, steps, place)) for name in names] for place, curve in enumerate(CURVES)
    }
    frontier = [Point(r["run"], r["kl"], r["accuracy"], r["low"], r["high"], series=r["run"]) for r in rows]
    bars = [Bar(r["run"], r["accuracy"], r["low"], r["high"], r["run"]) for r in rows]
    sections = [
        Section(
            "Runs", "They differ in what stands in these columns alone.", [Table("runs", columns, rows, series="run")]
        ),
        Section(
            "Where they end",
            items=[
                Bars("Held-out reward accuracy", "accuracy", bars),
                Scatter("Accuracy against KL", "KL to the reference, nats", "accuracy", frontier),
            ],
        ),
        Section("How they got there", items=[Line(name, "step", "", own) for name, own in curves.items()]),
    ]
    data = {"runs": rows, "curves": {name: [vars(one) for one in own] for name, own in curves.items()}}
    return Page(f"{n_runs} runs compared", "One cache, several objectives.", sections, data)


def features(n_features: int = 200, n_pairs: int = 5) -> Page:
    """Features with gaps, and for each some pairs with heat on every token."""
    rng = np.random.default_rng(1)
    gaps = rng.normal(0, 1, n_features)
    rows: list[dict[str, Any]] = [
        {
            "feature": 7 * i,
            "label": HOSTILE if i == 0 else f"phrases that speak of topic number {i} and what follows from it",
            "link": f"https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/{7 * i}",
            "pairs_at": f"#feature-{7 * i}",
            "gap": gap,
            "low": gap - 0.2,
            "high": gap + 0.2,
            "d": gap / 3,
            "p": float(rng.uniform()) ** 4,
            "chosen": float(rng.uniform(0.01, 0.4)),
            "rejected": float(rng.uniform(0.01, 0.4)),
        }
        for i, gap in enumerate(gaps.tolist())
    ]
    columns = [
        Column("feature", format="d", link="pairs_at"),
        Column("label", link="link"),
        Column("gap", format="+.3f", interval=("low", "high"), about="mean of chosen minus mean of rejected"),
        Column("d", format="+.2f", about="the gap in standard deviations"),
        Column("p", "adjusted p", ".2g"),
        Column("chosen", "fires, chosen", ".1%"),
        Column("rejected", "fires, rejected", ".1%"),
    ]
    drift = {str(row["feature"]): float(row["gap"] * 0.6 + rng.normal() * 0.2) for row in rows}
    points = [Point(f"feature {row['feature']}", row["gap"], drift[str(row["feature"])]) for row in rows]
    edges = np.linspace(-3, 3, 31)
    sides = [Bins(side, edges.tolist(), np.histogram(gaps + move, edges)[0].tolist()) for side, move in _SIDES]
    top = [Bar(row["label"], row["gap"], row["low"], row["high"]) for row in rows[:12]]
    examples = [
        Passages(f"{row['feature']} {row['label']}", [_pair(rng) for _ in range(n_pairs)], f"feature-{row['feature']}")
        for row in rows
    ]
    sections = [
        Section("Features", "The surest first.", [Table("features", columns, rows, text_rows=15)]),
        Section(
            "In pictures",
            items=[
                Bars("The surest", "gap", top),
                Scatter("Gap against drift", "gap", "drift", points, trend=(0.0, 0.6), diagonal=True),
                Histogram("Activations", "activation", sides),
            ],
        ),
        Section("Pairs", "Those that each feature tells apart the most.", examples),
    ]
    data = {"features": rows, "drift": drift, "bins": [vars(one) for one in sides]}
    return Page("What separates chosen from rejected", f"5,000 pairs, {n_features} features.", sections, data)


_SIDES = (("chosen", 0.3), ("rejected", -0.3))
_WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "with", "they", "policy", "reference", "\n"]


def data() -> Page:
    """Two splits with everything that may be dropped and noted, and a dataset's names of any kind."""
    rng = np.random.default_rng(3)
    reports = []
    for split in ("train[:95%], mine", HOSTILE):
        drops = DropReport(read=10_000, prompt_column=HOSTILE, unused_columns=["source", HOSTILE])
        for number, reason in enumerate(DROPPED):
            drops.dropped[reason] = Finding(10**number % 9973, list(range(5)))
        for number, what in enumerate(NOTED):
            drops.noted[what] = Finding(7**number % 9973, list(range(5)))
        for part in ("prompt tokens", "chosen tokens", "rejected tokens", "score margin"):
            spread = Spread.of(rng.lognormal(4, 1, 5000))
            assert spread is not None
            drops.spreads[part] = spread
        reports.append(SplitReport(split, drops, trained_on=12))
    return data_page("mine", reports)


def _walk(rng: np.random.Generator, steps: int, place: int) -> list[float]:
    """A curve that falls, or rises, and levels off; six digits, as a comparison keeps."""
    level = 1 - np.exp(-np.arange(steps) / rng.uniform(5, 30))
    values = (0.7 - 0.3 * level, 2 * level, 0.5 + 0.25 * level)[place] + rng.normal(0, 0.02, steps)
    return [float(f"{value:.6g}") for value in values]


def _passage(rng: np.random.Generator) -> Passage:
    tokens = [f" {word}" for word in rng.choice(_WORDS, TOKENS).tolist()]
    warm = rng.random(TOKENS) < 0.15
    return Passage(
        tokens, [round(heat, 2) for heat in (warm * rng.exponential(1.0, TOKENS)).tolist()], "tokens 12 to 52 of 80"
    )


def _pair(rng: np.random.Generator) -> Pair:
    prompt = " ".join(rng.choice(_WORDS, rng.integers(5, 60)).tolist())[:240]
    return Pair(prompt, _passage(rng), _passage(rng), "mean 0.31 against 0.02")
