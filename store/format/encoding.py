"""
Pairs <-> the bytes of a shard: one Zarr v3 group in one deterministic zip (docs/cache-format.md).

Every array's `zarr.json` follows from its name and shape alone, so a reader compares it byte for byte
with what a writer would have written: any other codec, dtype, chunking, fill value or attribute is refused
without being interpreted. Sizes are checked before anything is allocated.

Dimension key:  P pairs   T tokens   C scored completion tokens   N kept features   m top logits
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from fpo.canonical import canonical_json
from fpo.store.format.archive import pack, unpack
from fpo.store.format.invariants import Bounds, Invalid, check_counts, check_pairs
from fpo.store.format.key import FORMAT_VERSION
from fpo.store.format.pairs import Features, Pairs, TopLogits

MAX_RAW_BYTES = 2**27
"""All arrays of one shard together, uncompressed: bounds what a hostile shard makes a reader allocate."""

MAX_FILE_BYTES = MAX_RAW_BYTES + 2**24
"""zstd adds at most 0.4 % to incompressible data; the members' names and metadata are a few kilobytes."""


@dataclass(frozen=True)
class ArraySpec:
    dtype: str
    dimensions: tuple[str, ...]


_PAIRS = {
    "pair_id": ArraySpec("uint64", ("pair",)),
    "pair_digest": ArraySpec("uint8", ("pair", "byte")),
    "input_ids": ArraySpec("uint32", ("token",)),
    "splits": ArraySpec("uint64", ("boundary",)),
    "ref_logps": ArraySpec("float32", ("pair", "side")),
    "token_logps": ArraySpec("float32", ("scored_token",)),
}
_FEATURES = {
    "indices": ArraySpec("uint32", ("entry",)),
    "acts": ArraySpec("float32", ("entry",)),
    "splits": ArraySpec("uint64", ("boundary",)),
    "active": ArraySpec("uint32", ("pair", "side")),
    "tail_sq": ArraySpec("float32", ("pair", "side")),
}
_TOP_LOGITS = {
    "indices": ArraySpec("uint32", ("scored_token", "rank")),
    "logps": ArraySpec("float32", ("scored_token", "rank")),
}

# A missing chunk reads as the fill value without a word: these are values that no invariant lets pass.
_FILL: dict[str, Any] = {"uint64": 2**64 - 1, "uint32": 2**32 - 1, "uint8": 255, "float32": "NaN"}


def schema(n_hookpoints: int, top_logits: bool) -> dict[str, ArraySpec]:
    """Array path inside the shard -> its dtype and dimensions."""
    arrays = dict(_PAIRS)
    for n in range(n_hookpoints):
        arrays |= {f"features/{n}/{name}": spec for name, spec in _FEATURES.items()}
    if top_logits:
        arrays |= {f"top_logits/{name}": spec for name, spec in _TOP_LOGITS.items()}
    return arrays


def encode_shard(pairs: Pairs, key: str, sid: int, bounds: Bounds) -> bytes:
    """
    The bytes of shard `sid` of cache `key`; the same pairs always give the same bytes.

    Raises Invalid where an invariant does not hold or the shard is too large.
    """
    check_pairs(pairs, bounds)
    arrays = _arrays_of(pairs)
    raw = sum(array.nbytes for array in arrays.values())
    if raw > MAX_RAW_BYTES:
        raise Invalid(f"its arrays take {raw} bytes, a shard holds at most {MAX_RAW_BYTES}")
    members: dict[str, bytes | memoryview] = dict(_group_members(bounds, key, sid, len(pairs), pairs.n_tokens))
    for path, spec in schema(len(bounds.features), bounds.top_logits > 0).items():
        array = arrays[path]
        members[f"{path}/zarr.json"] = _array_metadata(spec, array.shape)
        if array.size:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            members[_chunk_name(path, spec)] = zstd.compress(little.reshape(-1).view(np.uint8), 1, True)
    return pack(members)


