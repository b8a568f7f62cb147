"""The house itself: arrows between the packages, and what a clone must hold."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_arrows_point_down() -> None:
    """The contracts in pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_module_opens_with_what_it_is_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [
        ROOT / name.replace(".", "/").removeprefix("fpo").lstrip("/")
        for name in settings["tool"]["setuptools"]["packages"]
    ]
    silent = [path for folder in folders for path in folder.glob("*.py") if not path.read_text().startswith('"""')]
    assert silent == []
