"""
A checkpoint that is written and takes the place of an older one, killed at its n-th touch of the disk, for every n:
python run_killed_rotation.py RECIPE STORE FOLDER

For each n a forked child of a run with checkpoint-1 saves checkpoint-2 under save_total_limit 1, in FOLDER/n, and gets
SIGKILL right before touch n. torch and safetensors write beneath Python: their files are whole or empty here.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fpo.interrupts import StopRequest
from fpo.recipe import load_recipe
from fpo.stage1_cache import find_cache
from fpo.stage2_align.align import _trainer
from fpo.stage2_align.arguments import training_arguments

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def die_at(n: int, folder: Path) -> None:
    """The n-th event of Python's that changes something below `folder` is the last."""
    made = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal made
        if event in TOUCHES and changes(event, arguments, folder):
            made += 1
            if made == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def changes(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    # shutil.rmtree names files relative to a directory's descriptor.
    if event != "open":
        return True
    path, mode, _ = arguments
    return (
        isinstance(path, str | Path) and str(path).startswith(str(folder)) and isinstance(mode, str) and "r" not in mode
    )


def killed(trainer: Any, begun: Path, folder: Path, n: int) -> bool:
    shutil.copytree(begun, folder)
    child = os.fork()
    if child == 0:
        trainer.args.output_dir = str(folder)
        trainer.state.global_step = 2
        torch.set_num_threads(1)
        die_at(n, folder)
        trainer._save_checkpoint(trainer.model, None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"saving failed before touch {n}")
    return os.WIFSIGNALED(status)


def main(recipe_file: Path, store: Path, folder: Path) -> None:
    recipe = load_recipe(recipe_file)
    begun = folder / "begun"
    begun.mkdir()
    cache = find_cache(recipe, store)
    trainer = _trainer(recipe, cache, training_arguments(recipe, begun), begun, StopRequest())
    trainer.train()
    n = 1
    while killed(trainer, begun, folder / f"{n}", n):
        n += 1
    print(n - 1)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
