"""
A shard of a cache, or of one of its columns, <-> its bytes: one Zarr v3 group in one deterministic zip
(docs/cache-format.md).

Every array's `zarr.json` follows from its name and shape alone, so a reader compares it byte for byte
with what a writer would have written: any other codec, dtype, chunking, fill value or attribute is refused
without being interpreted. Sizes are checked before anything is allocated.

Dimension key:  G groups   K completions   T tokens   C scored completion tokens   N entries of a column   R its rows
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fpo.store.format.archive import pack, unpack
from fpo.store.format.arrays import (
    MAX_DOCUMENT_BYTES,
    MAX_RAW_BYTES,
    ArraySpec,
    claimed_shapes,
    decode_arrays,
    encode_arrays,
    group_document,
)
from fpo.store.format.columns import KINDS, Column, Features
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import (
    BaseBounds,
    Bounds,
    ColumnBounds,
    Invalid,
    check_column,
    check_counts,
    check_group_ids,
    check_groups,
)
from fpo.store.format.key import FORMAT_VERSION
from fpo.store.format.ragged import U64

MAX_FILE_BYTES = MAX_RAW_BYTES + 2**24
"""zstd adds at most 0.4 % to incompressible data; the members' names and metadata are a few kilobytes."""

_BASE = {
    "group_id": ArraySpec("uint64", ("group",)),
    "n_completions": ArraySpec("uint32", ("group",)),
    "completion_digest": ArraySpec("uint8", ("completion", "byte")),
    "input_ids": ArraySpec("uint32", ("token",)),
    "splits": ArraySpec("uint64", ("boundary",)),
    "score": ArraySpec("float32", ("completion",)),
    "weight": ArraySpec("float32", ("group",)),
    "ref_logps": ArraySpec("float32", ("completion",)),
    "token_logps": ArraySpec("float32", ("scored_token",)),
}
_MASK = {"score_mask": ArraySpec("uint8", ("scored_token",))}
_ROWS = {"group_id": ArraySpec("uint64", ("group",)), "splits": ArraySpec("uint64", ("boundary",))}
_FEATURES = {
    "indices": ArraySpec("uint32", ("entry",)),
    "acts": ArraySpec("float32", ("entry",)),
    "active": ArraySpec("uint32", ("row",)),
    "tail_sq": ArraySpec("float32", ("row",)),
}
_TOP_LOGITS = {
    "indices": ArraySpec("uint32", ("entry", "rank")),
    "logps": ArraySpec("float32", ("entry", "rank")),
}
_COLUMNS = {
    "features": _ROWS | _FEATURES,
    "prompt_features": _ROWS | _FEATURES,
    "top_logits": _ROWS | _TOP_LOGITS,
    "hidden_gram": _ROWS | {"products": ArraySpec("float32", ("entry",))},
    "mismatched": _ROWS
    | {
        "input_ids": ArraySpec("uint32", ("entry",)),
        "score_mask": ArraySpec("uint8", ("entry",)),
        "ref_logps": ArraySpec("float32", ("row",)),
    },
}


@dataclass(frozen=True, eq=False)
class ColumnRows:
    """A shard of a column: its rows, and whose they are."""

    group_id: U64
    """(G,)"""
    n_completions: int
    """K, of all groups together."""
    column: Column

    def __len__(self) -> int:
        return len(self.group_id)

    @property
    def n_tokens(self) -> int:
        """0: the tokens stand in the base."""
        return 0


Rows = Groups | ColumnRows


def schema(bounds: Bounds) -> dict[str, ArraySpec]:
    """Array name inside a shard -> its dtype and dimensions."""
    if isinstance(bounds, BaseBounds):
        return _BASE | (_MASK if bounds.score_mask else {})
    return _COLUMNS[bounds.kind]


def counts_of(rows: Rows) -> tuple[int, int, int]:
    """Groups, completions and tokens."""
    n_completions = len(rows.completion_digest) if isinstance(rows, Groups) else rows.n_completions
    return len(rows), n_completions, rows.n_tokens


def encode_shard(rows: Rows, key: str, sid: int, bounds: Bounds) -> bytes:
    """
    The bytes of shard `sid` of the cache or column `key`; the same rows always give the same bytes.

    Raises Invalid where an invariant does not hold or the shard is too large.
    """
    _check(rows, bounds)
    arrays = _arrays_of(rows, bounds)
    raw = sum(array.nbytes for array in arrays.values())
    if raw > MAX_RAW_BYTES:
        raise Invalid(f"its arrays take {raw} bytes, a shard holds at most {MAX_RAW_BYTES}")
    return pack(encode_arrays(arrays, schema(bounds), _attributes(key, sid, *counts_of(rows))))


