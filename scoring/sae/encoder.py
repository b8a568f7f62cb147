"""
The SAE encoder: what a hookpoint's output says in features. Only the encoder is loaded; the decoder is read
for the self-check's FVU alone and then dropped.

Everything is computed in float32, whatever the model's dtype and autocast say: bfloat16 flips 0.25-0.5 % of
the active features. An elementwise SAE (ReLU, JumpReLU, gated) gives single features from single columns of
the encoder. A coupled one (TopK, GroupMax) needs all columns to know which features are active.

All features of many tokens are encoded in tiles, so many features and so many tokens at a time: an SAE of a million
features never stands there as tokens x d_sae, and a tile's weights are read once for all its tokens.

Dimension key:  N tokens   D d_in   F d_sae   T features of a tile   K columns, or active features of a token
                R completions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fpo.scoring.sae.arrays import Decoder, SaeArrays
from fpo.scoring.sae.formats import read_sae
from fpo.scoring.sae.grid import TokenGrid, owners

# Bytes of dense float32 activations (tokens x features) that the chunked methods make at a time. What decides which of
# them are active takes a quarter of it besides; two and a quarter times for gated, GLU and GroupMax SAEs and for single
# columns.
MEMORY_BUDGET = 256 * 2**20

TILE = 2**16
"""Most features that are encoded at a time, but for a GroupMax of larger groups; a wider SAE goes in several tiles."""


class Sae:
    """
    The encoder of one SAE, as tensors; frozen, and no nn.Module, so no optimiser or wrapper finds it.

    Inputs are the hookpoint's raw output in any float dtype; activations are float32. Every method is
    differentiable in its input unless it says otherwise.
    """

    def __init__(self, arrays: SaeArrays) -> None:
        self.facts = arrays.facts
        self.activation = arrays.activation
        self.input_norm = arrays.input_norm
        self.k = arrays.k
        # One row per feature: a feature's encoder is then contiguous, and gathering k of them is cheap.
        self.weight_FD = _tensor(np.ascontiguousarray(arrays.W.T))
        self.bias_F = _tensor(arrays.b)
        self.threshold_F = None if arrays.threshold is None else _tensor(arrays.threshold)
        self.gain_F = None if arrays.gain is None else _tensor(arrays.gain)
        self.magnitude_bias_F = None if arrays.magnitude_bias is None else _tensor(arrays.magnitude_bias)
        self.glu_weight_FD = None if arrays.glu is None else _tensor(np.ascontiguousarray(arrays.glu[0].T))
        self.glu_bias_F = None if arrays.glu is None else _tensor(arrays.glu[1])

    def to(self, device: torch.device | str) -> Sae:
        """A copy of this SAE on `device`; it shares the tensors that are there already."""
        moved = object.__new__(Sae)
        moved.__dict__ = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.__dict__.items()
        }
        return moved

    def encode(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """All activations, float32. Holds N x d_sae of them: use the pooled methods for many tokens."""
        with _full_precision(x):
            x = self._normalised(x)
            if self.facts.elementwise:
                return self._elementwise(x, slice(None))
            h_NF = self._preactivations(x, slice(None))
            return h_NF.relu() * self._support(h_NF)

    @torch.no_grad()
    def pooled_mean(self, x: Float[Tensor, "N D"], lengths: Sequence[int]) -> Float[Tensor, "R F"]:
        """
        Mean activations over the tokens of each completion, 0 where it has none. No gradient.

        x holds the completions back to back, `lengths` tokens each; ValueError where they do not add up to N.
        Beside the result, at most MEMORY_BUDGET of activations is held.
        """
        return torch.cat([means_RT for _, means_RT in self.pooled_tiles(x, lengths)], dim=1)

    @torch.no_grad()
    def pooled_tiles(self, x: Float[Tensor, "N D"], lengths: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """`pooled_mean` in tiles: which features, and (R, T) their means. What is kept of them the caller holds."""
        _check_lengths(x, lengths)
        strongest = self._strongest(x) if self.activation == "topk" else None
        ends = np.cumsum(lengths)
        tiles = self._tiles()
        chunks = list(self._chunks(x, tiles[0].stop))
        buffer = x.new_empty(len(chunks[0][1]) * tiles[0].stop if chunks else 0, dtype=torch.float32)
        for tile in tiles:
            sums_RT = torch.zeros(len(lengths), tile.stop - tile.start, device=x.device)
            for start, chunk in chunks:
                own = None if strongest is None else strongest.of(start, len(chunk))
                f_NT = self._tile(chunk, tile, own, buffer)
                for row in range(int(np.searchsorted(ends, start, side="right")), len(lengths)):
                    first, last = int(ends[row]) - lengths[row] - start, int(ends[row]) - start
                    if first >= len(chunk):
                        break
                    sums_RT[row] += f_NT[max(first, 0) : last].sum(0)
            yield tile, sums_RT / _divisors(lengths, x.device)

    def pooled_columns(
        self, x: Float[Tensor, "N D"], lengths: Sequence[int], columns: Int[Tensor, "R K"]
    ) -> Float[Tensor, "R K"]:
        """Mean activations of each completion's own `columns` over its tokens; else as pooled_mean."""
        _check_lengths(x, lengths)
        grid = TokenGrid.of(np.asarray(lengths, dtype=np.int64))
        return self.mean_columns(x, TokenGrid(*(part.to(x.device) for part in grid)), columns)

    def mean_columns(
        self, x: Float[Tensor, "N D"], grid: TokenGrid, columns: Int[Tensor, "R K"]
    ) -> Float[Tensor, "R K"]:
        """
        pooled_columns for a grid that is on the device already: one product for all completions, whose tokens are
        padded to MEMORY_BUDGET at a time, and nothing that makes the host wait.
        """
        with _full_precision(x):
            x = self._normalised(x)
            active_NK = None if self.facts.elementwise else self._active(x, columns[owners(grid.lengths, len(x))])
            block = max(1, MEMORY_BUDGET // max(1, 4 * grid.places.shape[1] * x.shape[1]))
            rows = zip(grid.places.split(block), grid.shares.split(block), columns.split(block), strict=True)
            pooled = []
            for places_RT, shares_RT, own_RK in rows:
                # Not x[places]: the backward of that sorts them.
                x_RTD = x.index_select(0, places_RT.flatten()).view(*places_RT.shape, -1)
                f_RTK = self._columns(x_RTD, own_RK, None if active_NK is None else active_NK[places_RT])
                pooled.append(torch.bmm(shares_RT[:, None], f_RTK).squeeze(1))
            return torch.cat(pooled)

    @torch.no_grad()
    def fvu_and_l0(
        self, x: Float[Tensor, "N D"], decoder: Decoder, target: Float[Tensor, "N d_out"] | None = None
    ) -> tuple[float, float]:
        """
        Fraction of the target's variance over tokens that the SAE misses, and active features per token.

        FVU = sum (target - decoded)^2 / sum (target - mean over tokens)^2: 0 is perfect, the mean gives 1.

        decoder  what read_decoder returns
        target   of a transcoder, what the place that it predicts gives; None is x itself, centred for a centred SAE
        """
        W_dec, b_dec = _tensor(decoder.W).to(x.device), _tensor(decoder.b).to(x.device)
        skip = None if decoder.skip is None else _tensor(decoder.skip).to(x.device)
        missed, active = 0.0, 0
        with _full_precision(x):
            x = self._centred(x.float())
            wanted = x if target is None else target.float()
            for start, chunk in self._chunks(x, self.facts.d_sae):
                f_NF = self.encode(chunk)
                decoded = f_NF @ W_dec + b_dec
                if skip is not None:
                    decoded += chunk @ skip
                if target is None:
                    offset, scale = self._offset_and_scale(chunk)
                    decoded = decoded * scale + offset
                missed += float((decoded - wanted[start : start + len(chunk)]).double().square().sum())
                active += int((f_NF > 0).sum())
            variance = float((wanted - wanted.mean(0)).double().square().sum())
        return (missed / variance if variance else math.nan), active / len(x)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.facts.center_input else x

    def _offset_and_scale(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Per token, what the input norm subtracts and then divides by."""
        if self.input_norm == "layer_norm":
            # SAELens' own: unbiased deviation, epsilon outside the root. Tensor.std warns at no tokens.
            mean = x.mean(-1, keepdim=True)
            return mean, (x - mean).norm(dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5 + 1e-5
        if self.input_norm == "constant_norm_rescale":
            return 0.0, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return 0.0, 1.0

    def _normalised(self, x: Tensor) -> Tensor:
        x = self._centred(x.float())
        if self.input_norm == "none":
            return x
        offset, scale = self._offset_and_scale(x)
        return (x - offset) / scale

    def _columns(self, x: Tensor, columns: Tensor, active: Tensor | None) -> Tensor:
        """
        Activations of a normalised x (..., N, D) at columns (..., K).

        active  which of them a coupled SAE lets through, (..., N, K); None of an elementwise one
        """
        if active is None:
            return self._elementwise(x, columns)
        return self._preactivations(x, columns).relu() * active

    def _elementwise(self, x: Tensor, columns: Tensor | slice) -> Tensor:
        """The same of an elementwise SAE; a slice gives its columns for all of x."""
        if self.gain_F is not None:
            assert self.magnitude_bias_F is not None
            u_NK = x @ self.weight_FD[columns].mT
            gain_1K, magnitude_bias_1K, bias_1K = (
                values[columns].unsqueeze(-2) for values in (self.gain_F, self.magnitude_bias_F, self.bias_F)
            )
            return (u_NK * gain_1K + magnitude_bias_1K).relu() * (u_NK + bias_1K > 0)
        h_NK = self._preactivations(x, columns)
        if self.threshold_F is None:
            return h_NK.relu()
        return h_NK.relu() * (h_NK > self.threshold_F[columns].unsqueeze(-2))

    def _preactivations(self, x: Tensor, columns: Tensor | slice) -> Tensor:
        """h of a normalised x at columns, as for `_columns`."""
        h_NK = _affine(x, self.weight_FD[columns], self.bias_F[columns])
        if self.glu_weight_FD is None:
            return h_NK
        assert self.glu_bias_F is not None
        return h_NK * _affine(x, self.glu_weight_FD[columns], self.glu_bias_F[columns]).sigmoid()

    def _support(self, h_NF: Tensor) -> Bool[Tensor, "N F"]:
        """Which features a coupled SAE lets through."""
        assert self.k is not None
        mask_NF = torch.zeros_like(h_NF, dtype=torch.bool)
        if self.activation == "topk":
            return mask_NF.scatter_(1, h_NF.detach().topk(self.k, sorted=False).indices, True)
        groups = (len(h_NF), -1, self._group)
        mask_NF.view(groups).scatter_(2, h_NF.detach().view(groups).argmax(2, keepdim=True), True)
        return mask_NF

    @property
    def _group(self) -> int:
        """Features of a group of which the largest is active (GroupMax)."""
        assert self.k is not None
        return self.facts.d_sae // self.k

    def _tiles(self) -> list[slice]:
        """All features, in as few tiles as TILE allows, the last one the smallest; no group of a GroupMax is cut."""
        size = TILE if self.activation != "groupmax" else max(TILE // self._group, 1) * self._group
        return [slice(first, min(first + size, self.facts.d_sae)) for first in range(0, self.facts.d_sae, size)]

    def _tile(self, x: Tensor, tile: slice, strongest: _Strongest | None, buffer: Tensor) -> Float[Tensor, "N T"]:
        """
        Activations of a tile's features, no gradient, as `encode` gives them.

        strongest  what a TopK lets through of these tokens
        buffer     room for N x T numbers, which are overwritten: fresh memory costs a CPU half of a matmul
        """
        with _full_precision(x):
            if strongest is not None:
                return strongest.dense(tile)
            x = self._normalised(x)
            if self.activation == "gated" or self.glu_weight_FD is not None:
                return self._elementwise(x, tile)
            h_NT = buffer[: len(x) * (tile.stop - tile.start)].view(len(x), -1)
            torch.addmm(self.bias_F[tile], x, self.weight_FD[tile].T, out=h_NT)
            if self.activation == "groupmax":
                return h_NT.relu() * self._support(h_NT)
            if self.threshold_F is None:
                return h_NT.relu_()
            return h_NT.masked_fill_(h_NT <= self.threshold_F[tile].clamp_min(0), 0)

    def _strongest(self, x: Tensor) -> _Strongest:
        """The k features that a TopK lets through of each token, from one pass over all tiles."""
        assert self.k is not None
        found = []
        tiles = self._tiles()
        for _, chunk in self._chunks(x, tiles[0].stop):
            with _full_precision(x):
                normalised = self._normalised(chunk)
                best = _Strongest.none(len(chunk), x.device)
                for tile in tiles:
                    h_NT = self._preactivations(normalised, tile)
                    best = best.or_of(h_NT, tile, self.k)
                found.append(best)
        if not found:
            return _Strongest.none(0, x.device)
        return _Strongest(torch.cat([best.h_NK for best in found]), torch.cat([best.indices_NK for best in found]))

    @torch.no_grad()
    def _active(self, x: Tensor, columns: Tensor) -> Bool[Tensor, "N K"]:
        """Which of each token's columns (N, K) a coupled SAE lets through, from a normalised x."""
        active_NK = torch.empty(columns.shape, dtype=torch.bool, device=x.device)
        for start, chunk in self._chunks(x, self.facts.d_sae):
            h_NF = self._preactivations(chunk, slice(None))
            own = slice(start, start + len(chunk))
            active_NK[own] = self._support(h_NF).gather(1, columns[own])
        return active_NK

    def _chunks(self, x: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
        """(first token, tokens) in pieces whose dense activations, of so many features, fit the memory budget."""
        step = max(1, MEMORY_BUDGET // (4 * width))
        return ((start, x[start : start + step]) for start in range(0, len(x), step))


class _Strongest(NamedTuple):
    """The largest pre-activations of each token, in no order."""

    h_NK: Tensor
    indices_NK: Tensor

    @staticmethod
    def none(n_tokens: int, device: torch.device) -> _Strongest:
        """Before the first tile."""
        empty = torch.empty(n_tokens, 0, device=device)
        return _Strongest(empty, empty.long())

    def of(self, start: int, n_tokens: int) -> _Strongest:
        """Of these tokens."""
        return _Strongest(*(part[start : start + n_tokens] for part in self))

    def or_of(self, h_NT: Tensor, tile: slice, k: int) -> _Strongest:
        """The k largest of these and of a tile's."""
        best = h_NT.topk(min(k, h_NT.shape[1]), sorted=False)
        h_NK = torch.cat([self.h_NK, best.values], dim=1)
        indices_NK = torch.cat([self.indices_NK, best.indices + tile.start], dim=1)
        if h_NK.shape[1] <= k:
            return _Strongest(h_NK, indices_NK)
        kept = h_NK.topk(k, sorted=False).indices
        return _Strongest(h_NK.gather(1, kept), indices_NK.gather(1, kept))

    def dense(self, tile: slice) -> Float[Tensor, "N T"]:
        """Their activations where they are a tile's, 0 elsewhere."""
        inside_NK = (self.indices_NK >= tile.start) & (self.indices_NK < tile.stop)
        places_NK = torch.where(inside_NK, self.indices_NK - tile.start, 0)
        # Others add nothing to feature 0; of its own a token has at most one, so no order of additions is open.
        f_NT = torch.zeros(len(places_NK), tile.stop - tile.start, device=places_NK.device)
        return f_NT.scatter_add_(1, places_NK, self.h_NK.relu() * inside_NK)


def load_sae(source: str, hookpoint: str | None = None) -> Sae:
    """
    Read an SAE's encoder from a folder, a params.npz or the hub onto the CPU; docs/saes.md says which and how.

    Raises SaeError for what is missing or not supported.
    """
    return Sae(read_sae(source, hookpoint))


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias; where they have a further axis in front, each with its own."""
    if weight.ndim == 2:
        return functional.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)


def _divisors(lengths: Sequence[int], device: torch.device) -> Float[Tensor, "R 1"]:
    return torch.tensor(lengths, dtype=torch.float32, device=device).clamp_min(1)[:, None]


def _check_lengths(x: Tensor, lengths: Sequence[int]) -> None:
    if sum(lengths) != len(x):
        raise ValueError(f"the lengths add up to {sum(lengths)} tokens, x has {len(x)}")
