"""
Pooled SAE features of completions: the reference's top k for the cache, and the policy's activations at the
features that a distance is over.

Pooling is the mean over a completion's tokens that count, never over padding, so a value does not depend on the
batch. A *top k* is the k largest pooled activations; features that are zero never belong to it, so it can be
smaller than k. A completion of which no token counts has no features. A prompt is pooled like a completion, over its
own tokens.

Dimension key:  N tokens that count   D d_in   F d_sae   C completions   K columns
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fpo.scoring.sae import MEMORY_BUDGET, Sae, owners


class PooledFeatures(NamedTuple):
    """The kept features of completions, ragged: completion c owns `splits[c]:splits[c + 1]`."""

    indices: Int[Tensor, " kept"]
    """Ascending inside a completion."""
    acts: Float[Tensor, " kept"]
    """Mean activation over the completion's tokens that count, float32."""
    counts: Int[Tensor, " C"]
    """How many features each completion keeps."""
    active: Int[Tensor, " C"]
    """How many were non-zero before the cut."""
    tail_sq: Float[Tensor, " C"]
    """Sum of squares of what was not kept."""


class SparseRows(NamedTuple):
    """Pooled features of completions as the cache gives them; indices ascend inside a completion."""

    indices: Int[Tensor, " kept"]
    acts: Float[Tensor, " kept"]
    counts: Int[Tensor, " C"]


class ColumnSet(NamedTuple):
    """The features a distance is over: K columns per completion, of which `valid` count."""

    columns: Int[Tensor, "C K"]
    valid: Bool[Tensor, "C K"]


class KnownColumns(NamedTuple):
    """A ColumnSet with what the reference says of it."""

    columns: Int[Tensor, "C K"]
    valid: Bool[Tensor, "C K"]
    acts: Float[Tensor, "C K"]
    """0 where a column does not count or the cache does not hold it."""


@torch.no_grad()
def pool_top_features(
    sae: Sae, residual: Float[Tensor, "N D"], lengths: Int[Tensor, " C"], top_k: int | Literal["all"]
) -> PooledFeatures:
    """
    Encode, pool and keep the `top_k` largest (or every non-zero) features of each completion.

    residual  hookpoint output at the positions that predict tokens that count, completion by completion
    lengths   how many of them each completion has
    """
    parts = [_keep(pooled, top_k) for pooled in _pooled_blocks(sae, residual, lengths)]
    return PooledFeatures(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _pooled_blocks(
    sae: Sae, residual: Float[Tensor, "N D"], lengths: Int[Tensor, " C"]
) -> Iterator[Float[Tensor, "block F"]]:
    """Pooled activations, as many completions at a time as the memory budget holds."""
    block = max(1, MEMORY_BUDGET // (4 * sae.facts.d_sae))
    start = 0
    for sizes in lengths.cpu().split(block):
        stop = start + int(sizes.sum())
        yield sae.pooled_mean(residual[start:stop], sizes.tolist())
        start = stop


def _keep(pooled: Float[Tensor, "block F"], top_k: int | Literal["all"]) -> PooledFeatures:
    nonzero = pooled != 0
    active = nonzero.sum(-1)
    kept = nonzero
    if top_k != "all" and top_k < pooled.shape[-1]:
        best = pooled.topk(top_k, dim=-1).indices
        kept = torch.zeros_like(nonzero).scatter_(1, best, True) & nonzero
    rows, indices = kept.nonzero(as_tuple=True)
    tail_sq = pooled.masked_fill(kept, 0).double().square().sum(-1).float()
    return PooledFeatures(indices, pooled[rows, indices], kept.sum(-1), active, tail_sq)


def reference_top(reference: SparseRows, k: int) -> KnownColumns:
    """
    The k largest cached features of each completion (ties: the lower index), largest first; K is as many as the
    completion that has most of them has. By numpy, before anything is on a device.
    """
    indices, acts, counts = (array.numpy() for array in reference)
    rows = np.repeat(np.arange(len(counts)), counts)
    # Stable, and indices ascend.
    order = np.lexsort((-acts, rows))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = len(counts), min(k, int(counts.max(initial=0)))
    columns, valid, known = np.zeros(shape, np.int64), np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
    kept = place < k
    at = rows[kept], place[kept]
    columns[at], valid[at], known[at] = indices[order[kept]], True, acts[order[kept]]
    return KnownColumns(*map(torch.from_numpy, (columns, valid, known)))


@torch.no_grad()
def policy_top(sae: Sae, residual: Float[Tensor, "N D"], lengths: Int[Tensor, " C"], k: int) -> ColumnSet:
    """
    The k largest of the policy's own pooled features of each completion; needs the whole encoder.

    Holds C x F sums and MEMORY_BUDGET of activations, and asks the device for nothing.
    """
    sums = torch.zeros(len(lengths), sae.facts.d_sae, device=residual.device)
    step = max(1, MEMORY_BUDGET // (4 * sae.facts.d_sae))
    for tokens, rows in zip(residual.split(step), owners(lengths, len(residual)).split(step), strict=True):
        sums.index_add_(0, rows, sae.encode(tokens))
    best = sums.div_(lengths.clamp(min=1)[:, None]).topk(min(k, sae.facts.d_sae), dim=-1)
    return ColumnSet(best.indices, best.values > 0)


def union(first: ColumnSet, second: ColumnSet) -> ColumnSet:
    """Columns of both, each once: of `second`, those that `first` holds already do not count."""
    twice = (second.columns[:, :, None] == first.columns[:, None, :]) & first.valid[:, None, :]
    fresh = second.valid & ~twice.any(-1)
    return ColumnSet(torch.cat([first.columns, second.columns], dim=1), torch.cat([first.valid, fresh], dim=1))


def look_up(reference: SparseRows, columns: Int[Tensor, "C K"], d_sae: int) -> Float[Tensor, "C K"]:
    """Cached activations at `columns`; a feature that is not in the cache counts as 0."""
    if len(reference.indices) == 0:
        return torch.zeros(columns.shape, dtype=torch.float32, device=columns.device)
    # (row, feature) as one ascending number.
    stored = owners(reference.counts, len(reference.indices)) * d_sae + reference.indices
    wanted = torch.arange(len(columns), device=columns.device)[:, None] * d_sae + columns
    at = torch.searchsorted(stored, wanted).clamp_(max=len(stored) - 1)
    return torch.where(stored[at] == wanted, reference.acts[at], 0.0)


def sparse_rows(indices: np.ndarray, acts: np.ndarray, splits: np.ndarray) -> SparseRows:
    """SparseRows from the arrays of a cache."""
    counts = np.diff(splits.astype(np.int64))
    arrays = indices.astype(np.int64), np.ascontiguousarray(acts, dtype=np.float32), counts
    return SparseRows(*map(torch.from_numpy, arrays))
