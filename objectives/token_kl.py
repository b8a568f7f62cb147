"""
KL divergence of next-token distributions, from the reference's most likely tokens and what is left.

Dimension key:  N tokens   M of the reference's most likely tokens at each
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Of probability: less than this is what float32 leaves of one minus the sum of all tokens.
_NOTHING = 1e-6


def token_kl(reference_top: Float[Tensor, "N M"], policy_top: Float[Tensor, "N M"]) -> Float[Tensor, " N"]:
    """
    KL(reference || policy) of each distribution over M + 1 events, the M tokens and any other token, in nats:

        K = sum over M of p (log p - log q) + p_rest (log p_rest - log q_rest),  p_rest = 1 - sum p,  q_rest = 1 - sum q

    A lower bound of the KL divergence over the whole vocabulary (the data-processing inequality), and equal to it where
    the M tokens are all there are, or all but one.

    reference_top  log p of the reference's M most likely tokens; policy_top: the policy's log q of the same tokens
    """
    p = reference_top.exp()
    p_rest = (1 - p.sum(-1)).clamp(min=_NOTHING)
    q_rest = (1 - policy_top.exp().sum(-1)).clamp(min=_NOTHING)
    rest = torch.where(p_rest > _NOTHING, p_rest * (p_rest.log() - q_rest.log()), 0.0)
    return (p * (reference_top - policy_top)).sum(-1) + rest
