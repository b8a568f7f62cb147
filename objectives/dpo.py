"""Direct preference optimisation."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn import functional

from fpo.objectives.objective import Needs, Objective
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps


class Dpo(Objective):
    """Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290."""

    name: Literal["dpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the difference of the summed logratios."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return dpo(evidence.policy, evidence.reference, beta=self.beta)


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> ObjectiveValue:
    """
    Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290:

        loss = -log sigmoid(beta * (logratio_chosen - logratio_rejected))
    """
    rewards = beta * (policy.logps - reference.logps)
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach())
