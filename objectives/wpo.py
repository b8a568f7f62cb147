"""Weighted preference optimisation."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs, PairObjective


class Wpo(PairObjective):
    """Weighted preference optimisation, Eq. 2 of https://arxiv.org/abs/2406.11827: DPO, likely pairs counting more."""

    name: Literal["wpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin. The authors train with 0.01."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round."""

    max_weight: PositiveFloat | None = 1.0
    """The largest weight of a pair, as in the authors' code; null bounds none, as TRL."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, typicality=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.typicality is not None
        return wpo(
            evidence.policy,
            evidence.reference,
            evidence.typicality,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            max_weight=self.max_weight,
        )


def wpo(
    policy: Logps,
    reference: Logps,
    typicality: Float[Tensor, "P 2"],
    *,
    beta: float,
    label_smoothing: float,
    max_weight: float | None,
) -> ObjectiveValue:
    """
    Weighted preference optimisation, Eq. 2 of https://arxiv.org/abs/2406.11827, its weights aligned to what the policy
    samples:

        w    = min( exp(typicality_chosen + typicality_rejected), max_weight ), without gradient
        u    = beta * (logratio_chosen - logratio_rejected)
        loss = w * (-(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u))
    """
    weights = typicality.detach().sum(1).exp()
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    rewards = beta * (policy.logps - reference.logps)
    u = rewards[:, 0] - rewards[:, 1]
    return ObjectiveValue(weights * smoothed_loss(u, label_smoothing), rewards.detach())
