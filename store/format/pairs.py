"""
What is known about a run of pairs: the rows of one shard, or of several put together.

Everything ragged is a flat array with its `splits`: segment `i` is `flat[splits[i]:splits[i + 1]]`.

Dimension key:  P pairs   T tokens   C scored completion tokens   N kept features   m top logits
Completions are numbered `2 * pair + side`; side 0 is chosen, 1 is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Features:
    """Pooled SAE activations of P pairs at one hookpoint."""

    indices: U32
    """(N,) ascending inside a completion."""

    acts: F32
    """(N,) mean activation over the completion's tokens."""

    splits: U64
    """(2P+1,) where each completion starts in `indices` and `acts`."""

    active: U32
    """(P, 2) pooled features that were non-zero before the top-k cut."""

    tail_sq: F32
    """(P, 2) sum of squares of the pooled activations that were not kept."""

    def take(self, rows: ArrayLike) -> Features:
        """The features of these pairs, in this order."""
        rows = _positions(rows, len(self.active))
        entries, splits = gather(self.splits, _completions(rows))
        return Features(self.indices[entries], self.acts[entries], splits, self.active[rows], self.tail_sq[rows])

    @staticmethod
    def concat(parts: Sequence[Features]) -> Features:
        """One after the other; at least one part."""
        return Features(
            indices=np.concatenate([p.indices for p in parts]),
            acts=np.concatenate([p.acts for p in parts]),
            splits=_join_splits([p.splits for p in parts]),
            active=np.concatenate([p.active for p in parts]),
            tail_sq=np.concatenate([p.tail_sq for p in parts]),
        )


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The reference's m most likely tokens at each scored completion position."""

    indices: U32
    """(C, m) token ids."""

    logps: F32
    """(C, m) their log-probs, nats."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs and everything the reference says about them."""

    pair_id: U64
    """(P,) row in the dataset."""

    pair_digest: U8
    """(P, 16) digest of the pair's token ids, see `pair_digests`."""

    input_ids: U32
    """(T,) prompt, chosen, rejected, back to back."""

    splits: U64
    """(3P+1,) where each prompt, chosen and rejected starts in `input_ids`."""

    ref_logps: F32
    """(P, 2) sum of the completion's `token_logps`, accumulated in float64, nats."""

    token_logps: F32
    """(C,) per scored completion token, chosen then rejected, pair by pair, nats."""

    features: tuple[Features, ...]
    """One per hookpoint, in the recipe's order."""

    top_logits: TopLogits | None = None
    """Optional extra."""

    def __len__(self) -> int:
        return len(self.pair_id)

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> I64:
        """(P, 3) token counts of prompt, chosen and rejected."""
        return lengths_of(self.splits).reshape(-1, 3)

    @property
    def n_completions(self) -> U32:
        """(P,) two each."""
        return np.full(len(self), 2, np.uint32)

    @cached_property
    def completion_splits(self) -> I64:
        """
        (2P+1,) where each completion starts in `token_logps`. With an empty prompt the first
        token of a completion has nothing before it and is not scored.
        """
        return starts_of(scored_lengths(self.lengths).ravel())

    def take(self, rows: ArrayLike) -> Pairs:
        """
        The pairs at these positions (not ids), in this order; a position may repeat.

        Raises IndexError for a position outside 0..P-1.
        """
        rows = _positions(rows, len(self))
        tokens, splits = gather(self.splits, (3 * rows[:, None] + np.arange(3)).ravel())
        scored, _ = gather(self.completion_splits, _completions(rows))
        top = self.top_logits
        return Pairs(
            pair_id=self.pair_id[rows],
            pair_digest=self.pair_digest[rows],
            input_ids=self.input_ids[tokens],
            splits=splits,
            ref_logps=self.ref_logps[rows],
            token_logps=self.token_logps[scored],
            features=tuple(f.take(rows) for f in self.features),
            top_logits=None if top is None else TopLogits(top.indices[scored], top.logps[scored]),
        )

    @staticmethod
    def concat(parts: Sequence[Pairs]) -> Pairs:
        """
        One after the other. At least one part, all with the same hookpoints and extras.

        Raises ValueError where they differ.
        """
        if not parts:
            raise ValueError("Pairs.concat needs at least one part: hookpoints and extras come from it")
        tops = [p.top_logits for p in parts if p.top_logits is not None]
        if len({len(p.features) for p in parts}) > 1 or len(tops) not in (0, len(parts)):
            raise ValueError("Pairs.concat: the parts differ in hookpoints or extras")
        return Pairs(
            pair_id=np.concatenate([p.pair_id for p in parts]),
            pair_digest=np.concatenate([p.pair_digest for p in parts]),
            input_ids=np.concatenate([p.input_ids for p in parts]),
            splits=_join_splits([p.splits for p in parts]),
            ref_logps=np.concatenate([p.ref_logps for p in parts]),
            token_logps=np.concatenate([p.token_logps for p in parts]),
            features=tuple(
                Features.concat(list(hookpoint)) for hookpoint in zip(*(p.features for p in parts), strict=True)
            ),
            top_logits=TopLogits(np.concatenate([t.indices for t in tops]), np.concatenate([t.logps for t in tops]))
            if tops
            else None,
        )


def scored_lengths(lengths: NDArray[np.integer[Any]]) -> I64:
    """(P, 3) token counts -> (P, 2) scored tokens per completion: those that something precedes."""
    counts = np.asarray(lengths, dtype=np.int64)
    scored: I64 = np.maximum(counts[:, 1:] - (counts[:, :1] == 0), 0)
    return scored


def starts_of(lengths: NDArray[np.integer[Any]]) -> I64:
    """(n,) segment lengths -> (n+1,) splits."""
    splits = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def lengths_of(splits: NDArray[np.integer[Any]]) -> I64:
    """(n+1,) splits -> (n,) segment lengths."""
    bounds = splits.astype(np.int64)
    return np.asarray(bounds[1:] - bounds[:-1], dtype=np.int64)


def _positions(rows: ArrayLike, n: int) -> I64:
    positions = np.asarray(rows, dtype=np.int64).reshape(-1)
    # A negative position is not "from the end" here: in `splits` it would name another segment.
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise IndexError(f"positions must lie in 0..{n - 1}, got {positions.min()}..{positions.max()}")
    return positions


def _completions(rows: I64) -> I64:
    """(R,) pair positions -> (2R,) completion positions."""
    return np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)


def gather(splits: NDArray[np.integer[Any]], segments: I64) -> tuple[I64, U64]:
    """Positions in the flat array of these segments, and the splits of the result."""
    bounds = splits.astype(np.int64)
    lengths = bounds[segments + 1] - bounds[segments]
    new = starts_of(lengths)
    flat: I64 = np.arange(new[-1]) + np.repeat(bounds[segments] - new[:-1], lengths)
    return flat, new.astype(np.uint64)


def _join_splits(parts: Sequence[U64]) -> U64:
    return starts_of(np.concatenate([lengths_of(p) for p in parts])).astype(np.uint64)
