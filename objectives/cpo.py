"""Contrastive preference optimisation, without a reference."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, penalised, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs, PairObjective
from fpo.objectives.sft import sft


class Cpo(PairObjective):
    """Contrastive preference optimisation, Eq. 3-5 of https://arxiv.org/abs/2401.08417; uses no reference."""

    name: Literal["cpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Scale of the difference of the summed log-probs."""

    sft_weight: NonNegativeFloat = 1.0
    """Weight of the chosen completions' log-likelihood (TRL's cpo_alpha)."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return cpo(
            evidence.policy,
            evidence.lengths,
            evidence.penalties,
            beta=self.beta,
            sft_weight=self.sft_weight,
            label_smoothing=self.label_smoothing,
        )


def cpo(
    policy: Logps,
    lengths: Float[Tensor, "P 2"],
    penalties: Float[Tensor, "P 2"] | None = None,
    *,
    beta: float,
    sft_weight: float,
    label_smoothing: float = 0.0,
) -> ObjectiveValue:
    """
    Contrastive preference optimisation, https://arxiv.org/abs/2401.08417:

        u    = beta * (logps_chosen - logps_rejected)
        loss = -(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u) + sft_weight * sft

    penalties  what a feature term adds to the log-probs of the margin; None adds nothing
    """
    rewards = beta * penalised(policy.logps, penalties)
    u = rewards[:, 0] - rewards[:, 1]
    losses = smoothed_loss(u, label_smoothing) + sft_weight * sft(policy, lengths).losses
    return ObjectiveValue(losses, rewards.detach())
