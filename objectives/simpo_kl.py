"""SimPO with TDPO2's divergence term."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, over_chosen, penalised
from fpo.objectives.objective import Needs, PairObjective


class SimpoKl(PairObjective):
    """SimPO + KL, of Table 6 of https://arxiv.org/abs/2411.07618; its KL is over `cache.top_logits` tokens."""

    name: Literal["simpo_kl"]
    """The objective."""

    beta: PositiveFloat = 2.0
    """Scale of the whole margin."""

    gamma: NonNegativeFloat = 0.5
    """Target reward margin, in nats of the scaled difference, as in SimPO."""

    alpha: NonNegativeFloat = 0.5
    """Weight of the rejected completion's KL over the chosen one's, as in TDPO2."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, divergence=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.divergences is not None
        return simpo_kl(
            evidence.policy,
            evidence.divergences / evidence.lengths.clamp(min=1),
            evidence.penalties,
            beta=self.beta,
            gamma=self.gamma,
            alpha=self.alpha,
        )


def simpo_kl(
    policy: Logps,
    mean_divergences: Float[Tensor, "P 2"],
    penalties: Float[Tensor, "P 2"] | None = None,
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> ObjectiveValue:
    """
    SimPO + KL. https://arxiv.org/abs/2411.07618 names it and prints no formula; this is its own Eq. 7 without the
    reference's log-probs and with TDPO2's divergence in the place of the features', K the mean KL(reference || policy)
    of a completion's tokens:

        u    = beta * [ (mean_logps_chosen - mean_logps_rejected) - alpha * (K_rejected - sg(K_chosen)) ] - gamma
        loss = -log sigmoid(u)

    penalties  what a feature term adds to the mean log-probs of the margin; None adds nothing
    """
    rewards = beta * penalised(policy.mean_logps, penalties)
    u = rewards[:, 0] - rewards[:, 1] - beta * alpha * over_chosen(mean_divergences) - gamma
    return ObjectiveValue(-functional.logsigmoid(u), rewards.detach())
