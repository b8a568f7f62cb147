"""
A writer that is killed at its n-th system call, for every n: python store_killed_writer.py FOLDER STEP

For n = 1, 1 + STEP, 1 + 2 STEP, ... a forked child fills the store FOLDER/n, a base and then a column beside it, and
gets SIGKILL right before call n, which leaves what call n - 1 left. Stops at the first n that a writer does not reach.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store_cases import TOP_LOGITS, World

CALLS = ("mkdir", "open", "write", "fsync", "link", "unlink", "rename")


def world_in(root: Path) -> World:
    """What is filled there."""
    return World(root, [TOP_LOGITS])


def die_at(n: int) -> None:
    """Wrap what the writer asks of the system; the n-th call is its last."""
    made = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def killed(root: Path, n: int) -> bool:
    child = os.fork()
    if child == 0:
        world = world_in(root)
        die_at(n)
        world.fill()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the writer failed before call {n}")
    return os.WIFSIGNALED(status)


def main(folder: Path, step: int) -> None:
    n = 1
    while killed(folder / f"{n}", n):
        n += step
    print(n)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
