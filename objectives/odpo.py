"""DPO with an offset from the completions' scores."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class Odpo(PairObjective):
    """DPO with an offset, https://arxiv.org/abs/2402.10571: the larger the gap of scores, the larger the margin."""

    name: Literal["odpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    alpha: PositiveFloat = 1.0
    """Weight of the offset."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, scores=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return odpo(evidence.policy, evidence.reference, evidence.scores, beta=self.beta, alpha=self.alpha)


def odpo(policy: Logps, reference: Logps, scores: Float[Tensor, "P 2"], *, beta: float, alpha: float) -> ObjectiveValue:
    """
    DPO with an offset, https://arxiv.org/abs/2402.10571:

        loss = -log sigmoid( beta * (logratio_chosen - logratio_rejected) - alpha * log(score_chosen - score_rejected) )

    A pair of equal scores has loss 0: it asks for no margin.
    """
    rewards = beta * (policy.logps - reference.logps)
    offset = alpha * (scores[:, 0] - scores[:, 1]).log()
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - offset), rewards.detach())
