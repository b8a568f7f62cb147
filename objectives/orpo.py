"""Odds ratio preference optimisation, without a reference."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.objective import Needs, Objective
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps
from fpo.objectives.sft import sft


class Orpo(Objective):
    """Odds ratio preference optimisation, Eq. 6-7 of https://arxiv.org/abs/2403.07691; uses no reference."""

    name: Literal["orpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """The paper's lambda: weight of the odds ratio beside the chosen completions' log-likelihood."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return orpo(evidence.policy, evidence.lengths, beta=self.beta)


def orpo(policy: PairLogps, lengths: Float[Tensor, "P 2"], *, beta: float) -> ObjectiveValue:
    """
    Odds ratio preference optimisation, Eq. 6-7 of https://arxiv.org/abs/2403.07691, p = exp(mean_logps):

        loss = sft - beta * log sigmoid( log(p_chosen / (1 - p_chosen)) - log(p_rejected / (1 - p_rejected)) )

    sft is over the completion's tokens; TRL's ORPOTrainer takes the prompt's in.
    """
    log_odds = policy.mean_logps - (-policy.mean_logps.expm1()).log()
    ratio = functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    return ObjectiveValue(sft(policy, lengths).losses - beta * ratio, (beta * policy.mean_logps).detach())
