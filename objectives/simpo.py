"""Simple preference optimisation, without a reference."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, penalised
from fpo.objectives.objective import Needs, PairObjective
from fpo.objectives.sft import sft


class Simpo(PairObjective):
    """Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734; uses no reference."""

    name: Literal["simpo"]
    """The objective."""

    beta: PositiveFloat = 2.0
    """Scale of the difference of the mean log-probs."""

    gamma: NonNegativeFloat = 0.5
    """Target reward margin, in nats of the scaled difference (the authors' code calls gamma / beta a ratio)."""

    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen completions' log-likelihood."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return simpo(
            evidence.policy,
            evidence.lengths,
            evidence.penalties,
            beta=self.beta,
            gamma=self.gamma,
            sft_weight=self.sft_weight,
        )


def simpo(
    policy: Logps,
    lengths: Float[Tensor, "P 2"],
    penalties: Float[Tensor, "P 2"] | None = None,
    *,
    beta: float,
    gamma: float,
    sft_weight: float = 0.0,
) -> ObjectiveValue:
    """
    Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734, without a reference:

        loss = -log sigmoid(beta * (mean_logps_chosen - mean_logps_rejected) - gamma) + sft_weight * sft

    penalties  what a feature term adds to the mean log-probs of the margin; None adds nothing
    """
    rewards = beta * penalised(policy.mean_logps, penalties)
    losses = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma)
    if sft_weight:
        losses = losses + sft_weight * sft(policy, lengths).losses
    return ObjectiveValue(losses, rewards.detach())
