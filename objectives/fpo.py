"""Feature-level constrained preference optimisation."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

from fpo.objectives.features import FeatureNeed, FeatureSet
from fpo.objectives.objective import Needs, Objective
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps


class Fpo(Objective):
    """Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618."""

    name: Literal["fpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Scale of the whole margin: pull towards the reference, as in DPO."""

    alpha: NonNegativeFloat = 0.5
    """Weight of the feature term; 0 never loads the SAE."""

    k: PositiveInt = 50
    """How many features a completion's distance is over; the sum is divided by k."""

    feature_set: FeatureSet = "reference"
    """Whose top k: the reference's (exact from any cache), both models' as in the paper, or the policy's."""

    length_normalised: bool = True
    """Margin of mean logratios; false takes the sums of `dpo`, to which `alpha` adds the feature term alone."""

    hookpoint: str | None = None
    """Which of `features` is constrained; null is the only one there is."""

    @property
    def needs(self) -> Needs:
        if self.alpha == 0:
            return Needs(reference=True)
        return Needs(reference=True, features=FeatureNeed(self.hookpoint, self.k, self.feature_set, "alpha: 0"))

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return fpo(
            evidence.policy,
            evidence.reference,
            evidence.distances,
            beta=self.beta,
            alpha=self.alpha,
            length_normalised=self.length_normalised,
        )


def fpo(
    policy: PairLogps,
    reference: PairLogps,
    distances: Float[Tensor, "P 2"] | None,
    *,
    beta: float,
    alpha: float,
    length_normalised: bool = True,
) -> ObjectiveValue:
    """
    Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618:

        u    = beta * [ (mean_logratio_chosen - mean_logratio_rejected) - alpha * (D_rejected - sg(D_chosen)) ]
        loss = -log sigmoid(u)

    distances  D of Eq. 10, see `feature_distance`; None where alpha is 0
    sg stops the gradient, so only the rejected completion gets one from the feature term. Without `length_normalised`
    the logratios are sums.
    """
    logratios = policy.mean_logps - reference.mean_logps if length_normalised else policy.logps - reference.logps
    rewards = beta * logratios
    margin = rewards[:, 0] - rewards[:, 1]
    if distances is not None:
        margin = margin - beta * alpha * (distances[:, 1] - distances[:, 0].detach())
    return ObjectiveValue(-functional.logsigmoid(margin), rewards.detach())
