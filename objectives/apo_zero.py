"""Anchored preference optimisation, both ways."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class ApoZero(PairObjective):
    """Anchored preference optimisation for chosen completions better than the model's, Eq. 7 of https://arxiv.org/abs/2408.06266."""

    name: Literal["apo_zero"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return apo_zero(evidence.policy, evidence.reference, beta=self.beta)


def apo_zero(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Anchored preference optimisation, Eq. 7 of https://arxiv.org/abs/2408.06266, r = beta * logratio: chosen completions
    become likelier, rejected ones less likely.

        loss = 1 - sigmoid(r_chosen) + sigmoid(r_rejected)
    """
    rewards = beta * (policy.logps - reference.logps)
    return ObjectiveValue((-rewards[:, 0]).sigmoid() + rewards[:, 1].sigmoid(), rewards.detach())
