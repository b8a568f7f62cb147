"""fpo align in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = (sys.executable, "-m", "fpo")


def run_process(
    recipe: Path, store: Path, run: Path, *flags: str, program: Sequence[str] = PROGRAM, **environment: str
) -> subprocess.Popen[bytes]:
    """fpo align in a process of its own."""
    command = [*program, "align", recipe, "--store", store, "--output", run, *flags]
    settings = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run_two_processes(
    recipe: Path, store: Path, run: Path, *, program: Sequence[str] = PROGRAM, **environment: str
) -> None:
    """fpo align in two gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    ranks = [
        run_process(recipe, store, run, program=program, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors.decode()[-2000:]
