"""
Rows for lm-eval's `steered` model, which adds a feature's decoder direction to the residual stream: whether a feature
that differs also matters is then a question to the harness.

lm-eval 0.4.13 keeps one row per hookpoint, the last: the surest feature stands there, and others are tried by a file
with their row alone.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fpo.errors import FpoError
from fpo.evaluation.feature_report import FeatureRow
from fpo.evaluation.labels import pretrained
from fpo.scoring.hook_names import INPUT
from fpo.store import Spec


class SteerRow(NamedTuple):
    """A line of the file, by lm-eval's names."""

    loader: str
    action: str
    sparse_model: str
    hookpoint: str
    feature_index: int
    steering_coefficient: float
    head_index: str
    sae_id: str
    description: str


class SteerTarget(NamedTuple):
    """An SAE as lm-eval loads it, and where it steers."""

    loader: str
    sparse_model: str
    sae_id: str
    hookpoint: str


def steer_target(spec: Spec, sae: str | None) -> SteerTarget:
    """
    Of a column of features; `sae` is what its maker called its SAE. Raises FpoError where lm-eval could not load that.
    """
    if sae is None:
        raise FpoError("--steer: the cache does not say what its SAE is called, so lm-eval could not load it")
    hookpoint, path = _inside_base(spec["hookpoint"]), sae.rstrip("/")
    if hookpoint.endswith(INPUT):
        raise FpoError(f"--steer: lm-eval adds to what a module gives, and this SAE reads {spec['hookpoint']}")
    if spec["sae"]["config"].get("format") == "sparsify":
        if path.endswith(f"/{hookpoint}"):
            return SteerTarget("sparsify", path.removesuffix(f"/{hookpoint}"), "", hookpoint)
        raise FpoError(f"--steer: lm-eval looks for sparsify's SAE in a folder named {hookpoint}; this one is {sae}")
    if (known := pretrained(sae)) is not None:
        return SteerTarget("sae_lens", known.release, known.sae_id, hookpoint)
    owner, _, inside = path.removesuffix("/params.npz").partition("/")
    name, _, sae_id = inside.partition("/")
    if Path(sae).expanduser().exists() or not sae_id or not owner.strip("."):
        raise FpoError(f"--steer: lm-eval loads SAEs through sae_lens from the hub, and {sae} is none of the hub")
    return SteerTarget("sae_lens", f"{owner}/{name}", sae_id, hookpoint)


def steer_rows(features: Sequence[FeatureRow], target: SteerTarget) -> list[SteerRow]:
    """
    Each feature added as strongly as a completion that has it carries it in the mean, and taken away where it leans to
    the rejected side; the surest last.
    """
    return [
        SteerRow(
            loader=target.loader,
            action="add",
            sparse_model=target.sparse_model,
            hookpoint=target.hookpoint,
            feature_index=row.feature,
            steering_coefficient=_coefficient(row),
            head_index="",
            sae_id=target.sae_id,
            description=row.label or f"leans to {row.leans}",
        )
        for row in sorted(features, key=lambda row: abs(row.z or 0.0))
    ]


def write_steer_rows(rows: Sequence[SteerRow], path: Path) -> None:
    """As CSV with a header. Raises FpoError where the file cannot be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(SteerRow._fields)
            writer.writerows(rows)
    except OSError as error:
        raise FpoError(f"{path}: cannot be written ({error.strerror})") from None


def _coefficient(row: FeatureRow) -> float:
    if row.leans == "chosen":
        return row.chosen / row.fires_chosen
    return -row.rejected / row.fires_rejected


def _inside_base(hookpoint: str) -> str:
    """model.layers.12 -> layers.12: lm-eval looks inside `model.base_model`."""
    return hookpoint.partition(".")[2]
