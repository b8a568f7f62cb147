"""docs/tutorial.md: every command on it, in its order, with a tiny model, SAE and pairs under its names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import build_tiny_world

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.long
def test_every_command_of_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    build_tiny_world(tmp_path, 24, 12)
    text = PAGE.read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    commands = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 10
    environment = {name: value for name, value in os.environ.items() if name != "FPO_STORE"}
    key = ""
    for command in commands:
        program, *arguments = shlex.split(command.replace("CACHE", key) if " CACHE " in command else command)
        assert program == "fpo"
        done = subprocess.run(
            [sys.executable, "-m", "fpo", *arguments],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        if arguments[0] == "cache":
            key = re.findall(r"key +([0-9a-f]{64})", done.stdout)[0]
    for page in ("gaps.html", "drift.html", "compare.html"):
        assert "</html>" in (tmp_path / page).read_text(encoding="utf-8")
