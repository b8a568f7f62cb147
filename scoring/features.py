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

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fpo.scoring.sae import MEMORY_BUDGET, Sae, owners
from fpo.scoring.sae.encoder import TILE


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


class Kept(NamedTuple):
    """The kept features of completions, in no order, as a device finds them without making the host wait."""

    rows: Int[Tensor, " entries"]
    """Whose each entry is."""
    indices: Int[Tensor, " entries"]
    acts: Float[Tensor, " entries"]
    """Mean activation, float32; an entry of 0 is none."""
    active: Int[Tensor, " C"]
    tail_sq: Float[Tensor, " C"]

    def cpu(self) -> Kept:
        """On the host, once they are computed."""
        return Kept(*(tensor.cpu() for tensor in self))

    def ragged(self) -> PooledFeatures:
        """Completion by completion, without the entries that are none."""
        found = self.acts != 0
        rows, indices, acts = self.rows[found], self.indices[found], self.acts[found]
        order = indices.argsort()
        order = order[rows[order].argsort(stable=True)]
        counts = torch.bincount(rows, minlength=len(self.active))
        return PooledFeatures(indices[order], acts[order], counts, self.active, self.tail_sq)


def pool_top_features(
    sae: Sae, residual: Float[Tensor, "N D"], lengths: Int[Tensor, " C"], top_k: int | Literal["all"]
) -> PooledFeatures:
    """
    Encode, pool and keep the `top_k` largest (or every non-zero) features of each completion.

    residual  hookpoint output at the positions that predict tokens that count, completion by completion
    lengths   how many of them each completion has
    """
    return keep_top_features(sae, residual, lengths.tolist(), top_k).ragged()


@torch.no_grad()
def keep_top_features(
    sae: Sae, residual: Float[Tensor, "N D"], lengths: Sequence[int], top_k: int | Literal["all"]
) -> Kept:
    """
    As `pool_top_features`, of lengths that the host knows, so that it need not wait for the device; with "all" it does.
    Of pooled activations, as of dense ones, a few MEMORY_BUDGETs are held, however many completions and features.
    """
    # Float32, the same without what is kept, both in float64 and its squares: 24 bytes for each.
    block = max(1, MEMORY_BUDGET // (24 * min(sae.facts.d_sae, TILE)))
    parts, start = [], 0
    for first in range(0, max(len(lengths), 1), block):
        sizes = lengths[first : first + block]
        stop = start + sum(sizes)
        if top_k == "all" or top_k >= sae.facts.d_sae:
            kept = _keep_all(sae, residual[start:stop], sizes)
        else:
            kept = _keep_largest(sae, residual[start:stop], sizes, top_k)
        parts.append(kept._replace(rows=kept.rows + first))
        start = stop
    return Kept(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _keep_all(sae: Sae, residual: Float[Tensor, "N D"], lengths: Sequence[int]) -> Kept:
    """Every feature that is not zero, of one block of completions."""
    active = residual.new_zeros(len(lengths), dtype=torch.long)
    parts = []
    for tile, pooled in sae.pooled_tiles(residual, lengths):
        rows, columns = pooled.nonzero(as_tuple=True)
        active += (pooled != 0).sum(-1)
        parts.append((rows, columns + tile.start, pooled[rows, columns]))
    rows, indices, acts = (torch.cat(part) for part in zip(*parts, strict=True))
    return Kept(rows, indices, acts, active, torch.zeros_like(active, dtype=torch.float32))


def _keep_largest(sae: Sae, residual: Float[Tensor, "N D"], lengths: Sequence[int], k: int) -> Kept:
    """The k largest of one block of completions: tile by tile, the largest so far carried along."""
    active = residual.new_zeros(len(lengths), dtype=torch.long)
    tail_sq = residual.new_zeros(len(lengths), dtype=torch.float64)
    acts, indices = tail_sq.new_zeros(len(lengths), 0, dtype=torch.float32), active.new_zeros(len(lengths), 0)
    for tile, pooled in sae.pooled_tiles(residual, lengths):
        active += (pooled != 0).sum(-1)
        best = pooled.topk(min(k, pooled.shape[-1]), dim=-1)
        tail_sq += _squares_without(pooled, best.indices)
        acts, indices = torch.cat([acts, best.values], 1), torch.cat([indices, best.indices + tile.start], 1)
        if acts.shape[1] > k:
            best = acts.topk(k, dim=-1)
            tail_sq += _squares_without(acts, best.indices)
            acts, indices = best.values, indices.gather(1, best.indices)
    rows = torch.arange(len(lengths), device=acts.device)[:, None].expand_as(acts)
    return Kept(rows.reshape(-1), indices.reshape(-1), acts.reshape(-1), active, tail_sq.float())


def _squares_without(acts: Float[Tensor, "C K"], kept: Int[Tensor, "C kept"]) -> Float[Tensor, " C"]:
    """Sum of squares, float64, of what is not kept."""
    return acts.scatter(1, kept, 0).double().square().sum(-1)


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
