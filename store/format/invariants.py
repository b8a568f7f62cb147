"""
What must hold in every shard, whatever its checksum says.

Dimension key:  G groups   K completions   T tokens   C scored completion tokens   N entries   R rows   m top logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.store.format.columns import KINDS, Column, Features, HiddenGram, Mismatched, TopLogits
from fpo.store.format.groups import Groups, scored_splits
from fpo.store.format.key import completion_digests
from fpo.store.format.ragged import F32, U8, U32, U64

LOGP_SLACK = 1e-3
"""A log-prob is at most 0; rounding in another kernel's log-sum-exp may leave this much above."""

SUM_RTOL, SUM_ATOL = 1e-5, 1e-3
"""`ref_logps` against the sum of the stored `token_logps`: float32 rounding of each is 6e-8 relative."""

NAN_BITS = 0x7FC00000
"""The one NaN that a `score` may be: other bit patterns would be other bytes for the same fact."""

MAX_SHARD_GROUPS = 2**16
MAX_SHARD_COMPLETIONS = 2**18
MAX_SHARD_TOKENS = 2**20
MAX_GROUP_TOKENS = 2**22
"""Of one shard; a group that is longer than MAX_SHARD_TOKENS has a shard alone (see `plan`)."""


class Invalid(ValueError):
    """Says in one clause why bytes or arrays are not a shard; whoever knows the file adds its name."""


@dataclass(frozen=True)
class BaseBounds:
    """The sizes that a cache's recipe promises."""

    vocab_size: int
    score_mask: bool


@dataclass(frozen=True)
class ColumnBounds:
    """The sizes that a column's recipe promises; 0 and None where they are no matter of its kind."""

    kind: str
    d_sae: int = 0
    top_k: int | None = None
    """None keeps every non-zero feature."""
    m: int = 0
    vocab_size: int = 0


Bounds = BaseBounds | ColumnBounds


def check_counts(n_groups: int, n_completions: int, n_tokens: int) -> None:
    """Raises Invalid for more than a shard holds: asked before anything is allocated for it."""
    most = MAX_SHARD_TOKENS if n_groups != 1 else MAX_GROUP_TOKENS
    if n_groups > MAX_SHARD_GROUPS or n_completions > MAX_SHARD_COMPLETIONS or n_tokens > most:
        raise Invalid(
            f"{n_groups} groups with {n_completions} completions and {n_tokens} tokens, a shard holds at most "
            f"{MAX_SHARD_GROUPS}, {MAX_SHARD_COMPLETIONS} and {MAX_SHARD_TOKENS}, or one group of at most "
            f"{MAX_GROUP_TOKENS} tokens"
        )


def check_group_ids(group_id: U64) -> None:
    """Raises Invalid for what is no list of different groups."""
    _array("group_id", group_id, np.uint64, (len(group_id),))
    if len(np.unique(group_id)) != len(group_id):
        raise Invalid("group_id holds the same group twice")


def check_groups(groups: Groups, bounds: BaseBounds) -> None:
    """Raises Invalid with the array, the place and the value, at the first thing that does not hold."""
    G, K = len(groups.group_id), len(groups.completion_digest)
    check_counts(G, K, len(groups.input_ids))
    check_group_ids(groups.group_id)
    _array("n_completions", groups.n_completions, np.uint32, (G,))
    if int(groups.n_completions.sum(dtype=np.uint64)) != K or not groups.n_completions.all():
        raise Invalid(f"n_completions holds a 0, or does not add up to the {K} rows of completion_digest")
    _array("completion_digest", groups.completion_digest, np.uint8, (K, 16))
    _array("input_ids", groups.input_ids, np.uint32, (len(groups.input_ids),))
    _splits("splits", groups.splits, G + K, len(groups.input_ids))
    _below("input_ids", groups.input_ids, bounds.vocab_size, "vocab_size")
    scored = scored_splits(groups.splits, groups.n_completions)
    _check_mask(groups, int(scored[-1]), bounds)
    made = completion_digests(groups.input_ids, groups.splits, groups.n_completions, groups.score_mask)
    wrong = (made != groups.completion_digest).any(axis=1)
    if wrong.any():
        raise Invalid(f"completion_digest[{int(wrong.argmax())}] is not the digest of that completion's tokens")
    _check_labels(groups)
    _check_logps(groups, int(scored[-1]))


def check_column(column: Column, n_groups: int, n_completions: int, bounds: ColumnBounds) -> None:
    """Raises Invalid with the array, the place and the value, at the first thing that does not hold."""
    kind = KINDS[bounds.kind]
    if type(column) is not kind:
        raise Invalid(f"it holds {type(column).__name__}, the recipe says {bounds.kind}")
    rows = n_groups if kind.PER == "group" else n_completions
    entries = len(getattr(column, kind.ENTRIES[0]))
    _splits("splits", column.splits, rows, entries)
    if isinstance(column, Features):
        _check_features(column, rows, bounds)
    elif isinstance(column, TopLogits):
        _array("indices", column.indices, np.uint32, (entries, bounds.m))
        _array("logps", column.logps, np.float32, (entries, bounds.m))
        _below("indices", column.indices, bounds.vocab_size, "vocab_size")
        _log_probs("logps", column.logps)
    elif isinstance(column, HiddenGram):
        _array("products", column.products, np.float32, (entries,))
        _finite("products", column.products)
    elif isinstance(column, Mismatched):
        _array("input_ids", column.input_ids, np.uint32, (entries,))
        _below("input_ids", column.input_ids, bounds.vocab_size, "vocab_size")
        _array("score_mask", column.score_mask, np.uint8, (entries,))
        _check_counts_or_not(column.score_mask)
        _array("ref_logps", column.ref_logps, np.float32, (rows,))
        _log_probs("ref_logps", column.ref_logps)


