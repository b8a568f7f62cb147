"""Odds ratio preference optimisation, without a reference."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, Paired
from fpo.objectives.sft import sft

# 1 - exp of less is rounded to 0, and its logarithm is no number.
_CERTAIN = -1e-7


class Orpo(Paired):
    """Odds ratio preference optimisation, Eq. 6-7 of https://arxiv.org/abs/2403.07691; uses no reference."""

    name: Literal["orpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """The paper's lambda: weight of the odds ratio beside the chosen completions' log-likelihood."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return orpo(evidence.policy, evidence.lengths, beta=self.beta)


def orpo(policy: Logps, lengths: Float[Tensor, "P 2"], *, beta: float) -> ObjectiveValue:
    """
    Odds ratio preference optimisation, Eq. 6-7 of https://arxiv.org/abs/2403.07691, p = exp(mean_logps):

        loss = sft - beta * log sigmoid( log(p_chosen / (1 - p_chosen)) - log(p_rejected / (1 - p_rejected)) )

    sft is over the completion's tokens; TRL's ORPOTrainer takes the prompt's in.
    """
    odds = log_odds(policy.mean_logps)
    ratio = functional.logsigmoid(odds[:, 0] - odds[:, 1])
    return ObjectiveValue(sft(policy, lengths).losses - beta * ratio, (beta * policy.mean_logps).detach())


def log_odds(mean_logps: Float[Tensor, "P 2"]) -> Float[Tensor, "P 2"]:
    """log(p / (1 - p)) at p = exp(mean_logps), which is kept where float32 still tells it from 1."""
    held = mean_logps.clamp(max=_CERTAIN)
    return held - (-held.expm1()).log()
