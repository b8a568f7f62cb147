"""Anchored preference optimisation, downwards."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class ApoDown(PairObjective):
    """Anchored preference optimisation for chosen completions worse than the model's, Eq. 8 of https://arxiv.org/abs/2408.06266."""

    name: Literal["apo_down"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return apo_down(evidence.policy, evidence.reference, beta=self.beta)


def apo_down(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Anchored preference optimisation, Eq. 8 of https://arxiv.org/abs/2408.06266, r = beta * logratio: both completions
    become less likely, the rejected one more so.

        loss = sigmoid(r_chosen) + 1 - sigmoid(r_chosen - r_rejected)
    """
    rewards = beta * (policy.logps - reference.logps)
    return ObjectiveValue(rewards[:, 0].sigmoid() + (rewards[:, 1] - rewards[:, 0]).sigmoid(), rewards.detach())