def check_beside(column: Column, groups: Groups) -> None:
    """Raises Invalid where a column does not have the rows, or the entries, that these groups ask for."""
    rows = len(groups) if column.PER == "group" else len(groups.completion_digest)
    if len(column) != rows:
        raise Invalid(f"it has {len(column)} rows, the groups ask for {rows}")
    if isinstance(column, TopLogits) and not np.array_equal(column.splits, groups.scored_splits):
        raise Invalid("its splits are not those of the scored tokens")
    if isinstance(column, HiddenGram):
        n = groups.n_completions.astype(np.int64)
        if not np.array_equal(column.lengths, n * n):
            raise Invalid("its rows are not the squares of the groups' completions")


def _check_mask(groups: Groups, C: int, bounds: BaseBounds) -> None:
    mask = groups.score_mask
    if (mask is not None) != bounds.score_mask:
        raise Invalid(f"score_mask {'is missing' if mask is None else 'is there'}, the recipe says {bounds.score_mask}")
    if mask is not None:
        _array("score_mask", mask, np.uint8, (C,))
        _check_counts_or_not(mask)


def _check_counts_or_not(mask: U8) -> None:
    if mask.size and mask.max() > 1:
        raise Invalid(f"score_mask holds {int(mask.max())}: a token counts (1) or not (0)")


def _check_labels(groups: Groups) -> None:
    G, K = len(groups), len(groups.completion_digest)
    _array("score", groups.score, np.float32, (K,))
    _array("weight", groups.weight, np.float32, (G,))
    said = np.isfinite(groups.score) | (groups.score.view(np.uint32) == NAN_BITS)
    if not said.all():
        raise Invalid(f"score[{int((~said).argmax())}] is neither a number nor the NaN that says nothing")
    if not (np.isfinite(groups.weight) & (groups.weight > 0)).all():
        raise Invalid("weight holds what is no number above 0")


def _check_logps(groups: Groups, C: int) -> None:
    K = len(groups.completion_digest)
    _array("token_logps", groups.token_logps, np.float32, (C,))
    _array("ref_logps", groups.ref_logps, np.float32, (K,))
    _log_probs("token_logps", groups.token_logps)
    _finite("ref_logps", groups.ref_logps)
    counting = groups.token_logps if groups.score_mask is None else groups.token_logps * groups.score_mask
    running = np.concatenate([[0.0], np.cumsum(counting, dtype=np.float64)])
    sums = running[groups.scored_splits[1:]] - running[groups.scored_splits[:-1]]
    wrong = np.abs(groups.ref_logps - sums) > SUM_ATOL + SUM_RTOL * np.abs(sums)
    if wrong.any():
        row = int(wrong.argmax())
        raise Invalid(f"ref_logps[{row}] is {groups.ref_logps[row]:.9g}, its token_logps sum to {sums[row]:.9g}")


def _check_features(features: Features, rows: int, bounds: ColumnBounds) -> None:
    N = len(features.indices)
    _array("indices", features.indices, np.uint32, (N,))
    _array("acts", features.acts, np.float32, (N,))
    _array("active", features.active, np.uint32, (rows,))
    _array("tail_sq", features.tail_sq, np.float32, (rows,))
    _below("indices", features.indices, bounds.d_sae, "d_sae")
    _finite("acts", features.acts)
    _finite("tail_sq", features.tail_sq)
    _below("active", features.active, bounds.d_sae + 1, "d_sae + 1")
    if (features.tail_sq < 0).any():
        raise Invalid("tail_sq holds a negative sum of squares")
    falls = features.indices[1:] <= features.indices[:-1]
    starts = features.splits[1:-1]
    # Between two rows the indices may fall; N itself and 0 are no place between two entries.
    falls[(starts[(starts > 0) & (starts < N)] - 1).astype(np.int64)] = False
    if falls.any():
        raise Invalid(f"indices does not ascend inside a row, at entry {int(falls.argmax()) + 1}")
    kept, active = features.lengths, features.active.astype(np.int64)
    most = active if bounds.top_k is None else np.minimum(active, bounds.top_k)
    if (kept > most).any():
        row = int((kept > most).argmax())
        raise Invalid(
            f"row {row} keeps {kept[row]} features, with {active[row]} active and top_k {bounds.top_k or 'all'}"
        )


def _array(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        expected = f"{np.dtype(dtype)} {shape}"
        raise Invalid(f"{name} is {array.dtype} {array.shape}, it must be {expected}")


def _splits(name: str, splits: NDArray[np.uint64], segments: int, total: int) -> None:
    _array(name, splits, np.uint64, (segments + 1,))
    # Compared as they are: a difference of unsigned numbers would hide a fall.
    if splits[0] != 0 or splits[-1] != total or (splits[1:] < splits[:-1]).any():
        raise Invalid(f"{name} does not rise from 0 to {total}")


def _below(name: str, array: U32, limit: int, limit_name: str) -> None:
    if array.size and int(array.max()) >= limit:
        raise Invalid(f"{name} holds {int(array.max())}, {limit_name} is {limit}")


def _finite(name: str, array: F32) -> None:
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise Invalid(f"{name} holds {array[place]} at {list(place)}")


def _log_probs(name: str, array: F32) -> None:
    _finite(name, array)
    if array.size and array.max() > LOGP_SLACK:
        raise Invalid(f"{name} holds {array.max():.9g}: a log-prob is at most 0")
