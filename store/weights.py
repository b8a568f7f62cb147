"""
Digests of weights, remembered: hashing 50 GB takes a minute, asking again takes none.

The memo lies in $XDG_CACHE_HOME/fpo-memo (default ~/.cache/fpo-memo), one small file per question. It only
saves time: deleting it is always safe, and a note that is damaged or cannot be written is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from errors import ModelError
from store.files import replace_file, sha256_hex
from store.key import canonical_json, checked_json, parse_checked_json

_READ_BYTES = 2**22
_MAX_HEADER_BYTES = 10**8
"""The limit that the safetensors library sets."""

_SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again within the same time stamp: not remembered."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; remembered by path, size, mtime and inode."""
    return _remembered_digest("file", [path], lambda: _hash_file(path))


def weights_digest(files: Sequence[Path]) -> str:
    """
    Digest of the tensors in one or more safetensors files: sha256 over the canonical JSON of the sorted
    [name, dtype, shape, sha256 of the bytes]. The same tensors cut into other files give the same digest.

    Raises ModelError for a file that is not safetensors and for a tensor that stands in two files.
    """
    return _remembered_digest("weights", files, lambda: _hash_tensors(files))


def remember(facts: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    `compute()`, or what it returned the last time that it was asked with the same facts.

    facts: canonical JSON (no floats) that decides the answer. The answer is a small JSON object.
    """
    question = canonical_json(facts)
    path = memo_folder() / f"{sha256_hex(question)}.json"
    try:
        note = parse_checked_json(path.read_bytes())
        if canonical_json(note["facts"]) == question and isinstance(note["value"], dict):
            return note["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = compute()
    # A read-only home is no reason to fail: the next call computes again.
    with contextlib.suppress(OSError):
        replace_file(path, checked_json({"facts": facts, "value": value}))
    return value


def memo_folder() -> Path:
    """Where what only saves time is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fpo-memo"


def _remembered_digest(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    try:
        before = [_identity(path) for path in files]
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    if any(time.time_ns() - mtime < _SETTLED_NS for _path, _size, mtime, _inode in before):
        return compute()
    return str(remember({kind: before}, lambda: {"digest": compute()})["digest"])


def _identity(path: Path) -> tuple[str, int, int, int]:
    facts = os.stat(path)
    return (str(Path(path).resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino)


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
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, os.stat(path).st_size - 8):
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download or convert it again") from error


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
