"""
Named arrays <-> the members of a Zarr v3 group, in memory and without a file.

zarr says what a group and an array are: every `zarr.json` is a document that zarr made, in canonical JSON,
because what zarr itself writes changed inside 3.1. The chunks go past zarr's event loop, through the zstd of
numcodecs that its codec calls as well: the bytes are the same, and a shard of 16 arrays takes 34 ms to
encode instead of 59, and 17 ms to decode instead of 33 (2048 pairs, 1M tokens, zip included).

A chunk is one zstd frame with its size and a checksum. Everything is asked before anything is allocated:
zarr itself would unpack whatever a frame announces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.canonical import canonical_json
from fpo.store.format.invariants import Invalid

MAX_RAW_BYTES = 2**27
"""All arrays together, uncompressed: bounds what a hostile group makes a reader allocate."""

MAX_DOCUMENT_BYTES = 4096
"""Of one `zarr.json`; those of arrays take about 500."""

_LEVEL = 1

# A missing chunk reads as the fill value without a word: these are values that no invariant lets pass.
_FILL: dict[str, Any] = {"uint64": 2**64 - 1, "uint32": 2**32 - 1, "uint8": 255, "float32": "NaN"}

# Another zarr may say more (3.1.0 to 3.1.3 gave every group a null `consolidated_metadata`); the format does not.
_GROUP_FIELDS = ("attributes", "node_type", "zarr_format")
_ARRAY_FIELDS = (
    *_GROUP_FIELDS,
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "data_type",
    "dimension_names",
    "fill_value",
    "shape",
    "storage_transformers",
)


@dataclass(frozen=True)
class ArraySpec:
    dtype: str
    """uint64, uint32, uint8 or float32."""

    dimensions: tuple[str, ...]
    """Their names; at least one."""


def encode_arrays(
    arrays: dict[str, NDArray[Any]], specs: dict[str, ArraySpec], attributes: dict[str, Any]
) -> dict[str, bytes]:
    """
    Member name -> its bytes: the group with these attributes, every array and its chunk.

    The same arrays always give the same bytes. An array without elements has no chunk. Raises TypeError for
    attributes that have no canonical JSON (a float).
    """
    # Takes 0.05 s: only whoever encodes or decodes pays for it.
    from numcodecs import zstd

    members = {"zarr.json": group_document(attributes)}
    for path, spec in specs.items():
        array = arrays[path]
        assert array.dtype == spec.dtype, path
        assert array.ndim == len(spec.dimensions), path
        members[f"{path}/zarr.json"] = array_document(spec, array.shape)
        if array.size:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            members[chunk_name(path, spec)] = zstd.compress(little.reshape(-1).view(np.uint8), _LEVEL, True)
    return members


def decode_arrays(
    members: Mapping[str, memoryview], specs: dict[str, ArraySpec], shapes: dict[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    """
    The arrays that `encode_arrays` wrote, writable and in native byte order.

    `shapes` are `claimed_shapes` after the caller has held them against its own limits; the attributes of the
    group are the caller's to compare (`group_document`). Raises Invalid for members that `encode_arrays` does not
    write for these shapes, before anything is allocated, and for a frame that does not decompress.
    """
    _check_members(members, specs, shapes)
    sizes = {path: math.prod(shapes[path]) * np.dtype(spec.dtype).itemsize for path, spec in specs.items()}
    total = sum(sizes.values())
    if total > MAX_RAW_BYTES:
        raise Invalid(f"its arrays claim {total} bytes, a shard holds at most {MAX_RAW_BYTES}")
    for path, spec in specs.items():
        # A frame of 32 kB may announce a gigabyte.
        if sizes[path] and _content_size(members[chunk_name(path, spec)]) != sizes[path]:
            raise Invalid(f"{path} does not hold the {sizes[path]} bytes of its shape in one frame")
    return {path: _decompressed(path, spec, shapes[path], members) for path, spec in specs.items()}


def claimed_shapes(members: Mapping[str, memoryview], specs: dict[str, ArraySpec]) -> dict[str, tuple[int, ...]]:
    """Array path -> the shape in its metadata. Raises Invalid where that is not what `encode_arrays` writes."""
    return {path: _claimed_shape(path, spec, members) for path, spec in specs.items()}


def group_document(attributes: dict[str, Any]) -> bytes:
    """The `zarr.json` of the group, with these attributes."""
    return canonical_json(_group_facts() | {"attributes": attributes})


# A reader asks twice for each, and most shapes of a shard come back in the next one.
@lru_cache(maxsize=1024)
def array_document(spec: ArraySpec, shape: tuple[int, ...]) -> bytes:
    """The `zarr.json` of an array: all of it follows from its spec and its shape."""
    # Zarr has no chunk of length 0: an empty array is one that has no chunk.
    grid = {"name": "regular", "configuration": {"chunk_shape": [max(n, 1) for n in shape]}}
    return canonical_json(_array_facts(spec) | {"shape": list(shape), "chunk_grid": grid})


def chunk_name(path: str, spec: ArraySpec) -> str:
    """The member that holds the only chunk of an array."""
    return path + "/c" + "/0" * len(spec.dimensions)


@cache
def _array_facts(spec: ArraySpec) -> dict[str, Any]:
    """What zarr says of an array of this kind, of one element: another shape changes `shape` and `chunk_grid`."""
    # Takes 0.3 s: only whoever encodes or decodes pays for it.
    import zarr
    from zarr.codecs import BytesCodec, ZstdCodec
    from zarr.storage import MemoryStore

    one = (1,) * len(spec.dimensions)
    array = zarr.create_array(
        MemoryStore(),
        shape=one,
        chunks=one,
        dtype=spec.dtype,
        fill_value=_FILL[spec.dtype],
        dimension_names=spec.dimensions,
        chunk_key_encoding={"name": "default", "separator": "/"},
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=ZstdCodec(level=_LEVEL, checksum=True),
        zarr_format=3,
    )
    facts: dict[str, Any] = array.metadata.to_dict()
    return {field: facts[field] for field in _ARRAY_FIELDS}


@cache
def _group_facts() -> dict[str, Any]:
    """What zarr says of a group without attributes."""
    import zarr
    from zarr.storage import MemoryStore

    facts: dict[str, Any] = zarr.create_group(MemoryStore(), zarr_format=3).metadata.to_dict()
    return {field: facts[field] for field in _GROUP_FIELDS}


def _claimed_shape(path: str, spec: ArraySpec, members: Mapping[str, memoryview]) -> tuple[int, ...]:
    document = bytes(members.get(f"{path}/zarr.json", b"")[:MAX_DOCUMENT_BYTES])
    try:
        claimed = json.loads(document)["shape"]
        shape = tuple(n for n in claimed if type(n) is int and 0 <= n <= MAX_RAW_BYTES)
        known = len(shape) == len(spec.dimensions) and document == array_document(spec, shape)
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise Invalid(f"{path}/zarr.json inside it is missing or not what this format writes")
    return shape


def _check_members(
    members: Mapping[str, memoryview], specs: dict[str, ArraySpec], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raises Invalid for another member than the format has, for a missing one, and for metadata that is not ours."""
    documents = {f"{path}/zarr.json": array_document(spec, shapes[path]) for path, spec in specs.items()}
    chunks = {chunk_name(path, spec) for path, spec in specs.items() if math.prod(shapes[path])}
    expected = {"zarr.json", *documents, *chunks}
    if set(members) != expected:
        odd = sorted(set(members) ^ expected)
        raise Invalid(f"members missing or unknown inside it: {', '.join(odd[:4])!r}")
    for name, document in documents.items():
        if members[name] != document:
            raise Invalid(f"{name} inside it is missing or not what this format writes")


