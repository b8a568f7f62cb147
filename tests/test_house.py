"""The house itself: arrows between the packages, and what a clone must hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_arrows_point_down() -> None:
    """The contracts in pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_module_opens_with_what_it_is_for() -> None:
    packages = ("store", "scoring", "stage1_cache", "stage2_align", "demo")
    modules = [path for package in packages for path in (ROOT / package).glob("*.py")]
    silent = [path.name for path in [*modules, *ROOT.glob("*.py")] if not path.read_text().startswith('"""')]
    assert silent == []
