"""SAIL's objective over a dataset whose labels the policy draws again."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class SailDp(PairObjective):
    """SAIL-DP, https://arxiv.org/abs/2406.15567: DPO, some labels drawn again by the policy, by pair and epoch."""

    name: Literal["sail_dp"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.4
    """The code's r: probability that a pair's label is drawn again."""

    rho: NonNegativeFloat = 0.2
    """Weight of the gradient that comes with it."""

    score_function: bool = False
    """Add rho's score-function term, which the code adds with the other sign and divided by the log-probs."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, draws=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.draws is not None
        return sail_dp(
            evidence.policy,
            evidence.reference,
            evidence.draws,
            beta=self.beta,
            share=self.share,
            rho=self.rho,
            score_function=self.score_function,
        )


def sail_dp(
    policy: Logps,
    reference: Logps,
    draws: Float[Tensor, " P"],
    *,
    beta: float,
    share: float,
    rho: float,
    score_function: bool,
) -> ObjectiveValue:
    """
    SAIL-DP, https://arxiv.org/abs/2406.15567, as cdpo/cdpo_trainer.py of the authors' code has it ("DDP" there), with
    u = beta * (logratio_chosen - logratio_rejected). A share of the pairs is relabelled: swapped with probability
    sigmoid(-u) under the policy as it is, which turns u's sign. Then

        loss = -log sigmoid(u) - (rho / 2) * relabelled * (log sigmoid(u))^2

    and with `score_function` further - rho * relabelled * sg(log sigmoid(u)) * (logps_chosen + logps_rejected), whose
    value means nothing: it is there for its gradient.

    draws  uniform in [0, 1), one per pair: below `share` it relabels, and what it is of `share` swaps
    """
    rewards = beta * (policy.logps - reference.logps)
    u = rewards[:, 0] - rewards[:, 1]
    relabelled = draws < share
    swapped = relabelled & (draws < share * torch.sigmoid(-u.detach()))
    log_likelihood = functional.logsigmoid(torch.where(swapped, -u, u))
    gradient = torch.where(relabelled, rho, 0.0)
    losses = -log_likelihood - gradient / 2 * log_likelihood.square()
    if score_function:
        losses = losses - gradient * log_likelihood.detach() * policy.logps.sum(1)
    return ObjectiveValue(losses, rewards.detach())
