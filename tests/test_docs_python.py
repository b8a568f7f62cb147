"""docs/python.md, run from top to bottom on a small cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from store_cases import FEATURES, HIDDEN_GRAM, TOP_LOGITS, World, make_groups

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_every_block_of_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path / "caches", specs=[FEATURES, TOP_LOGITS, HIDDEN_GRAM])
    world.fill()
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).replace("3fa9c1d2", world.key)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["everything"]) == len(world.groups)
    assert (tmp_path / "mine" / world.key / "manifest.json").exists()


def test_every_name_in_the_pages_table_is_one_that_groups_have() -> None:
    groups = make_groups([(1, [2])])
    table = PAGE.read_text(encoding="utf-8").split("|---|---|---|")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.strip().splitlines()))
    assert len(names) > 10
    assert [name for name in names if not hasattr(groups, name)] == []
