"""Several writers, killed at random and resumed in other numbers: same bytes, nothing lost, no litter in sight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")


def killed_crowds(folder, rounds, seed):
    """Counts of the rounds; store_killed_crowd.py says what a round is and fails where something is lost."""
    here = Path(__file__).parent
    script = [sys.executable, str(here / "store_killed_crowd.py"), str(folder), str(rounds), str(seed)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["rounds"] == rounds
    assert counts["kills"] >= rounds
    return counts


def test_killed_crowds_of_writers_lose_nothing(tmp_path):
    killed_crowds(tmp_path, rounds=3, seed=1)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", [2, 3])
def test_many_killed_crowds_of_writers_lose_nothing(tmp_path, seed):
    counts = killed_crowds(tmp_path, rounds=50, seed=seed)
    print(f"killed crowds, seed {seed}: {counts}")
    assert counts["kills"] > 200
