"""
A removal that is killed at its n-th system call, for every n: python store_killed_removal.py FOLDER

For each n a forked child removes the tagged cache in FOLDER/n and gets SIGKILL right before call n.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from store_cases import World
from store_killed_writer import die_at

from store import rm, tag


def killed(root: Path, n: int) -> bool:
    key = World(root).fill().key
    tag(root, key, "doomed")
    child = os.fork()
    if child == 0:
        die_at(n)
        rm(root, "doomed")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the removal failed before call {n}")
    return os.WIFSIGNALED(status)


def main(folder: Path) -> None:
    n = 1
    while killed(folder / f"{n}", n):
        n += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
