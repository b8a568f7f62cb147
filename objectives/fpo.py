"""Feature-level constrained preference optimisation."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, over_chosen
from fpo.objectives.features import FeatureTerm
from fpo.objectives.objective import Needs, Paired


class Fpo(FeatureTerm, Paired):
    """Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618."""

    name: Literal["fpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Scale of the whole margin: pull towards the reference, as in DPO."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, features=self if self.alpha else None)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return fpo(
            evidence.policy,
            evidence.reference,
            evidence.distances,
            beta=self.beta,
            alpha=self.alpha,
        )


def fpo(
    policy: Logps,
    reference: Logps,
    distances: Float[Tensor, "P 2"] | None,
    *,
    beta: float,
    alpha: float,
) -> ObjectiveValue:
    """
    Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618:

        u    = beta * [ (mean_logratio_chosen - mean_logratio_rejected) - alpha * (D_rejected - sg(D_chosen)) ]
        loss = -log sigmoid(u)

    distances  D of Eq. 10, see `feature_distance`; None where alpha is 0
    sg stops the gradient, so only the rejected completion gets one from the feature term.
    """
    rewards = beta * (policy.mean_logps - reference.mean_logps)
    margin = rewards[:, 0] - rewards[:, 1]
    if distances is not None:
        margin = margin - beta * alpha * over_chosen(distances)
    return ObjectiveValue(-functional.logsigmoid(margin), rewards.detach())
