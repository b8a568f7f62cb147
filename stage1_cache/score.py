"""
Scoring one shard with the reference: token ids in, everything the cache holds out.

The order of the work inside a shard is a pure function of the shard, so a shard has the same bytes whoever
computes it on the same machine, and in whatever order the shards are computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpo.errors import ModelError
from fpo.recipe import Arithmetic
from fpo.scoring import (
    Layout,
    Packed,
    PooledFeatures,
    Sae,
    Scores,
    choose_layout,
    install_scoring,
    is_quantised,
    load_model,
    mixed_precision,
    pack,
    pool_top_features,
)
from fpo.store import Features, Pairs, TopLogits

TopK = int | Literal["all"]


class ReferenceScorer:
    """The reference model, its SAEs, and the one forward that both are read from."""

    def __init__(
        self,
        folder: Path,
        arithmetic: Arithmetic,
        adapters: list[Path],
        saes: list[tuple[str, Sae, TopK]],
        top_logits: int,
        batch_tokens: int,
    ) -> None:
        """
        folder        the model's files; adapters are merged into it
        arithmetic    dtype of the weights, and the dtype of the autocast that they are computed under
        saes          hookpoint, SAE and how many features to keep, in the recipe's order
        batch_tokens  packed tokens per forward; changes speed and memory only
        Raises ModelError where the model cannot be loaded. `check` it on the data before it scores.
        """
        # Under torchrun each rank has its own GPU, under srun each task, which may see its own alone.
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        gpus = torch.cuda.device_count()
        self.device = torch.device(f"cuda:{local % gpus}" if gpus else "cpu")
        model = load_model(folder, arithmetic.dtype, adapters).requires_grad_(False)
        # Quantised weights are put where they belong as they load, and some formats refuse to move.
        self.model = model if is_quantised(model) else model.to(self.device)
        self.saes = [(hookpoint, sae.to(self.device), top_k) for hookpoint, sae, top_k in saes]
        self.arithmetic = arithmetic
        self.batch_tokens = batch_tokens
        install_scoring(self.model, tuple(hookpoint for hookpoint, _, _ in saes), top_logits)
        self.layout = Layout.PACKED

    def check(self, input_ids: np.ndarray, splits: np.ndarray) -> None:
        """
        Choose the layout that is right for these pairs, the data's longest and shortest (`scoring.extremes`), and look
        at what the hookpoints give. Raises ModelError where the model cannot be scored.
        """
        self.layout = choose_layout(self.model, input_ids, splits, _two_each(splits))
        self._check_widths()

    def score(
        self,
        pair_id: np.ndarray,
        pair_digest: np.ndarray,
        input_ids: np.ndarray,
        splits: np.ndarray,
        progress: Callable[[int, int], None] | None = None,
    ) -> Pairs:
        """
        Score the pairs of one shard.

        pair_id (P,), pair_digest (P, 16), input_ids (T,), splits (3P+1,)  as the shard will hold them
        progress  called with (pairs, tokens) after each batch
        """
        batches = list(micro_batches(splits, self.batch_tokens))
        results = []
        for rows in batches:
            tokens = [input_ids[splits[3 * row] : splits[3 * row + 3]] for row in rows]
            sizes = np.diff(splits.astype(np.int64)).reshape(-1, 3)[rows]
            bounds = np.concatenate([[0], np.cumsum(sizes)])
            results.append(self._score_batch(np.concatenate(tokens), bounds))
            if progress is not None:
                progress(len(rows), int(bounds[-1]))
        return _assemble(pair_id, pair_digest, input_ids, splits, batches, results)

    @torch.inference_mode()
    def _check_widths(self) -> None:
        """ModelError where a hookpoint does not give what its SAE reads."""
        packed = self._packed(np.array([0, 0, 0]), np.array([0, 1, 2, 3]))
        residuals = self.model(**packed._asdict()).residuals
        for (hookpoint, sae, _), residual in zip(self.saes, residuals, strict=True):
            if residual.shape[-1] != sae.facts.d_in:
                raise ModelError(
                    f"hookpoint {hookpoint} gives {residual.shape[-1]} numbers per token, "
                    f"its SAE reads {sae.facts.d_in}"
                )

    @torch.inference_mode()
    def _score_batch(self, input_ids: np.ndarray, splits: np.ndarray) -> _BatchResult:
        packed = self._packed(input_ids, splits)
        with mixed_precision(self.device, self.arithmetic.autocast):
            scores: Scores = self.model(**packed._asdict())
        features = [
            pool_top_features(sae, packed.counting(residual), packed.counts, top_k)
            for (_, sae, top_k), residual in zip(self.saes, scores.residuals, strict=True)
        ]
        return _BatchResult(packed.lengths, scores, features)

    def _packed(self, input_ids: np.ndarray, splits: np.ndarray) -> Packed:
        return Packed(*(tensor.to(self.device) for tensor in pack(input_ids, splits, _two_each(splits), self.layout)))


def _two_each(splits: np.ndarray) -> np.ndarray:
    """Completions of each group, where every group is a pair."""
    return np.full(len(splits) // 3, 2, np.uint32)


class _BatchResult:
    """A batch's scores as numpy, one entry per completion."""

    def __init__(self, lengths: Tensor, scores: Scores, features: list[PooledFeatures]) -> None:
        sizes = lengths.tolist()
        self.token_logps = _split(scores.token_logps, sizes)
        self.top_indices = _split(scores.top_indices, sizes)
        self.top_logps = _split(scores.top_logps, sizes)
        self.indices = [_split(f.indices, f.counts.tolist()) for f in features]
        self.acts = [_split(f.acts, f.counts.tolist()) for f in features]
        self.active = [f.active.cpu().numpy() for f in features]
        self.tail_sq = [f.tail_sq.cpu().numpy() for f in features]