def decode_shard(data: bytes, key: str, sid: int, bounds: Bounds) -> Pairs:
    """
    The pairs of shard `sid` of cache `key`, all invariants checked.

    Raises Invalid for any bytes that `encode_shard` does not write for some pairs.
    """
    members = unpack(data)
    specs = schema(len(bounds.features), bounds.top_logits > 0)
    shapes = array_shapes(members, bounds)
    n_pairs, n_tokens = shapes["pair_id"][0], shapes["input_ids"][0]
    groups = _group_members(bounds, key, sid, n_pairs, n_tokens)
    for name, expected in groups.items():
        if bytes(members.get(name, b"")) != expected:
            raise Invalid(f"{name} inside it is not that of shard {sid} of cache {key[:12]}")
    expected_names = set(groups) | {f"{path}/zarr.json" for path in specs}
    expected_names |= {_chunk_name(path, specs[path]) for path, shape in shapes.items() if math.prod(shape)}
    if set(members) != expected_names:
        odd = sorted(set(members) ^ expected_names)
        raise Invalid(f"members missing or unknown inside it: {', '.join(odd[:4])!r}")
    pairs = _pairs_of({path: _decode(path, spec, shapes[path], members) for path, spec in specs.items()}, bounds)
    check_pairs(pairs, bounds)
    return pairs


def array_shapes(members: dict[str, memoryview], bounds: Bounds) -> dict[str, tuple[int, ...]]:
    """
    Array path -> the shape that its metadata in a shard claims, held against every limit.

    Raises Invalid for metadata that is not ours, and for more than so many pairs and tokens can have.
    """
    specs = schema(len(bounds.features), bounds.top_logits > 0)
    shapes = {path: _shape(path, spec, members) for path, spec in specs.items()}
    n_pairs, n_tokens = shapes["pair_id"][0], shapes["input_ids"][0]
    check_counts(n_pairs, n_tokens)
    for path, shape in shapes.items():
        most = [_most(path, axis, n_pairs, n_tokens, bounds) for axis in specs[path].dimensions]
        if any(claimed > limit for claimed, limit in zip(shape, most, strict=True)):
            raise Invalid(f"{path} claims the shape {list(shape)} for {n_pairs} pairs with {n_tokens} tokens")
    raw = sum(math.prod(shape) * np.dtype(specs[path].dtype).itemsize for path, shape in shapes.items())
    if raw > MAX_RAW_BYTES:
        raise Invalid(f"its arrays claim {raw} bytes, a shard holds at most {MAX_RAW_BYTES}")
    return shapes


def _arrays_of(pairs: Pairs) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {name: getattr(pairs, name) for name in _PAIRS}
    for n, features in enumerate(pairs.features):
        arrays |= {f"features/{n}/{name}": getattr(features, name) for name in _FEATURES}
    if pairs.top_logits is not None:
        arrays |= {f"top_logits/{name}": getattr(pairs.top_logits, name) for name in _TOP_LOGITS}
    return arrays


def _pairs_of(arrays: dict[str, NDArray[Any]], bounds: Bounds) -> Pairs:
    def part(prefix: str, names: dict[str, ArraySpec]) -> dict[str, NDArray[Any]]:
        return {name: arrays[f"{prefix}/{name}"] for name in names}

    features = tuple(Features(**part(f"features/{n}", _FEATURES)) for n in range(len(bounds.features)))
    top = TopLogits(**part("top_logits", _TOP_LOGITS)) if bounds.top_logits else None
    rows: dict[str, Any] = {name: arrays[name] for name in _PAIRS}
    return Pairs(**rows, features=features, top_logits=top)


