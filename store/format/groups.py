"""
The base of a cache in memory: groups, and what the reference says about them. Columns stand beside it (`columns`).

Dimension key:  G groups   K completions, group by group   T tokens   C scored completion tokens, in their order
A completion token is scored where something precedes it: after an empty prompt the first of each completion is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpo.store.format.columns import Column
from fpo.store.format.ragged import F32, I64, U8, U32, U64, gather, join_splits, lengths_of, positions_in, starts_of


@dataclass(frozen=True, eq=False)
class Groups:
    """Some groups: those of one shard, or of several put together."""

    group_id: U64
    """(G,) row in the dataset."""

    n_completions: U32
    """(G,) at least 1."""

    completion_digest: U8
    """(K, 16) of prompt ids, completion ids and mask, see `completion_digests`."""

    input_ids: U32
    """(T,) a prompt, then its completions, the preferred ones first, back to back."""

    splits: U64
    """(G+K+1,) where each prompt and each completion starts in `input_ids`."""

    score: F32
    """(K,) what the data says of a completion: rating, rank or label; NaN where it says nothing."""

    weight: F32
    """(G,) what the group counts for; 1 where the data says nothing."""

    ref_logps: F32
    """(K,) sum of the `token_logps` that count, accumulated in float64, nats."""

    token_logps: F32
    """(C,) log-prob of every scored token, nats."""

    score_mask: U8 | None = None
    """(C,) 0: this token counts in no objective and no pooling. None where all tokens of the data count."""

    columns: tuple[Column, ...] = ()
    """In the order in which they were asked for."""

    def __len__(self) -> int:
        return len(self.group_id)

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @cached_property
    def completion_starts(self) -> I64:
        """(G+1,) where the completions of each group start among all K."""
        return starts_of(self.n_completions)

    @cached_property
    def lengths(self) -> tuple[I64, I64]:
        """Tokens of every prompt (G,) and of every completion (K,)."""
        return segment_lengths(self.splits, self.n_completions)

    @cached_property
    def sizes(self) -> I64:
        """(G,) tokens of every group: its prompt once, and its completions."""
        return group_sizes(self.splits, self.n_completions)

    @cached_property
    def scored_splits(self) -> I64:
        """(K+1,) where each completion starts in `token_logps`."""
        return scored_splits(self.splits, self.n_completions)

    @cached_property
    def counted(self) -> I64:
        """(K,) tokens of every completion that count: what a mean log-prob is divided by."""
        if self.score_mask is None:
            return lengths_of(self.scored_splits)
        running = starts_of(self.score_mask)
        return np.asarray(running[self.scored_splits[1:]] - running[self.scored_splits[:-1]], dtype=np.int64)

    def take(self, rows: ArrayLike) -> Groups:
        """
        The groups at these positions (not ids), in this order; a position may repeat.

        Raises IndexError for a position outside 0..G-1.
        """
        at = positions_in(rows, len(self))
        completions, _ = gather(self.completion_starts, at)
        tokens, splits = gather(self.splits, segments_of(self.n_completions, at))
        scored, _ = gather(self.scored_splits, completions)
        return Groups(
            group_id=self.group_id[at],
            n_completions=self.n_completions[at],
            completion_digest=self.completion_digest[completions],
            input_ids=self.input_ids[tokens],
            splits=splits,
            score=self.score[completions],
            weight=self.weight[at],
            ref_logps=self.ref_logps[completions],
            token_logps=self.token_logps[scored],
            score_mask=None if self.score_mask is None else self.score_mask[scored],
            columns=tuple(column.take(at if column.PER == "group" else completions) for column in self.columns),
        )

    def with_columns(self, columns: Sequence[Column]) -> Groups:
        """The same groups with these columns. Raises ValueError for one of another number of rows."""
        for column in columns:
            rows = len(self) if column.PER == "group" else len(self.completion_digest)
            if len(column) != rows:
                raise ValueError(f"{type(column).__name__} has {len(column)} rows, the groups have {rows}")
        return replace(self, columns=tuple(columns))

    @staticmethod
    def concat(parts: Sequence[Groups]) -> Groups:
        """
        One after the other. At least one part, all with the same columns, masks in all or none.

        Raises ValueError where they differ.
        """
        if not parts:
            raise ValueError("Groups.concat needs at least one part: columns come from it")
        kinds = {tuple(type(column) for column in part.columns) for part in parts}
        masks = [part.score_mask for part in parts if part.score_mask is not None]
        if len(kinds) > 1 or len(masks) not in (0, len(parts)):
            raise ValueError("Groups.concat: the parts differ in columns or masks")

        def joined(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        names = ("group_id", "n_completions", "completion_digest", "input_ids", "score", "weight", "ref_logps")
        arrays: dict[str, Any] = {name: joined(name) for name in (*names, "token_logps")}
        beside = zip(*(part.columns for part in parts), strict=True)
        return Groups(
            **arrays,
            splits=join_splits([part.splits for part in parts]),
            score_mask=np.concatenate(masks) if masks else None,
            columns=tuple(kind.concat(columns) for kind, columns in zip(next(iter(kinds)), beside, strict=True)),
        )


def segment_lengths(splits: NDArray[np.integer[Any]], n_completions: NDArray[np.integer[Any]]) -> tuple[I64, I64]:
    """(G+K+1,) splits -> tokens of every prompt (G,) and of every completion (K,)."""
    lengths = lengths_of(splits)
    prompts = starts_of(np.asarray(n_completions, dtype=np.int64) + 1)[:-1]
    return lengths[prompts], np.delete(lengths, prompts)


def segments_of(n_completions: NDArray[np.integer[Any]], rows: I64) -> I64:
    """Which of the G+K segments belong to these groups, in order: the prompt, then its completions."""
    return gather(starts_of(np.asarray(n_completions, dtype=np.int64) + 1), rows)[0]


def group_sizes(splits: NDArray[np.integer[Any]], n_completions: NDArray[np.integer[Any]]) -> I64:
    """(G,) tokens of every group: its prompt once, and its completions."""
    return lengths_of(splits[starts_of(np.asarray(n_completions, dtype=np.int64) + 1)])


def scored_splits(splits: NDArray[np.integer[Any]], n_completions: NDArray[np.integer[Any]]) -> I64:
    """(K+1,) where the scored tokens of every completion start: of those that something precedes."""
    prompts, completions = segment_lengths(splits, n_completions)
    return starts_of(np.maximum(completions - np.repeat(prompts == 0, n_completions), 0))


def summed_logps(token_logps: F32, scored_splits: I64, score_mask: U8 | None = None) -> F32:
    """(K,) `ref_logps`: the sum of each completion's counting `token_logps`, accumulated in float64."""
    values = token_logps.astype(np.float64)
    if score_mask is not None:
        values *= score_mask
    bounds = itertools.pairwise(scored_splits.tolist())
    # Summed one by one: a difference of running sums over a shard would lose digits of short completions.
    return np.array([values[start:end].sum() for start, end in bounds], dtype=np.float32)
