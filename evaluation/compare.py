"""
Runs beside each other: in what their recipes differ, and what each came to. Of a run its three small files are read
(run.json, recipe.yaml, evaluation.json), for curves metrics.jsonl too; nothing is loaded, nothing is measured again.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo.errors import RunError
from fpo.stage2_align.arguments import resolved
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE, by_name, read_recipe, read_run

MEASURES = {
    "accuracy": ("intervals", "eval_rewards/accuracies"),
    "kl": ("own_samples", "kl"),
    "both_fall": ("displacement", "both_fall"),
    "chosen_moves": ("displacement", "chosen"),
    "rejected_moves": ("displacement", "rejected"),
    "distance_chosen": ("intervals", "eval_features/distance_chosen"),
    "distance_rejected": ("intervals", "eval_features/distance_rejected"),
}
"""What is compared, and where evaluation.json has it with its interval; else its number is taken alone."""
CURVES = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")
"""Of metrics.jsonl."""
POINTS = 32
"""Of a curve, each the mean of what was logged since the one before."""
DIGITS = 4
"""Of a point: a curve is looked at, metrics.jsonl has the rest."""


class Estimate(NamedTuple):
    """A number, and its 95 % interval where it is known."""

    value: float
    low: float | None = None
    high: float | None = None


class Curve(NamedTuple):
    """A metric of one run over its steps."""

    run: str
    steps: list[int]
    values: list[float]


class ComparedRun(NamedTuple):
    """What one run says of itself."""

    name: str
    """The end of its path, as far as it takes to tell it from the others."""
    folder: str
    cache: str
    complete: bool
    settings: dict[str, Any]
    """Those fields of its recipe that are not the same in all runs; an objective without a field has None."""
    measures: dict[str, Estimate]
    """Those of MEASURES that it knows."""
    held_out: int | None
    """Pairs that it was evaluated on, where that is known."""
    steps: int | None
    seconds: float | None
    tokens_per_second: float | None
    peak_bytes: int | None


class Settings(NamedTuple):
    """A recipe by dotted names, with every default."""

    values: dict[str, Any]
    chosen: frozenset[str]
    """Of the objective's, those that are not its defaults."""


class Comparison(NamedTuple):
    """Several runs."""

    fields: tuple[str, ...]
    """Of the recipe, in which they differ."""
    runs: tuple[ComparedRun, ...]
    curves: dict[str, list[Curve]]
    """By metric; empty where they were not asked for."""
    notes: tuple[str, ...]
    """What to know before they are compared."""

    def facts(self) -> dict[str, Any]:
        """The comparison in JSON types."""
        runs = [
            {**run._asdict(), "measures": {name: one._asdict() for name, one in run.measures.items()}}
            for run in self.runs
        ]
        curves = {metric: [curve._asdict() for curve in own] for metric, own in self.curves.items()}
        return {"fields": list(self.fields), "runs": runs, "curves": curves, "notes": list(self.notes)}


def compare(folders: Sequence[Path], with_curves: bool = False) -> Comparison:
    """
    The runs in these folders, in their order; a folder that is named twice counts once.

    Raises RunError where one is no run or its files cannot be read.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = run_names([folder.resolve() for folder in folders])
    recipes = [_settings(folder) for folder in folders]
    fields = differing(recipes)
    runs = tuple(
        _run(name, folder, {field: recipe.values.get(field) for field in fields})
        for name, folder, recipe in zip(names, folders, recipes, strict=True)
    )
    curves = _curves(dict(zip(names, folders, strict=True))) if with_curves else {}
    return Comparison(fields, runs, curves, tuple(_notes(runs)))


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that are all different."""
    depths = range(1, max(len(folder.parts) for folder in folders) + 1)
    tails = ([Path(*folder.parts[-depth:]).as_posix() for folder in folders] for depth in depths)
    return next(names for names in tails if len(set(names)) == len(names))


