"""The benchmarks run, small: what they print on another machine, a GPU say, is not to fail there for the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import build_tiny_world

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def printed(name: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_stage_2_against_what_it_replaces(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path, 8, 1)
    pairs, tokenizer = world.root / "pairs" / "train.jsonl", world.root / "model"
    out = printed("align.py", pairs, "--tokenizer", tokenizer, "--steps", 1, "--rounds", 1)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| side", "| dpo", "| simpo", "| fpo", "| tdpo2", "| floor", "| padded"]
    assert all(float(row[1]) > 0 for row in rows[1:])


@pytest.mark.long
def test_what_stands_around_a_step(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path, 8, 1)
    pairs, tokenizer = world.root / "pairs" / "train.jsonl", world.root / "model"
    out = printed("around.py", pairs, "--tokenizer", tokenizer, "--steps", 1, "--model", "tiny")
    spent = {
        row[0]: float(row[1])
        for line in out.splitlines()
        if len(row := line.split(" | ")) == 3 and row[0] != "| spent on"
    }
    assert {"| backward", "| forward and objective", "| optimiser", "| waiting for data"} <= spent.keys()
    assert all(milliseconds > 0 for milliseconds in spent.values())


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_what_length_costs(model: str) -> None:
    out = printed("context.py", "--lengths", "128,256", "--model", model, "--checkpointing")
    assert [line.split(" | ")[0] for line in out.splitlines()[-3:]] == ["| 64", "| 128", "| 256"]


@pytest.mark.long
def test_what_wide_saes_cost() -> None:
    out = printed("wide_sae.py", "--sizes", "16x2048", "--kinds", "relu,jumprelu,gated,topk,groupmax", "--tokens", "64")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["| relu", "| jumprelu", "| gated", "| topk", "| groupmax"]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows[1:])
