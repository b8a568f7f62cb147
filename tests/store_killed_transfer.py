"""
A push or pull that is killed at its n-th call, for every n:
python store_killed_transfer.py push|pull FOLDER URL STEP

push: the cache of World(FOLDER/source) goes to URL/n; the n-th call of obstore is its last, before or after it is
made. pull: it goes from URL to the store FOLDER/n; the n-th system call of the target's folder is its last.
n = 1, 1 + STEP, 1 + 2 STEP, ... until a transfer ends alive. Prints how many were killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store_cases import TOP_LOGITS, World
from store_killed_writer import die_at

from fpo.store import pull, push


def die_at_request(n: int) -> None:
    """Each request counts twice: killed before it leaves, and killed before its answer is known."""
    import obstore

    made = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == n:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = call(*args, **kwargs)
            made += 1
            if made == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return counted

    for name in ("put", "get", "head", "list", "list_with_delimiter"):
        setattr(obstore, name, wrapped(getattr(obstore, name)))


def killed(what: str, folder: Path, url: str, n: int) -> bool:
    child = os.fork()
    if child == 0:
        source = World(folder / "source", specs=(TOP_LOGITS,))
        key = source.fill().key
        if what == "push":
            die_at_request(n)
            push(source.store, key, f"{url}/{n}", threads=1)
        else:
            die_at(n)
            pull(url, key, folder / f"{n}", columns=[source.column_key(0)], threads=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the {what} failed before call {n}")
    return os.WIFSIGNALED(status)


def main(what: str, folder: Path, url: str, step: int) -> None:
    World(folder / "source", specs=(TOP_LOGITS,)).fill()
    n = 1
    while killed(what, folder, url, n):
        n += step
    print(n)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
