"""
What took long to find out, remembered between runs: one small file per question.

The memo lies in $XDG_CACHE_HOME/fpo-memo (default ~/.cache/fpo-memo, without a home in the temporary folder). It only
saves time: deleting it is always safe, and a note that is damaged or cannot be written is not used. A file is known by
more than its times, which `cp -p`, archives and image layers keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpo.canonical import canonical_json, checked_json, parse_checked_json, sha256_hex

_SAMPLE_BYTES = 2**16
"""Read at the head, the middle and the tail of a file, to know it by."""


def file_facts(path: Path) -> dict[str, Any]:
    """
    What tells, without reading all of a file, that it is unchanged, in JSON types: path, size, inode, both times, of
    which no program can set the second, and sha256 of its head, middle and tail. Raises OSError.
    """
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        sample = hashlib.sha256()
        for start in sorted({0, max(0, (facts.st_size - _SAMPLE_BYTES) // 2), max(0, facts.st_size - _SAMPLE_BYTES)}):
            file.seek(start)
            sample.update(file.read(_SAMPLE_BYTES))
    return {
        "path": str(Path(path).resolve()),
        "size": facts.st_size,
        "inode": facts.st_ino,
        "mtime_ns": facts.st_mtime_ns,
        "ctime_ns": facts.st_ctime_ns,
        "sample": sample.hexdigest(),
    }


def remember(
    facts: dict[str, Any], compute: Callable[[], dict[str, Any]], again: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """
    `compute()`, or what it returned the last time that it was asked with the same facts.

    facts: canonical JSON (no floats) that decides the answer. The answer is a small JSON object.
    again: gives the facts anew; where they changed while the answer was computed, it is not kept.
    """
    path = _note(facts)
    try:
        note = parse_checked_json(path.read_bytes())
        if canonical_json(note["facts"]) == canonical_json(facts) and isinstance(note["value"], dict):
            return note["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    value = compute()
    # A read-only home is no reason to fail: the next call computes again.
    with contextlib.suppress(OSError):
        if again is None or again() == facts:
            keep(path, checked_json({"facts": facts, "value": value}))
    return value


def forget(facts: dict[str, Any]) -> None:
    """Drop what was remembered about these facts: it turned out wrong."""
    with contextlib.suppress(OSError):
        _note(facts).unlink()


def keep(path: Path, data: bytes) -> None:
    """Write or overwrite a note atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The dot: what a killed process leaves is told from a note by its name.
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def memo_folder() -> Path:
    """Where what only saves time is kept."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fpo-memo"
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / "fpo-memo" if home.is_absolute() else _temporary_memo()


def _temporary_memo() -> Path:
    """Of a user without a home, as containers have them: nobody else may have put notes there."""
    folder = Path(tempfile.gettempdir()) / f"fpo-memo-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = os.lstat(folder)
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
            return folder
    return Path(os.devnull) / "fpo-memo"  # nothing can be read or written there


def _note(facts: dict[str, Any]) -> Path:
    return memo_folder() / f"{sha256_hex(canonical_json(facts))}.json"