def differing(recipes: Sequence[Settings]) -> tuple[str, ...]:
    """
    The fields that are not the same in all: of the objective first, whose name leads. What one objective has and
    another lacks goes without saying, unless somebody chose it.
    """
    every = dict.fromkeys(field for recipe in recipes for field in recipe.values)
    found = [field for field in every if _differs(field, recipes)]
    return tuple(sorted(found, key=lambda field: (field != "objective.name", not field.startswith("objective."))))


def _differs(field: str, recipes: Sequence[Settings]) -> bool:
    having = [recipe for recipe in recipes if field in recipe.values]
    if any(recipe.values[field] != having[0].values[field] for recipe in having):
        return True
    return len(having) < len(recipes) and any(field in recipe.chosen for recipe in having)


def thinned(rows: Sequence[Mapping[str, float]], metric: str, ends: Sequence[int]) -> tuple[list[int], list[float]]:
    """
    The means of a metric over the steps up to each of these ends from the one before; an end without any is left out.

    ends  ascending, the last no earlier than the last step
    """
    held: dict[int, list[float]] = {}
    for row in rows:
        if metric in row:
            held.setdefault(ends[bisect.bisect_left(ends, row["step"])], []).append(row[metric])
    means = [float(f"{sum(values) / len(values):.{DIGITS}g}") for values in held.values()]
    return list(held), means


def _settings(folder: Path) -> Settings:
    read_run(folder)
    recipe = read_recipe(folder)
    values = by_name({**recipe.model_dump(mode="json"), "training": resolved(recipe.training)})
    chosen = by_name({"objective": recipe.objective.model_dump(mode="json", exclude_defaults=True)})
    return Settings(values, frozenset(chosen))


def _run(name: str, folder: Path, settings: dict[str, Any]) -> ComparedRun:
    facts, evaluation = read_run(folder), _evaluation(folder)
    cost, seconds = facts.get("cost") or {}, facts.get("seconds")
    measures = {measure: _estimate(evaluation, *place) for measure, place in MEASURES.items()}
    return ComparedRun(
        name=name,
        folder=str(folder),
        cache=facts["cache"],
        complete=facts["complete"],
        settings=settings,
        measures={measure: one for measure, one in measures.items() if one is not None},
        held_out=evaluation.get("pairs"),
        steps=facts.get("steps"),
        seconds=seconds,
        tokens_per_second=cost["tokens"] / seconds if cost and seconds else None,
        peak_bytes=cost.get("peak_bytes"),
    )


def _evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json; empty before `fpo evaluate`."""
    path = folder / "evaluation.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); write it again with: fpo evaluate {folder}") from None
    return found


def _estimate(evaluation: Mapping[str, Any], part: str, name: str) -> Estimate | None:
    known = evaluation.get(part, {}).get(name)
    if known is not None:
        return Estimate(known["value"], known["low"], known["high"])
    return Estimate(evaluation[name]) if name in evaluation else None


def _curves(folders: Mapping[str, Path]) -> dict[str, list[Curve]]:
    """On steps that all runs share, so that they can be read beside each other."""
    logged = {name: read_metrics(folder / METRICS_FILE) for name, folder in folders.items()}
    last = int(max((row["step"] for rows in logged.values() for row in rows), default=0))
    ends = [-(-last * point // POINTS) for point in range(1, POINTS + 1)]
    found = {metric: [Curve(name, *thinned(rows, metric, ends)) for name, rows in logged.items()] for metric in CURVES}
    known = {metric: [curve for curve in curves if curve.steps] for metric, curves in found.items()}
    return {metric: curves for metric, curves in known.items() if curves}


def _notes(runs: Sequence[ComparedRun]) -> list[str]:
    notes, caches = [], {run.cache for run in runs}
    unfinished = [run.name for run in runs if not run.complete]
    unknown = [run.name for run in runs if "accuracy" not in run.measures]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    if unknown:
        notes.append(f"not evaluated, do so with fpo evaluate RUN: {', '.join(unknown)}")
    if len(caches) > 1:
        notes.append(f"they were trained from {len(caches)} caches: on other pairs, or from other references")
    if len(sizes := {run.held_out for run in runs if run.held_out is not None}) > 1:
        notes.append(f"they were evaluated on different pairs: {', '.join(f'{size:,}' for size in sorted(sizes))}")
    return notes