def _group_members(bounds: Bounds, key: str, sid: int, n_pairs: int, n_tokens: int) -> dict[str, bytes]:
    """The `zarr.json` of every group; the root's attributes tie the shard to its place in its cache."""
    root = {"format": FORMAT_VERSION, "key": key, "n_pairs": n_pairs, "n_tokens": n_tokens, "shard": sid}
    groups: dict[str, dict[str, Any]] = {"zarr.json": root}
    if bounds.features:
        groups["features/zarr.json"] = {}
        groups |= {f"features/{n}/zarr.json": {} for n in range(len(bounds.features))}
    if bounds.top_logits:
        groups["top_logits/zarr.json"] = {}
    return {
        name: canonical_json({"attributes": attributes, "node_type": "group", "zarr_format": 3})
        for name, attributes in groups.items()
    }


def _most(path: str, axis: str, n_pairs: int, n_tokens: int, bounds: Bounds) -> int:
    """The largest extent of an array's axis that so many pairs and tokens can have."""
    if axis != "entry":
        sizes = {"pair": n_pairs, "byte": 16, "token": n_tokens, "scored_token": n_tokens, "side": 2}
        return {**sizes, "boundary": 3 * n_pairs + 1, "rank": bounds.top_logits}[axis]
    d_sae, top_k = bounds.features[int(path.split("/")[1])]
    return 2 * n_pairs * min(top_k or d_sae, d_sae)


def _array_metadata(spec: ArraySpec, shape: tuple[int, ...]) -> bytes:
    return canonical_json(
        {
            "attributes": {},
            # Zarr has no chunk of length 0: an empty array is one that has no chunk.
            "chunk_grid": {"configuration": {"chunk_shape": [max(n, 1) for n in shape]}, "name": "regular"},
            "chunk_key_encoding": {"configuration": {"separator": "/"}, "name": "default"},
            "codecs": [
                {"configuration": {"endian": "little"}, "name": "bytes"},
                {"configuration": {"checksum": True, "level": 1}, "name": "zstd"},
            ],
            "data_type": spec.dtype,
            "dimension_names": list(spec.dimensions),
            "fill_value": _FILL[spec.dtype],
            "node_type": "array",
            "shape": list(shape),
            "storage_transformers": [],
            "zarr_format": 3,
        }
    )


def _chunk_name(path: str, spec: ArraySpec) -> str:
    return path + "/c" + "/0" * len(spec.dimensions)


def _shape(path: str, spec: ArraySpec, members: dict[str, memoryview]) -> tuple[int, ...]:
    """The shape that the array's metadata states, once the metadata is exactly ours."""
    metadata = bytes(members.get(f"{path}/zarr.json", b"")[:4096])
    try:
        claimed = json.loads(metadata)["shape"]
        shape = tuple(n for n in claimed if type(n) is int and 0 <= n <= MAX_RAW_BYTES)
        known = len(shape) == len(spec.dimensions) and metadata == _array_metadata(spec, shape)
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise Invalid(f"{path}/zarr.json inside it is missing or not what this format writes")
    return shape


def _decode(path: str, spec: ArraySpec, shape: tuple[int, ...], members: dict[str, memoryview]) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    nbytes = math.prod(shape) * dtype.itemsize
    # Asked before anything is allocated: a frame of 32 kB may announce a gigabyte.
    if nbytes and _zstd_content_size(members[_chunk_name(path, spec)]) != nbytes:
        raise Invalid(f"{path} does not hold the {nbytes} bytes of its shape in one frame")
    array = np.empty(shape, dtype)
    if nbytes:
        try:
            zstd.decompress(members[_chunk_name(path, spec)], array.reshape(-1).view(np.uint8))
        except (RuntimeError, ValueError) as error:
            raise Invalid(f"{path} does not decompress ({error})") from error
    return array.astype(spec.dtype, copy=False)


def _zstd_content_size(frame: memoryview) -> int:
    """
    The size that a zstd frame with a checksum and no dictionary announces (RFC 8878, 3.1.1), else -1; also where the
    frame is not all that is there: a decompressor would unpack what lies behind it, or keep silent about it.
    """
    if len(frame) < 9 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = frame[4]
    has_checksum, has_dictionary, single_segment = descriptor & 4, descriptor & 3, descriptor & 32
    if not has_checksum or has_dictionary:
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
