"""What tests of run folders share."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from fpo.stage2_align.run import read_run, write_run


def cut(folder: Path, step: int) -> None:
    """The run as one that was killed after the checkpoint at `step`, some rows later, leaves it."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    write_run(folder, {**read_run(folder), "complete": False})


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
