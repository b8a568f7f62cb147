"""
What an objective is a function of, and what it gives, for pairs of completions.

Dimension key:  P pairs; the second axis of (P, 2) is chosen, rejected
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


class PairLogps(NamedTuple):
    """What one model says about pairs."""

    logps: Float[Tensor, "P 2"]
    """Log-probability of each completion, nats, summed over its tokens that count."""
    mean_logps: Float[Tensor, "P 2"]
    """The same divided by the number of those tokens."""


class Evidence(NamedTuple):
    """What policy and cache say about pairs: all that an objective sees."""

    policy: PairLogps
    reference: PairLogps
    lengths: Float[Tensor, "P 2"]
    """Scored tokens of each completion that count: what `mean_logps` are divided by."""
    distances: Float[Tensor, "P 2"] | None
    """Distance of the pooled features, see `feature_distance`; None where the objective asks for no features."""
    scores: Float[Tensor, "P 2"]
    """What the data says of each completion; nan where it says nothing and the objective asks for no scores."""
    typicality: Float[Tensor, "P 2"] | None = None
    """
    How much likelier a completion's tokens are than tokens that the policy samples: mean over them of
    log p(token) - log(sum of p(v)^2 over the vocabulary), nats, without gradient; None where it is not asked for.
    """


class ObjectiveValue(NamedTuple):
    """An objective at P pairs; `losses` alone carries a gradient that training uses."""

    losses: Float[Tensor, " P"]
    rewards: Float[Tensor, "P 2"]
    """Implicit reward of chosen and rejected, as TRL reports it; the feature term is not part of it."""


def smoothed_loss(u: Float[Tensor, " P"], label_smoothing: float) -> Float[Tensor, " P"]:
    """
    What a margin costs where chosen and rejected are the wrong way round with this probability, Eq. 3 of
    https://ericmitchell.ai/cdpo.pdf:

        loss = -(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u)
    """
    # -log sigmoid(-u) is u more than -log sigmoid(u).
    return label_smoothing * u - functional.logsigmoid(u)
