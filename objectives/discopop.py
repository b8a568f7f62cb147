"""The loss that DiscoPOP's search discovered."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn import functional

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs

# exp(80) is finite in float32, and what it is multiplied with is 0 there.
_LARGEST_EXPONENT = 80.0


class Discopop(MarginObjective):
    """Log-ratio modulated loss of DiscoPOP, Eq. 5 of https://arxiv.org/abs/2406.08414; not convex."""

    name: Literal["discopop"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin. The authors train with 0.05."""

    tau: PositiveFloat = 0.05
    """Temperature of the modulation (TRL's discopop_tau)."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return discopop(evidence.policy, evidence.reference, beta=self.beta, tau=self.tau, divergence=self.divergence)


def discopop(
    policy: Logps, reference: Logps, *, beta: float, tau: float, divergence: Divergence = REVERSE_KL
) -> ObjectiveValue:
    """
    Log-ratio modulated loss, Eq. 5 of https://arxiv.org/abs/2406.08414:

        u    = beta * (f'_chosen - f'_rejected),  m = sigmoid(u / tau)
        loss = (1 - m) * -log sigmoid(u) + m * exp(-u)
    """
    logratios = policy.logps - reference.logps
    u = beta * divergence.margin(logratios)
    modulation = (u / tau).sigmoid()
    exponential = (-u).clamp(max=_LARGEST_EXPONENT).exp()
    losses = (1 - modulation) * -functional.logsigmoid(u) + modulation * exponential
    return ObjectiveValue(losses, (beta * logratios).detach())
