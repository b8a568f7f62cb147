"""The house itself: arrows between the packages, and what a clone must hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fpo.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]


def modules() -> list[Path]:
    """Every module that is installed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [
        ROOT / name.replace(".", "/").removeprefix("fpo").lstrip("/")
        for name in settings["tool"]["setuptools"]["packages"]
    ]
    return [path for folder in folders for path in folder.glob("*.py")]


def test_the_arrows_point_down() -> None:
    """The contracts in pyproject.toml."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_package_is_installed() -> None:
    """A folder with modules that setuptools is not told of works in a clone and is missing from a wheel."""
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name != "build" and path.name[0] != "."]
    packages = {path.parent for top in tops for path in top.rglob("__init__.py")}
    assert {path.parent for path in modules()} == packages | {ROOT}


def test_every_module_opens_with_what_it_is_for() -> None:
    assert [path for path in modules() if not path.read_text().startswith('"""')] == []


def test_what_the_page_for_contributors_points_to_is_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "AGENTS.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if name != "utils.py" and not (ROOT / name).exists()] == []


def test_nothing_outside_objectives_knows_one_of_them() -> None:
    """
    Neither its class nor its name, but for `fpo`, which names the package too: what they need is asked of them. The
    study's plan alone is about them.
    """
    theirs = {kind.__name__ for kind in OBJECTIVES.values()} | (set(OBJECTIVES) - {"fpo"})
    assert {"Fpo", "Dpo", "dpo"} <= theirs
    study = ROOT / "demo" / "study" / "plan.py"
    outside = [path for path in modules() if path.parent != ROOT / "objectives" and path != study]
    known = {(path.name, word) for path in outside for word in words(ast.parse(path.read_text())) if word in theirs}
    assert known == set()


def words(tree: ast.AST) -> Iterator[str]:
    """Identifiers, and texts that are nothing but a word."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.Constant(value=str(word)):
                yield word


def test_one_module_says_what_a_mistyped_name_was_meant_to_be() -> None:
    assert [path.name for path in modules() if "difflib" in words(ast.parse(path.read_text()))] == ["nearest.py"]


@pytest.mark.parametrize("command", [["--help"], ["store", "--help"], ["align", "--help"]], ids=" ".join)
def test_help_waits_for_no_library(command: list[str]) -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "zarr", "fpo.recipe", "fpo.store"}
    code = (
        f"import sys; from fpo import cli; sys.argv = ['fpo', *{command}]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        f"loaded = {heavy} & set(sys.modules)\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
