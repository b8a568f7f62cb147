"""
Digests of weights and other files, remembered (see `memo`): hashing 50 GB takes a minute, asking again takes none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from fpo.canonical import canonical_json, sha256_hex
from fpo.errors import ModelError
from fpo.memo import file_facts, remember

_READ_BYTES = 2**22
_SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again within the same time stamp: not remembered."""


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


def byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """
    Where each tensor's bytes stand in a safetensors file that the library has opened: (start, stop), in that order.

    The library names tensors with type and shape but not their place, and hands out bytes only as tensors of a
    framework. A digest reads the bytes as they are, of types that no framework here knows, too.
    """
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes), object_pairs_hook=_each_once)
    header.pop("__metadata__", None)
    ranges = ((name, entry["data_offsets"]) for name, entry in header.items())
    first = 8 + header_bytes
    return {name: (first + start, first + stop) for name, (start, stop) in sorted(ranges, key=lambda item: item[1])}


def _tensors_of(path: Path) -> list[tuple[str, str, list[int], str]]:
    """(name, dtype, shape, sha256 of the bytes) of every tensor in a safetensors file."""
    try:
        # What the library refuses (gaps, doubled fields, unknown types) would be hashed here and never loaded.
        with safe_open(path, framework="np") as tensors, open(path, "rb") as file:
            found = []
            for name, (start, stop) in byte_ranges(path).items():
                header = tensors.get_slice(name)
                found.append((name, header.get_dtype(), header.get_shape(), _hash_range(file, start, stop)))
            return found
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download or convert it again") from error


def _each_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name stands twice, of which readers take one or the other."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a name stands twice in its header")
    return found


def _hash_range(file: BinaryIO, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    file.seek(start)
    rest = stop - start
    while rest:
        block = file.read(min(rest, _READ_BYTES))
        if not block:
            raise ValueError(f"it ends {rest} bytes early")
        digest.update(block)
        rest -= len(block)
    return digest.hexdigest()
