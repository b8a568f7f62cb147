"""Direct preference optimisation."""

from __future__ import annotations

from typing import Literal

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs


class Dpo(MarginObjective):
    """Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290."""

    name: Literal["dpo"]
    """The objective."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round (conservative DPO)."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return dpo(
            evidence.policy,
            evidence.reference,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
        )


def dpo(
    policy: Logps,
    reference: Logps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = REVERSE_KL,
) -> ObjectiveValue:
    """
    Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290, its labels smoothed as in Eq. 3 of
    https://ericmitchell.ai/cdpo.pdf:

        u    = beta * (f'_chosen - f'_rejected),  f' the logratio, or what another divergence makes of it
        loss = -(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u)
    """
    logratios = policy.logps - reference.logps
    u = beta * divergence.margin(logratios)
    return ObjectiveValue(smoothed_loss(u, label_smoothing), (beta * logratios).detach())
