"""What tensorboard and trackio wrote of a run, read back from their files, is what metrics.jsonl holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_processes import run_process
from tiny_world import TinyWorld, build_tiny_world

from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE

pytestmark = [
    pytest.mark.oracle,
    # The loggers announce their own deprecations.
    pytest.mark.filterwarnings("default"),
]

READ_TRACKIO = "import json, trackio; print(json.dumps(trackio.SQLiteStorage.get_logs('mine', 'first')))"


@pytest.fixture
def world(tmp_path: Path) -> TinyWorld:
    """With a cache of its pairs."""
    world = build_tiny_world(tmp_path / "world", 8, 2)
    build_caches(world.recipe(), world.store)
    return world


def by_logger(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl under the names by which transformers hands them to a logger."""
    rows = read_metrics(run / METRICS_FILE)
    assert {"loss", "grad_norm", "learning_rate", "rewards/margins", "features/distance_rejected"} <= rows[0].keys()
    return [{f"train/{name}": value for name, value in row.items() if name != "step"} for row in rows]


def test_tensorboard_reads_every_number_of_every_step(world: TinyWorld, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = world.recipe(training={"report_to": "tensorboard"})
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    (file,) = (tmp_path / "run" / "runs").rglob("events.*")
    logged = events.EventAccumulator(str(file), size_guidance={events.SCALARS: 0, events.TENSORS: 0}).Reload()
    rows = by_logger(tmp_path / "run")
    assert len(rows) == 4
    for name in rows[0]:
        points = logged.Scalars(name)
        assert [point.step for point in points][: len(rows)] == [1, 2, 3, 4]
        # Its files hold float32.
        assert [point.value for point in points][: len(rows)] == [float(np.float32(row[name])) for row in rows]
    # What tells one run from another, beside the arguments.
    (arguments,) = logged.Tensors("args/text_summary")
    experiment = json.loads(arguments.tensor_proto.string_val[0])
    assert experiment["objective"] == recipe.objective.model_dump(mode="json")
    assert experiment["cache_key"] == find_cache(recipe, world.store).key


def test_trackio_reads_every_number_of_every_step(world: TinyWorld, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # It settles when it is imported where it keeps its files: processes of their own.
    place = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    names = {"report_to": "trackio", "project": "mine", "run_name": "first"}
    process = run_process(world.recipe_file(training=names), world.store, tmp_path / "run", **place)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()[-2000:]
    read = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO], env={**os.environ, **place}, capture_output=True, check=True
    )
    logged = json.loads(read.stdout.splitlines()[-1])
    rows = by_logger(tmp_path / "run")
    assert len(rows) == 4
    for number, (row, found) in enumerate(zip(rows, logged, strict=False), start=1):
        assert found["train/global_step"] == number
        assert {name: found[name] for name in row} == row
