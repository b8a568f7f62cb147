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

from fpo.scoring.sae import MEMORY_BUDGET, Sae


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
    """Pooled features of completions as the cache gives them, on the device of the step."""

    indices: Int[Tensor, " kept"]
    acts: Float[Tensor, " kept"]
    counts: Int[Tensor, " C"]


class ColumnSet(NamedTuple):
    """The features a distance is over: K columns per completion, of which `valid` count."""

    columns: Int[Tensor, "C K"]
    valid: Bool[Tensor, "C K"]


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


def reference_top(reference: SparseRows, k: int) -> ColumnSet:
    """The k largest cached features of each completion (ties: the lower index)."""
    counts = reference.counts.tolist()
    columns = reference.indices.new_zeros(len(counts), k)
    valid = torch.zeros(len(counts), k, dtype=torch.bool, device=columns.device)
    parts = zip(reference.indices.split(counts), reference.acts.split(counts), strict=True)
    for row, (indices, acts) in enumerate(parts):
        size = min(k, len(indices))
        best = torch.sort(acts, descending=True, stable=True).indices[:size]
        columns[row, :size] = indices[best]
        valid[row, :size] = True
    return ColumnSet(columns, valid)


@torch.no_grad()
def policy_top(sae: Sae, residual: Float[Tensor, "N D"], lengths: Int[Tensor, " C"], k: int) -> ColumnSet:
    """The k largest of the policy's own pooled features of each completion; needs the whole encoder."""
    parts = []
    for pooled in _pooled_blocks(sae, residual, lengths):
        best = pooled.topk(min(k, pooled.shape[-1]), dim=-1)
        parts.append((best.indices, best.values > 0))
    return ColumnSet(*(torch.cat(part) for part in zip(*parts, strict=True)))


def union(first: ColumnSet, second: ColumnSet) -> ColumnSet:
    """Columns of both, each once: of `second`, those that `first` holds already do not count."""
    twice = (second.columns[:, :, None] == first.columns[:, None, :]) & first.valid[:, None, :]
    fresh = second.valid & ~twice.any(-1)
    return ColumnSet(torch.cat([first.columns, second.columns], dim=1), torch.cat([first.valid, fresh], dim=1))


def look_up(reference: SparseRows, columns: Int[Tensor, "C K"], d_sae: int) -> Float[Tensor, "C K"]:
    """Cached activations at `columns`; a feature that is not in the cache counts as 0."""
    if len(reference.indices) == 0:
        return torch.zeros(columns.shape, dtype=torch.float32, device=columns.device)
    rows = torch.arange(len(columns), device=columns.device)
    # (row, feature) as one ascending number: indices ascend inside a row.
    stored = torch.repeat_interleave(rows, reference.counts) * d_sae + reference.indices
    wanted = rows[:, None] * d_sae + columns
    at = torch.searchsorted(stored, wanted).clamp_(max=len(stored) - 1)
    return torch.where(stored[at] == wanted, reference.acts[at], 0.0)


def sparse_rows(
    indices: np.ndarray, acts: np.ndarray, splits: np.ndarray, device: torch.device | None = None
) -> SparseRows:
    """SparseRows from the arrays of a cache."""
    counts = np.diff(splits.astype(np.int64))
    return SparseRows(
        torch.from_numpy(indices.astype(np.int64)).to(device),
        torch.from_numpy(np.ascontiguousarray(acts, dtype=np.float32)).to(device),
        torch.from_numpy(counts).to(device),
    )