def decode_shard(data: bytes, key: str, sid: int, bounds: Bounds) -> Rows:
    """
    The rows of shard `sid` of the cache or column `key`, all invariants checked.

    Raises Invalid for any bytes that `encode_shard` does not write for some rows.
    """
    members = unpack(data)
    counts = claimed_counts(members, key, sid)
    arrays = decode_arrays(members, schema(bounds), array_shapes(members, counts, bounds))
    rows = _rows_of(arrays, counts[1], bounds)
    if counts_of(rows) != counts:
        raise Invalid(f"its arrays hold {_counted(counts_of(rows))}, its zarr.json says {_counted(counts)}")
    _check(rows, bounds)
    return rows


def claimed_counts(members: dict[str, memoryview], key: str, sid: int) -> tuple[int, int, int]:
    """Groups, completions and tokens as the group's attributes say. Raises Invalid for attributes that are not ours."""
    document = bytes(members.get("zarr.json", b"")[:MAX_DOCUMENT_BYTES])
    try:
        said = json.loads(document)["attributes"]
        counts = tuple(said[name] for name in ("n_groups", "n_completions", "n_tokens"))
        known = document == group_document(_attributes(key, sid, *counts))
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise Invalid(f"zarr.json inside it is not that of shard {sid} of {key[:12]}")
    return counts


def array_shapes(
    members: dict[str, memoryview], counts: tuple[int, int, int], bounds: Bounds
) -> dict[str, tuple[int, ...]]:
    """
    Array name -> the shape that its metadata in a shard claims, held against every limit.

    Raises Invalid for metadata that is not ours, and for more than so many groups, completions and tokens can have.
    """
    specs = schema(bounds)
    shapes = claimed_shapes(members, specs)
    check_counts(*counts)
    for name, shape in shapes.items():
        most = [_most(axis, counts, bounds) for axis in specs[name].dimensions]
        if any(claimed > limit for claimed, limit in zip(shape, most, strict=True)):
            raise Invalid(f"{name} claims the shape {list(shape)} for {_counted(counts)}")
    return shapes


def _check(rows: Rows, bounds: Bounds) -> None:
    if isinstance(rows, Groups):
        assert isinstance(bounds, BaseBounds)
        check_groups(rows, bounds)
    else:
        assert isinstance(bounds, ColumnBounds)
        check_counts(*counts_of(rows))
        check_group_ids(rows.group_id)
        check_column(rows.column, len(rows), rows.n_completions, bounds)


def _arrays_of(rows: Rows, bounds: Bounds) -> dict[str, NDArray[Any]]:
    if isinstance(rows, Groups):
        return {name: getattr(rows, name) for name in schema(bounds)}
    return {"group_id": rows.group_id} | {
        name: getattr(rows.column, name) for name in schema(bounds) if name != "group_id"
    }


def _rows_of(arrays: dict[str, Any], n_completions: int, bounds: Bounds) -> Rows:
    if isinstance(bounds, BaseBounds):
        return Groups(**arrays)
    group_id = arrays.pop("group_id")
    return ColumnRows(group_id, n_completions, KINDS[bounds.kind](**arrays))


def _attributes(key: str, sid: int, n_groups: int, n_completions: int, n_tokens: int) -> dict[str, Any]:
    """Of the group: they tie the shard to its place in its cache."""
    return {
        "format": FORMAT_VERSION,
        "key": key,
        "n_completions": n_completions,
        "n_groups": n_groups,
        "n_tokens": n_tokens,
        "shard": sid,
    }


def _most(axis: str, counts: tuple[int, int, int], bounds: Bounds) -> int:
    """The largest extent of an array's axis that so many groups, completions and tokens can have."""
    n_groups, n_completions, n_tokens = counts
    if isinstance(bounds, BaseBounds):
        sizes = {"group": n_groups, "completion": n_completions, "byte": 16, "token": n_tokens}
        return {**sizes, "scored_token": n_tokens, "boundary": n_groups + n_completions + 1}[axis]
    kind = KINDS[bounds.kind]
    rows = n_groups if kind.PER == "group" else n_completions
    entries = MAX_RAW_BYTES // 4
    if issubclass(kind, Features):
        entries = rows * min(bounds.top_k or bounds.d_sae, bounds.d_sae)
    return {"group": n_groups, "boundary": rows + 1, "row": rows, "entry": entries, "rank": bounds.m}[axis]


def _counted(counts: tuple[int, int, int]) -> str:
    return f"{counts[0]} groups with {counts[1]} completions and {counts[2]} tokens"
