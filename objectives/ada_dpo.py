"""DPO with adaptive preference scaling."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class AdaDpo(PairObjective):
    """Ada-DPO, https://arxiv.org/abs/2406.02764: each pair's margin is scaled by a temperature of its own."""

    name: Literal["ada_dpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    rho: Annotated[float, Field(gt=0)] = 0.1
    """The code's rho_0: how far a pair's loss may fall below log 2 before its temperature rises, nats."""

    tau_min: PositiveFloat = 0.1
    """Smallest temperature."""

    tau_max: PositiveFloat = 5.0
    """Largest temperature."""

    @model_validator(mode="after")
    def _check_taus(self) -> AdaDpo:
        if self.tau_min > self.tau_max:
            raise ValueError(f"objective.tau_min: {self.tau_min} is more than objective.tau_max: {self.tau_max}")
        return self

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return ada_dpo(
            evidence.policy,
            evidence.reference,
            beta=self.beta,
            rho=self.rho,
            tau_min=self.tau_min,
            tau_max=self.tau_max,
        )


def ada_dpo(
    policy: Logps, reference: Logps, *, beta: float, rho: float, tau_min: float, tau_max: float
) -> ObjectiveValue:
    """
    Ada-DPO, Eq. 3 of https://arxiv.org/abs/2406.02764, u = beta * (logratio_chosen - logratio_rejected):

        loss = min over tau in [tau_min, tau_max] of -tau * log sigmoid(u / tau) + (rho - log 2) * tau

    The minimum is where u / tau has a fixed size, so tau = clip(|u| / r, tau_min, tau_max), `temperature_ratio` r; the
    authors take five steps of Newton's method towards it. tau carries no gradient.
    """
    rewards = beta * (policy.logps - reference.logps)
    u = rewards[:, 0] - rewards[:, 1]
    tau: Float[Tensor, " P"] = (u.detach().abs() / temperature_ratio(rho)).clamp(tau_min, tau_max)
    losses = -tau * functional.logsigmoid(u / tau) + (rho - math.log(2)) * tau
    return ObjectiveValue(losses, rewards.detach())


def temperature_ratio(rho: float) -> float:
    """
    r > 0 at which the loss is stationary in tau: log 2 - H(sigmoid(r)) = rho, H the entropy of a coin in nats; infinite
    where rho is log 2 or more.
    """
    if rho >= math.log(2):
        return math.inf

    def excess(r: float) -> float:
        """log 2 - H(sigmoid(r)) - rho, which grows with r; H = log(1 + e^r) - r sigmoid(r)."""
        return math.log(2) - (math.log1p(math.exp(-r)) + r / (1 + math.exp(r))) - rho

    low, high = 0.0, 64.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2
