"""
Checkpoints that are whole or not there. Trainer writes `checkpoint-N/` file by file; when all ranks have written, a
seal is added with every file's size and the metric sums of all ranks. What has no seal was being written when the
run was killed. An old checkpoint goes after the new one is sealed, and gives up its name before its files.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fpo.errors import RunError

SEAL_FILE = "fpo_checkpoint.json"
_REMOVED = ".removed-"

Sums = dict[str, tuple[float, float]]


def seal(folder: Path, sums: list[Sums]) -> None:
    """
    Say that the checkpoint is whole.

    sums  of each rank since the last log: of every metric its sum, and over how much
    """
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    temporary = folder / f"{SEAL_FILE}.tmp"
    temporary.write_text(json.dumps({"metric_sums": sums, "files": files}, indent=1), encoding="utf-8")
    temporary.replace(folder / SEAL_FILE)


def read_sums(folder: Path, rank: int, world: int) -> Sums:
    """What this rank had summed up; with another number of ranks, the first has it all."""
    every: list[Sums] = _read_seal(folder)["metric_sums"]
    own = every[rank : rank + 1] if len(every) == world else every if rank == 0 else []
    names = dict.fromkeys(name for sums in own for name in sums)
    return {name: _added([sums[name] for sums in own if name in sums]) for name in names}


def _added(sums: list[tuple[float, float]]) -> tuple[float, float]:
    totals, counts = zip(*sums, strict=True)
    return sum(totals), sum(counts)


def last_checkpoint(run: Path) -> Path | None:
    """
    The newest checkpoint; what a killed run left half written or half removed goes.

    Raises RunError where the newest is damaged: it was whole once, so going back further is not ours to decide.
    """
    for leftover in run.glob(f"{_REMOVED}*"):
        shutil.rmtree(leftover)
    for step, folder in sorted(_checkpoints(run), reverse=True):
        if not (folder / SEAL_FILE).is_file():
            shutil.rmtree(folder)
            continue
        damage = _damage(folder)
        if damage:
            older = [f"checkpoint-{n}" for n, path in sorted(_checkpoints(run)) if n < step and not _damage(path)]
            raise RunError(
                f"{folder}: {damage}; remove this folder to continue from {older[-1] if older else 'the beginning'}"
            )
        return folder
    return None


def newest_name(run: Path) -> str | None:
    """What the newest sealed checkpoint is called."""
    sealed = [path.name for _, path in sorted(_checkpoints(run)) if (path / SEAL_FILE).is_file()]
    return sealed[-1] if sealed else None


def whole_checkpoint(run: Path, step: int) -> Path:
    """Checkpoint `step` of a run. Raises RunError where it is not there, or not whole."""
    folder = run / f"checkpoint-{step}"
    if not (folder / SEAL_FILE).is_file():
        there = [str(n) for n, path in sorted(_checkpoints(run)) if (path / SEAL_FILE).is_file()]
        raise RunError(f"{folder}: no such checkpoint; there are {', '.join(there) or 'none'}")
    damage = _damage(folder)
    if damage:
        raise RunError(f"{folder}: {damage}")
    return folder


def rotate(run: Path, keep: int | None, best: str | None = None) -> None:
    """
    Remove the oldest checkpoints until `keep` are left, but neither the newest nor the one named `best`; None or 0
    keeps all.
    """
    if not keep or keep < 0:
        return
    sealed = [folder for _, folder in sorted(_checkpoints(run)) if (folder / SEAL_FILE).is_file()]
    others = [folder for folder in sealed[:-1] if folder.name != best]
    for folder in others[: max(len(sealed) - keep, 0)]:
        doomed = folder.with_name(f"{_REMOVED}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def explained_writes(what: Path, advice: str) -> Iterator[None]:
    """
    RunError where `what` cannot be written: a full disk, a quota, a missing permission.

    advice  what remains, and what to do
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise RunError(f"{what}: cannot be written ({reason}); {advice}") from error


def _write_failure(error: BaseException) -> str | None:
    """The reason, where this is a failure to write a file; torch and safetensors have errors of their own for it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).splitlines()[0]
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in text or "inline_container" in text:
        inner = error.__context__
        return (inner.strerror or text) if isinstance(inner, OSError) else text
    return None


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything that is called a checkpoint."""
    return [(int(match[1]), path) for path in run.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(SEAL_FILE)]


def _read_seal(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
    return facts


def _damage(folder: Path) -> str | None:
    """The first file that is not as it was written; None where all are. Only sizes are looked at."""
    try:
        files: dict[str, int] = _read_seal(folder)["files"]
        for name, size in files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                now = "is missing" if found is None else f"has {found:,} bytes"
                return f"{name} {now} ({size:,} were written)"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{SEAL_FILE} cannot be read ({error})"
    return None
