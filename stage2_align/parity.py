"""
Before the first step, where the policy starts as the reference, its scores must reproduce the cached ones: other
weights, another dtype, dropout or a changed library stop here with both values, not after a day of training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from errors import ParityError
from recipe import Recipe
from scoring import LOGPS_TOLERANCE, Layout, Packed, pack
from stage2_align.measure import ObjectiveMeter
from store import Cache, Features

PARITY_PAIRS = 8


@torch.no_grad()
def check_parity(
    model: nn.Module, meter: ObjectiveMeter, cache: Cache, recipe: Recipe, layout: Layout = Layout.PACKED
) -> float:
    """
    Score the cache's first pairs with the policy. Returns the mean absolute difference of the token log-probs, in
    nats. Raises ParityError where it, or that of the pooled features, is above what the dtypes explain.

    model   with scoring installed, on its device
    layout  the one in which it is measured rightly
    """
    shard = cache.shard(0)
    pairs = shard.take(np.arange(min(PARITY_PAIRS, len(shard))))
    device = next(model.parameters()).device
    packed = Packed(*(tensor.to(device) for tensor in pack(pairs.input_ids, pairs.splits, layout)))
    scores = model(**packed._asdict())
    cached = torch.from_numpy(pairs.token_logps).to(device)
    difference = float((scores.token_logps - cached).abs().mean())
    tolerance = max(LOGPS_TOLERANCE[recipe.reference.dtype], LOGPS_TOLERANCE[recipe.policy.dtype])
    if not difference <= tolerance:
        raise ParityError(
            f"the policy does not reproduce the cached reference: token log-probs differ by {difference:.4g} nats "
            f"on average (at most {tolerance:g})\n"
            f"  first pair, chosen: {float(scores.token_logps[: int(packed.lengths[0])].sum()):.4f} by the policy, "
            f"{float(pairs.ref_logps[0, 0]):.4f} in the cache {cache.key[:12]}\n"
            "  the policy starts from reference.model: was it changed, or is its dtype not the reference's?"
        )
    if meter.sae is not None and meter.feature is not None:
        _check_features(meter, scores.residuals[0], packed, pairs.features[meter.feature], tolerance)
    return difference


def _check_features(
    meter: ObjectiveMeter, residual: torch.Tensor, packed: Packed, cached: Features, tolerance: float
) -> None:
    assert meter.sae is not None
    sae = meter.sae.to(residual.device)
    pooled = sae.pooled_mean(residual, packed.lengths.tolist())
    counts = torch.from_numpy(np.diff(cached.splits.astype(np.int64)))
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stored = torch.from_numpy(cached.acts)
    ours = pooled[rows, torch.from_numpy(cached.indices.astype(np.int64))].cpu()
    scale = float(stored.abs().mean()) if len(stored) else 1.0
    difference = float((ours - stored).abs().mean()) / scale if len(stored) else 0.0
    if not difference <= tolerance:
        raise ParityError(
            f"the policy does not reproduce the cached features of {meter.hookpoint}: they differ by "
            f"{100 * difference:.2g} % on average (at most {100 * tolerance:g} %)\n"
            "  the SAE and the weights are the cache's; is the policy's dtype or attention another?"
        )
