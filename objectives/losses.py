"""
Objectives: pure functions from what policy and reference say about pairs to a loss per pair.

No model, no store, no config object, no device. Hyper-parameters carry the papers' letters and are
keyword-only; what stands in `docs/objectives.md` is what is computed here.

Dimension key:  P pairs; the second axis of (P, 2) is chosen, rejected   C completions (2P)   K features
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


class PairLogps(NamedTuple):
    """What one model says about pairs."""

    logps: Float[Tensor, "P 2"]
    """Log-probability of each completion, nats, summed over its scored tokens."""
    mean_logps: Float[Tensor, "P 2"]
    """The same divided by the number of scored tokens."""


class ObjectiveValue(NamedTuple):
    """An objective at P pairs; `losses` alone carries a gradient that training uses."""

    losses: Float[Tensor, " P"]
    rewards: Float[Tensor, "P 2"]
    """Implicit reward of chosen and rejected, as TRL reports it; the feature term is not part of it."""


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> ObjectiveValue:
    """
    Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290:

        loss = -log sigmoid(beta * (logratio_chosen - logratio_rejected))
    """
    rewards = beta * (policy.logps - reference.logps)
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach())


def simpo(policy: PairLogps, *, beta: float, gamma: float) -> ObjectiveValue:
    """
    Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734, without a reference:

        loss = -log sigmoid(beta * (mean_logps_chosen - mean_logps_rejected) - gamma)
    """
    rewards = beta * policy.mean_logps
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma), rewards.detach())


def fpo(
    policy: PairLogps,
    reference: PairLogps,
    distances: Float[Tensor, "P 2"] | None,
    *,
    beta: float,
    alpha: float,
) -> ObjectiveValue:
    """
    Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618:

        u    = beta * [ (mean_logratio_chosen - mean_logratio_rejected) - alpha * (D_rejected - sg(D_chosen)) ]
        loss = -log sigmoid(u)

    distances  D of Eq. 10, see `feature_distance`; None where alpha is 0
    sg stops the gradient, so only the rejected completion gets one from the feature term.
    """
    rewards = beta * (policy.mean_logps - reference.mean_logps)
    margin = rewards[:, 0] - rewards[:, 1]
    if distances is not None:
        margin = margin - beta * alpha * (distances[:, 1] - distances[:, 0].detach())
    return ObjectiveValue(-functional.logsigmoid(margin), rewards.detach())


def feature_distance(
    policy_acts: Float[Tensor, "C K"],
    reference_acts: Float[Tensor, "C K"],
    valid: Bool[Tensor, "C K"],
    *,
    k: int,
) -> Float[Tensor, " C"]:
    """
    Distance of pooled activations, Eq. 10 of https://arxiv.org/abs/2411.07618:

        D = (1/k) * sum over I of (policy_act - reference_act)^2

    valid  which of the K columns belong to the set I
    k      the prefactor, also where I is smaller or (as a union) larger than k
    """
    squares = (policy_acts - reference_acts).square()
    return torch.where(valid, squares, 0.0).sum(-1) / k
