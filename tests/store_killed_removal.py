"""
A removal that is killed at its n-th system call, for every n: python store_killed_removal.py rm|gc|column FOLDER

For each n a forked child removes the cache in FOLDER/n, by its key or because nobody used it for a year, or its only
column, and gets SIGKILL right before call n.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from store_cases import TOP_LOGITS, World
from store_killed_writer import die_at

from fpo.store import Store, gc, rm


def killed(how: str, root: Path, n: int) -> bool:
    world = World(root, specs=(TOP_LOGITS,))
    key = world.fill().key
    if how == "gc":
        (root / key / "tmp/leftover").write_bytes(b"1")
        for path in (Store(root).use_file(key), root / key / "tmp/leftover"):
            os.utime(path, (time.time() - 365 * 86400,) * 2)
    child = os.fork()
    if child == 0:
        die_at(n)
        if how == "rm":
            rm(root, key)
        elif how == "column":
            rm(root, key, world.column_key(0))
        else:
            gc(root, unused_days=30, dry_run=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the removal failed before call {n}")
    return os.WIFSIGNALED(status)


def main(how: str, folder: Path) -> None:
    n = 1
    while killed(how, folder / f"{n}", n):
        n += 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
