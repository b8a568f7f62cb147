"""Token-level DPO, the second of two."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, over_chosen
from fpo.objectives.objective import Needs, PairObjective


class Tdpo2(PairObjective):
    """Token-level DPO, TDPO2 of https://arxiv.org/abs/2404.11999; its KL is over `cache.top_logits` tokens."""

    name: Literal["tdpo2"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    alpha: NonNegativeFloat = 0.5
    """Weight of the rejected completion's KL over the chosen one's."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, divergence=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.divergences is not None
        return tdpo2(evidence.policy, evidence.reference, evidence.divergences, beta=self.beta, alpha=self.alpha)


def tdpo2(
    policy: Logps, reference: Logps, divergences: Float[Tensor, "P 2"], *, beta: float, alpha: float
) -> ObjectiveValue:
    """
    Token-level DPO, TDPO2 of https://arxiv.org/abs/2404.11999, K the KL(reference || policy) summed over a completion:

        u    = beta * [ (logratio_chosen - logratio_rejected) - alpha * (K_rejected - sg(K_chosen)) ]
        loss = -log sigmoid(u)

    sg stops the gradient. The rewards are beta * (logratio + K), as the authors log them.
    """
    logratios = policy.logps - reference.logps
    losses = -functional.logsigmoid(beta * (logratios[:, 0] - logratios[:, 1] - alpha * over_chosen(divergences)))
    return ObjectiveValue(losses, (beta * (logratios + divergences)).detach())
