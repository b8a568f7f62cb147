"""Kahneman-Tversky optimisation."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Composable, Needs, UnitKind


class Kto(Composable):
    """Kahneman-Tversky optimisation, Eq. 8 of https://arxiv.org/abs/2402.01306, of completions one by one."""

    name: Literal["kto"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    desirable_weight: NonNegativeFloat = 1.0
    """The paper's lambda_D: weight of a desirable completion's loss."""

    undesirable_weight: NonNegativeFloat = 1.0
    """The paper's lambda_U: weight of an undesirable completion's loss."""

    @property
    def units(self) -> UnitKind:
        return "completions"

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, mismatched=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.desirable is not None
        assert evidence.mismatched is not None
        return kto(
            evidence.policy,
            evidence.reference,
            evidence.desirable,
            evidence.mismatched,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


def kto(
    policy: Logps,
    reference: Logps,
    desirable: Bool[Tensor, " C"],
    mismatched: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> ObjectiveValue:
    """
    Kahneman-Tversky optimisation, Eq. 8 of https://arxiv.org/abs/2402.01306:

        z     = max( 0, mean logratio of mismatched completions ), without gradient
        loss  = desirable_weight   * ( 1 - sigmoid(beta * (logratio - z)) )   of a desirable completion
                undesirable_weight * ( 1 - sigmoid(beta * (z - logratio)) )   of an undesirable one
    """
    rewards = beta * (policy.logps - reference.logps)
    apart = rewards[:, 0] - beta * mismatched.detach().clamp(min=0)
    gained = torch.sigmoid(torch.where(desirable, apart, -apart))
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return ObjectiveValue(weights * (1 - gained), rewards.detach())
