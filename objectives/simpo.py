"""Simple preference optimisation, without a reference."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch.nn import functional

from fpo.objectives.objective import Needs, Objective
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps


class Simpo(Objective):
    """Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734; uses no reference."""

    name: Literal["simpo"]
    """The objective."""

    beta: PositiveFloat = 2.0
    """Scale of the difference of the mean log-probs."""

    gamma: NonNegativeFloat = 0.5
    """Target reward margin, in nats of the scaled difference (the authors' code calls gamma / beta a ratio)."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return simpo(evidence.policy, beta=self.beta, gamma=self.gamma)


def simpo(policy: PairLogps, *, beta: float, gamma: float) -> ObjectiveValue:
    """
    Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734, without a reference:

        loss = -log sigmoid(beta * (mean_logps_chosen - mean_logps_rejected) - gamma)
    """
    rewards = beta * policy.mean_logps
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma), rewards.detach())
