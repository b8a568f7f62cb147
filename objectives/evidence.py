"""
What an objective is a function of, and what it gives.

Dimension key:  U units, what a loss is given for: pairs, single completions or groups
                n completions of a unit: chosen and rejected; one; or a group's, best first, padded to the longest
                T tokens of the units' completions that count, unit by unit and completion by completion
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class Logps(NamedTuple):
    """What one model says about the completions of units."""

    logps: Float[Tensor, "U n"]
    """Log-probability of each completion, nats, summed over its tokens that count."""
    mean_logps: Float[Tensor, "U n"]
    """The same divided by the number of those tokens."""


class Tokens(NamedTuple):
    """The tokens of the units' completions one by one."""

    policy: Float[Tensor, " T"]
    """Log-probability of each, nats."""
    reference: Float[Tensor, " T"]
    side: Int[Tensor, " T"]
    """Which completion of which unit a token is of: unit * n + place."""
    place: Int[Tensor, " T"]
    """Its place among its completion's tokens that count, from 0."""
    draws: Float[Tensor, " T"] | None
    """Uniform in [0, 1), by unit and epoch; None where it is not asked for."""

    def sums(self, values: Float[Tensor, " T"], lengths: Float[Tensor, "U n"]) -> Float[Tensor, "U n"]:
        """Of each completion."""
        return values.new_zeros(lengths.numel()).index_add(0, self.side, values).view(lengths.shape)


class Evidence(NamedTuple):
    """What policy and cache say about units: all that an objective sees."""

    policy: Logps
    reference: Logps
    lengths: Float[Tensor, "U n"]
    """Scored tokens of each completion that count: what `mean_logps` are divided by."""
    distances: Float[Tensor, "U n"] | None
    """Distance of the pooled features, see `feature_distance`; None where the objective asks for no features."""
    scores: Float[Tensor, "U n"]
    """What the data says of each completion; nan where it says nothing and the objective asks for no scores."""
    typicality: Float[Tensor, "U n"] | None = None
    """
    How much likelier a completion's tokens are than tokens that the policy samples: mean over them of
    log p(token) - log(sum of p(v)^2 over the vocabulary), nats, without gradient; None where it is not asked for.
    """
    tokens: Tokens | None = None
    """None where it is not asked for."""
    divergences: Float[Tensor, "U n"] | None = None
    """
    KL(reference || policy) summed over a completion's tokens that count, nats, see `divergence_from`; None where it is
    not asked for.
    """
    draws: Float[Tensor, " U"] | None = None
    """Uniform in [0, 1), by unit and epoch; None where it is not asked for."""
    present: Bool[Tensor, "U n"] | None = None
    """Of groups, which of the n places hold a completion; None where all do."""
    desirable: Bool[Tensor, " U"] | None = None
    """Of single completions, whether the data prefers each; None for other units."""
    mismatched: Float[Tensor, ""] | None = None
    """Mean logratio of completions behind other groups' prompts, nats, without gradient; None where not asked for."""
    penalties: Float[Tensor, "U n"] | None = None
    """The feature term where it is composed with an objective: alpha x distance; None where it is not."""

    def constrained(self, alpha: float) -> Evidence:
        """
        The same with alpha x distance added to each logratio: u = logratio_chosen - logratio_rejected becomes
        u - alpha * (D_rejected - sg(D_chosen)), Eq. 7-11 of https://arxiv.org/abs/2411.07618. A unit's first completion
        gets no gradient from it, a single one where it is desirable, for neither is rejected.
        """
        assert self.distances is not None
        if self.desirable is None:
            held = torch.cat([self.distances[:, :1].detach(), self.distances[:, 1:]], dim=1)
        else:
            held = torch.where(self.desirable[:, None], self.distances.detach(), self.distances)
        penalties = alpha * held
        logps, mean_logps = (said - penalties for said in self.reference)
        return self._replace(reference=Logps(logps, mean_logps), penalties=penalties)


class ObjectiveValue(NamedTuple):
    """An objective at U units; `losses` alone carries a gradient that training uses."""

    losses: Float[Tensor, " U"]
    rewards: Float[Tensor, "U n"]
    """Implicit reward of each completion, as TRL reports it; the feature term is not part of it."""


def over_chosen(values: Float[Tensor, "P 2"]) -> Float[Tensor, " P"]:
    """The rejected completion's value less the chosen one's, of which the latter has no gradient."""
    return values[:, 1] - values[:, 0].detach()


def penalised(logps: Float[Tensor, "P 2"], penalties: Float[Tensor, "P 2"] | None) -> Float[Tensor, "P 2"]:
    """Log-probs or logratios with what a feature term adds to them in the margin; None adds nothing."""
    return logps if penalties is None else logps + penalties


def smoothed_loss(u: Float[Tensor, " P"], label_smoothing: float) -> Float[Tensor, " P"]:
    """
    What a margin costs where chosen and rejected are the wrong way round with this probability, Eq. 3 of
    https://ericmitchell.ai/cdpo.pdf:

        loss = -(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u)
    """
    # -log sigmoid(-u) is u more than -log sigmoid(u).
    return label_smoothing * u - functional.logsigmoid(u)