def _decompressed(
    path: str, spec: ArraySpec, shape: tuple[int, ...], members: Mapping[str, memoryview]
) -> NDArray[Any]:
    from numcodecs import zstd

    array = np.empty(shape, np.dtype(spec.dtype).newbyteorder("<"))
    if array.size:
        try:
            zstd.decompress(members[chunk_name(path, spec)], array.reshape(-1).view(np.uint8))
        except (RuntimeError, ValueError) as error:
            raise Invalid(f"{path} does not decompress ({error})") from error
    return array.astype(spec.dtype, copy=False)


def _content_size(frame: memoryview) -> int:
    """
    The size that a zstd frame with a checksum and no dictionary announces (RFC 8878, 3.1.1), else -1; also where the
    frame is not all that is there: a decompressor would unpack what lies behind it, or keep silent about it.
    """
    if len(frame) < 9 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = frame[4]
    has_checksum, has_dictionary, single_segment = descriptor & 4, descriptor & 3, descriptor & 32
    # A decoder passes over the unused bit: with it set, the same array would have a second spelling.
    reserved_or_unused = descriptor & 24
    if not has_checksum or has_dictionary or reserved_or_unused:
        return -1
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 if single_segment else 6
    if width == 0 or _blocks_end(frame, start + width) + 4 != len(frame):
        return -1
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _blocks_end(frame: memoryview, at: int) -> int:
    """Where the last block of a frame ends whose first begins `at`; -1 where there is none."""
    while at + 3 <= len(frame):
        header = int.from_bytes(frame[at : at + 3], "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        # A raw block and a compressed one have their size, a repeated byte is one.
        at += 3 + (1 if kind == 1 else size)
        if is_last:
            return at
    return -1
