"""Aligned supervised fine-tuning, without a reference."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, Paired
from fpo.objectives.orpo import log_odds


class Asft(Paired):
    """Aligned supervised fine-tuning, https://arxiv.org/abs/2409.10571, as 2502.01237 writes it; uses no reference."""

    name: Literal["asft"]
    """The objective."""

    beta: PositiveFloat = 1.0
    """Scale of the log odds; 1 is the original."""

    alignment_weight: NonNegativeFloat = 1.0
    """The paper's lambda: weight of the alignment term."""

    sft_weight: NonNegativeFloat = 1.0
    """Weight of the chosen completion's mean negative log-likelihood; 0 where the policy was fine-tuned before."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return asft(evidence.policy, beta=self.beta, alignment_weight=self.alignment_weight, sft_weight=self.sft_weight)


def asft(policy: Logps, *, beta: float, alignment_weight: float, sft_weight: float) -> ObjectiveValue:
    """
    Aligned supervised fine-tuning as https://arxiv.org/abs/2502.01237 writes it, p = exp(mean_logps) and
    o = log(p / (1 - p)):

        loss = -sft_weight * log p_chosen
               + alignment_weight * [ -log sigmoid(beta * o_chosen) - log sigmoid(-beta * o_rejected) ]
    """
    scaled: Float[Tensor, "P 2"] = beta * log_odds(policy.mean_logps)
    alignment = -functional.logsigmoid(scaled[:, 0]) - functional.logsigmoid(-scaled[:, 1])
    losses = alignment_weight * alignment - sft_weight * policy.mean_logps[:, 0]
    return ObjectiveValue(losses, (beta * policy.mean_logps).detach())