def _split(tensor: Tensor, sizes: list[int]) -> list[np.ndarray]:
    return [part.numpy() for part in tensor.cpu().split(sizes)]


def micro_batches(splits: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """
    Rows of a shard in batches of at most `batch_tokens` tokens (at least one pair), longest pairs first, so that
    pairs of a batch are about as long as each other and the largest batch comes first.
    """
    sizes = np.diff(splits.astype(np.int64)[::3])
    batch: list[int] = []
    filled = 0
    for row in np.argsort(-sizes, kind="stable"):
        if batch and filled + sizes[row] > batch_tokens:
            yield np.array(batch)
            batch, filled = [], 0
        batch.append(int(row))
        filled += int(sizes[row])
    if batch:
        yield np.array(batch)


def _assemble(
    pair_id: np.ndarray,
    pair_digest: np.ndarray,
    input_ids: np.ndarray,
    splits: np.ndarray,
    batches: list[np.ndarray],
    results: list[_BatchResult],
) -> Pairs:
    """Put the completions of all batches back into the order of the shard."""
    # place[c] = (batch, completion inside the batch) of the shard's completion c
    place: list[tuple[int, int]] = [(0, 0)] * (2 * len(pair_id))
    for index, rows in enumerate(batches):
        for position, row in enumerate(rows):
            for side in (0, 1):
                place[2 * row + side] = (index, 2 * position + side)
    n_features = len(results[0].indices) if results else 0
    token_logps = [results[batch].token_logps[at] for batch, at in place]
    top = [results[batch].top_logps[at] for batch, at in place]
    features = []
    for hookpoint in range(n_features):
        indices = [results[batch].indices[hookpoint][at] for batch, at in place]
        features.append(
            Features(
                indices=np.concatenate(indices).astype(np.uint32),
                acts=np.concatenate([results[b].acts[hookpoint][at] for b, at in place]).astype(np.float32),
                splits=np.concatenate([[0], np.cumsum([len(part) for part in indices])]).astype(np.uint64),
                active=np.array([results[b].active[hookpoint][at] for b, at in place], np.uint32).reshape(-1, 2),
                tail_sq=np.array([results[b].tail_sq[hookpoint][at] for b, at in place], np.float32).reshape(-1, 2),
            )
        )
    top_logits = None
    if top and top[0].shape[1]:
        chosen = np.concatenate([results[batch].top_indices[at] for batch, at in place])
        top_logits = TopLogits(chosen.astype(np.uint32), np.concatenate(top).astype(np.float32))
    return Pairs(
        pair_id=pair_id,
        pair_digest=pair_digest,
        input_ids=input_ids,
        splits=splits,
        # Summed in float64: a running float32 sum is off by 1e-3 nats on long completions.
        ref_logps=np.array([part.sum(dtype=np.float64) for part in token_logps], np.float32).reshape(-1, 2),
        token_logps=np.concatenate(token_logps).astype(np.float32) if token_logps else np.empty(0, np.float32),
        features=tuple(features),
        top_logits=top_logits,
    )
