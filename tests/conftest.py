"""Checks shapes and types at every annotated boundary while the tests run; keeps torch on one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(["fpo.scoring", "fpo.objectives", "fpo.stage2_align.measure"], "beartype.beartype")

import torch  # noqa: E402 - after the hook

torch.set_num_threads(1)


@pytest.fixture
def private_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fpo.memo` remembers is remembered for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
