"""
Rows of unequal length in flat arrays: segment `i` is `flat[splits[i]:splits[i + 1]]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


def starts_of(lengths: ArrayLike) -> I64:
    """(n,) segment lengths -> (n+1,) splits."""
    sizes = np.asarray(lengths, dtype=np.int64)
    splits = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=splits[1:])
    return splits


def lengths_of(splits: NDArray[np.integer[Any]]) -> I64:
    """(n+1,) splits -> (n,) segment lengths."""
    bounds = splits.astype(np.int64)
    return np.asarray(bounds[1:] - bounds[:-1], dtype=np.int64)


def positions_in(rows: ArrayLike, n: int) -> I64:
    """Rows as int64. Raises IndexError for one outside 0..n-1."""
    positions = np.asarray(rows, dtype=np.int64).reshape(-1)
    # A negative position is not "from the end" here: in `splits` it would name another segment.
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise IndexError(f"positions must lie in 0..{n - 1}, got {positions.min()}..{positions.max()}")
    return positions


def gather(splits: NDArray[np.integer[Any]], segments: I64) -> tuple[I64, U64]:
    """Positions in the flat array of these segments, and the splits of the result."""
    bounds = splits.astype(np.int64)
    lengths = bounds[segments + 1] - bounds[segments]
    new = starts_of(lengths)
    flat: I64 = np.arange(new[-1]) + np.repeat(bounds[segments] - new[:-1], lengths)
    return flat, new.astype(np.uint64)


def join_splits(parts: Sequence[NDArray[np.integer[Any]]]) -> U64:
    """The splits of segments put behind each other."""
    return starts_of(np.concatenate([lengths_of(p) for p in parts])).astype(np.uint64)


@dataclass(frozen=True, eq=False)
class Ragged:
    """R rows, each with any number of entries. A subclass names its arrays."""

    ENTRIES: ClassVar[tuple[str, ...]]
    """Arrays with one element per entry, (N, ...)."""
    ROWS: ClassVar[tuple[str, ...]] = ()
    """Arrays with one element per row, (R,)."""

    splits: U64
    """(R+1,) where each row starts among the entries."""

    def __len__(self) -> int:
        return len(self.splits) - 1

    @property
    def lengths(self) -> I64:
        """(R,) entries of each row."""
        return lengths_of(self.splits)

    def take(self, rows: ArrayLike) -> Self:
        """These rows, in this order; one may repeat. Raises IndexError for a row outside 0..R-1."""
        at = positions_in(rows, len(self))
        entries, splits = gather(self.splits, at)
        return type(self)(
            splits=splits,
            **{name: getattr(self, name)[entries] for name in self.ENTRIES},
            **{name: getattr(self, name)[at] for name in self.ROWS},
        )

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """One after the other; at least one part."""
        return cls(
            splits=join_splits([part.splits for part in parts]),
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in (*cls.ENTRIES, *cls.ROWS)},
        )

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return int(self.splits.nbytes + sum(getattr(self, name).nbytes for name in (*self.ENTRIES, *self.ROWS)))
