"""Robust DPO."""

from __future__ import annotations

from typing import Literal

from torch.nn import functional

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import LabelSmoothing, Needs


class Robust(MarginObjective):
    """Robust DPO, an unbiased estimate of DPO's loss under flipped labels, https://arxiv.org/abs/2403.00409."""

    name: Literal["robust"]
    """The objective."""

    label_smoothing: LabelSmoothing = 0.1
    """The paper's epsilon: probability that chosen and rejected are the wrong way round. 0, TRL's default, is `dpo`."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return robust(
            evidence.policy,
            evidence.reference,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
        )


def robust(
    policy: Logps,
    reference: Logps,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = REVERSE_KL,
) -> ObjectiveValue:
    """
    Robust DPO, https://arxiv.org/abs/2403.00409, e = label_smoothing:

        u    = beta * (f'_chosen - f'_rejected)
        loss = (-(1 - e) * log sigmoid(u) + e * log sigmoid(-u)) / (1 - 2e)
    """
    logratios = policy.logps - reference.logps
    u = beta * divergence.margin(logratios)
    # log sigmoid(-u) is log sigmoid(u) - u, which leaves one logarithm.
    losses = -functional.logsigmoid(u) - label_smoothing / (1 - 2 * label_smoothing) * u
    return ObjectiveValue(losses, (beta * logratios).detach())
