"""Token-level DPO, the first of two."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class Tdpo1(PairObjective):
    """Token-level DPO, TDPO1 of https://arxiv.org/abs/2404.11999; its KL is over `cache.top_logits` tokens."""

    name: Literal["tdpo1"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, divergence=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.divergences is not None
        return tdpo1(evidence.policy, evidence.reference, evidence.divergences, beta=self.beta)


def tdpo1(policy: Logps, reference: Logps, divergences: Float[Tensor, "P 2"], *, beta: float) -> ObjectiveValue:
    """
    Token-level DPO, TDPO1 of https://arxiv.org/abs/2404.11999, K the KL(reference || policy) summed over a completion:

        u    = beta * [ (logratio_chosen - logratio_rejected) - (K_rejected - K_chosen) ]
        loss = -log sigmoid(u)

    Both K carry a gradient. The rewards are beta * (logratio + K), as the authors log them.
    """
    rewards = beta * (policy.logps - reference.logps + divergences)
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach())
