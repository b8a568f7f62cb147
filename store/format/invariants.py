"""
What must hold in every shard, whatever its checksum says.

Dimension key:  P pairs   T tokens   C scored completion tokens   N kept features   m top logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.store.format.key import pair_digests
from fpo.store.format.pairs import F32, Features, Pairs, TopLogits, lengths_of, scored_lengths

LOGP_SLACK = 1e-3
"""A log-prob is at most 0; rounding in another kernel's log-sum-exp may leave this much above."""

SUM_RTOL, SUM_ATOL = 1e-5, 1e-3
"""`ref_logps` against the sum of the stored `token_logps`: float32 rounding of each is 6e-8 relative."""


MAX_SHARD_PAIRS = 2**16
MAX_SHARD_TOKENS = 2**20
MAX_PAIR_TOKENS = 2**22
"""Of one shard; a pair that is longer than MAX_SHARD_TOKENS has a shard alone (see `plan`)."""


class Invalid(ValueError):
    """Says in one clause why bytes or arrays are not a shard; whoever knows the file adds its name."""


@dataclass(frozen=True)
class Bounds:
    """The sizes that a recipe promises."""

    vocab_size: int
    features: tuple[tuple[int, int | None], ...]
    """(d_sae, top_k) per hookpoint; top_k None keeps every non-zero feature."""

    top_logits: int
    """m; 0: no top logits."""


def check_counts(n_pairs: int, n_tokens: int) -> None:
    """Raises Invalid for more pairs or tokens than a shard holds: asked before anything is allocated for them."""
    most = MAX_SHARD_TOKENS if n_pairs != 1 else MAX_PAIR_TOKENS
    if n_pairs > MAX_SHARD_PAIRS or n_tokens > most:
        raise Invalid(
            f"{n_pairs} pairs with {n_tokens} tokens, a shard holds at most {MAX_SHARD_PAIRS} pairs and "
            f"{MAX_SHARD_TOKENS} tokens, or one pair of at most {MAX_PAIR_TOKENS}"
        )


def check_pairs(pairs: Pairs, bounds: Bounds) -> None:
    """Raises Invalid with the array, the place and the value, at the first thing that does not hold."""
    P = len(pairs.pair_id)
    check_counts(P, len(pairs.input_ids))
    _array("pair_id", pairs.pair_id, np.uint64, (P,))
    _array("pair_digest", pairs.pair_digest, np.uint8, (P, 16))
    _array("input_ids", pairs.input_ids, np.uint32, (len(pairs.input_ids),))
    _splits("splits", pairs.splits, 3 * P, len(pairs.input_ids))
    _below("input_ids", pairs.input_ids, bounds.vocab_size, "vocab_size")
    if len(np.unique(pairs.pair_id)) != P:
        raise Invalid("pair_id holds the same pair twice")
    wrong = (pair_digests(pairs.input_ids, pairs.splits) != pairs.pair_digest).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise Invalid(f"pair_digest[{row}] is not the digest of that pair's token ids (pair {pairs.pair_id[row]})")
    _check_logps(pairs)
    if len(pairs.features) != len(bounds.features):
        raise Invalid(f"it has {len(pairs.features)} hookpoints, the recipe has {len(bounds.features)}")
    for n, (features, (d_sae, top_k)) in enumerate(zip(pairs.features, bounds.features, strict=True)):
        _check_features(f"features/{n}", features, P, d_sae, top_k)
    _check_top_logits(pairs.top_logits, len(pairs.token_logps), bounds)


def _check_logps(pairs: Pairs) -> None:
    P = len(pairs)
    scored = scored_lengths(pairs.lengths).ravel()
    _array("token_logps", pairs.token_logps, np.float32, (int(scored.sum()),))
    _array("ref_logps", pairs.ref_logps, np.float32, (P, 2))
    _log_probs("token_logps", pairs.token_logps)
    _finite("ref_logps", pairs.ref_logps)
    running = np.concatenate([[0.0], np.cumsum(pairs.token_logps, dtype=np.float64)])
    splits = pairs.completion_splits
    sums = (running[splits[1:]] - running[splits[:-1]]).reshape(P, 2)
    wrong = np.abs(pairs.ref_logps - sums) > SUM_ATOL + SUM_RTOL * np.abs(sums)
    if wrong.any():
        row, side = np.argwhere(wrong)[0]
        raise Invalid(
            f"ref_logps[{row}, {side}] is {pairs.ref_logps[row, side]:.9g}, "
            f"its token_logps sum to {sums[row, side]:.9g}"
        )


def _check_features(name: str, features: Features, P: int, d_sae: int, top_k: int | None) -> None:
    N = len(features.indices)
    _array(f"{name}/indices", features.indices, np.uint32, (N,))
    _array(f"{name}/acts", features.acts, np.float32, (N,))
    _splits(f"{name}/splits", features.splits, 2 * P, N)
    _array(f"{name}/active", features.active, np.uint32, (P, 2))
    _array(f"{name}/tail_sq", features.tail_sq, np.float32, (P, 2))
    _below(f"{name}/indices", features.indices, d_sae, "d_sae")
    _finite(f"{name}/acts", features.acts)
    _finite(f"{name}/tail_sq", features.tail_sq)
    _below(f"{name}/active", features.active, d_sae + 1, "d_sae + 1")
    if (features.tail_sq < 0).any():
        raise Invalid(f"{name}/tail_sq holds a negative sum of squares")
    falls = features.indices[1:] <= features.indices[:-1]
    starts = features.splits[1:-1]
    # Between two completions the indices may fall; N itself and 0 are no place between two entries.
    falls[(starts[(starts > 0) & (starts < N)] - 1).astype(np.int64)] = False
    if falls.any():
        raise Invalid(f"{name}/indices does not ascend inside a completion, at entry {int(falls.argmax()) + 1}")
    kept = lengths_of(features.splits).reshape(P, 2)
    most = features.active.astype(np.int64) if top_k is None else np.minimum(features.active, top_k)
    if (kept > most).any():
        row, side = np.argwhere(kept > most)[0]
        raise Invalid(
            f"{name} keeps {kept[row, side]} features of pair row {row} side {side}, "
            f"with {features.active[row, side]} active and top_k {'all' if top_k is None else top_k}"
        )


def _check_top_logits(top: TopLogits | None, C: int, bounds: Bounds) -> None:
    m = bounds.top_logits
    if (top is None) != (m == 0):
        raise Invalid(f"top_logits {'are missing' if top is None else 'are there'}, the recipe says {m}")
    if top is not None:
        _array("top_logits/indices", top.indices, np.uint32, (C, m))
        _array("top_logits/logps", top.logps, np.float32, (C, m))
        _below("top_logits/indices", top.indices, bounds.vocab_size, "vocab_size")
        _log_probs("top_logits/logps", top.logps)


def _array(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        expected = f"{np.dtype(dtype)} {shape}"
        raise Invalid(f"{name} is {array.dtype} {array.shape}, it must be {expected}")


def _splits(name: str, splits: NDArray[np.uint64], segments: int, total: int) -> None:
    _array(name, splits, np.uint64, (segments + 1,))
    # Compared as they are: a difference of unsigned numbers would hide a fall.
    if splits[0] != 0 or splits[-1] != total or (splits[1:] < splits[:-1]).any():
        raise Invalid(f"{name} does not rise from 0 to {total}")


def _below(name: str, array: NDArray[np.uint32], limit: int, limit_name: str) -> None:
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
