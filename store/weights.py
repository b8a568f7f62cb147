"""
Digests of weights, remembered: hashing 50 GB takes a minute, asking again takes none.

The memo lies in $XDG_CACHE_HOME/fpo-memo (default ~/.cache/fpo-memo, without a home in the temporary folder), one
small file per question. It only saves time: deleting it is always safe, and a note that is damaged or cannot be
written is not used. A file is known by more than its times, which `cp -p`, archives and image layers keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from errors import ModelError
from store.files import replace_file, sha256_hex
from store.key import canonical_json, checked_json, parse_checked_json

_READ_BYTES = 2**22
_MAX_HEADER_BYTES = 10**8
"""The limit that the safetensors library sets."""

_SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again within the same time stamp: not remembered."""
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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; remembered by `file_facts`."""
    return _remembered_digest("file", [path], lambda: _hash_file(path))


def weights_digest(files: Sequence[Path]) -> str:
    """
    Digest of the tensors in one or more safetensors files: sha256 over the canonical JSON of the sorted
    [name, dtype, shape, sha256 of the bytes]. The same tensors cut into other files give the same digest.

    Raises ModelError for a file that is not safetensors and for a tensor that stands in two files.
    """
    return _remembered_digest("weights", files, lambda: _hash_tensors(files))


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
            replace_file(path, checked_json({"facts": facts, "value": value}))
    return value


def forget(facts: dict[str, Any]) -> None:
    """Drop what was remembered about these facts: it turned out wrong."""
    with contextlib.suppress(OSError):
        _note(facts).unlink()


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


def _remembered_digest(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    def facts() -> dict[str, Any]:
        return {kind: [file_facts(path) for path in files]}

    try:
        before = facts()
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    now = time.time_ns()
    if any(now - max(file["mtime_ns"], file["ctime_ns"]) < _SETTLED_NS for file in before[kind]):
        return compute()
    return str(remember(before, lambda: {"digest": compute()}, facts)["digest"])


def _hash_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _hash_tensors(files: Sequence[Path]) -> str:
    tensors: dict[str, list[Any]] = {}
    for path in files:
        for name, dtype, shape, digest in _tensors_of(path):
            if name in tensors:
                raise ModelError(f"{path}: the tensor {name} stands in another of these files too; give each file once")
            tensors[name] = [name, dtype, shape, digest]
    return sha256_hex(canonical_json([tensors[name] for name in sorted(tensors)]))


def _tensors_of(path: Path) -> list[tuple[str, str, list[int], str]]:
    """(name, dtype, shape, sha256 of the bytes) of every tensor in a safetensors file."""
    try:
        # What the library refuses (gaps, doubled fields, unknown types) would be hashed here and never loaded.
        with safe_open(path, framework="np"), open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, os.stat(path).st_size - 8):
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes), object_pairs_hook=_each_once)
            header.pop("__metadata__", None)
            return [
                (
                    name,
                    str(entry["dtype"]),
                    [int(n) for n in entry["shape"]],
                    _hash_range(file, 8 + header_bytes, entry),
                )
                for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            ]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download or convert it again") from error


def _each_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name stands twice, of which readers take one or the other."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a name stands twice in its header")
    return found


def _hash_range(file: BinaryIO, base: int, entry: dict[str, Any]) -> str:
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError(f"data_offsets {start}, {end}")
    digest = hashlib.sha256()
    file.seek(base + start)
    rest = end - start
    while rest:
        block = file.read(min(rest, _READ_BYTES))
        if not block:
            raise ValueError(f"it ends {rest} bytes early")
        digest.update(block)
        rest -= len(block)
    return digest.hexdigest()
