"""Efficient exact optimisation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch.nn import functional

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs


class ExoPair(MarginObjective):
    """Efficient exact optimisation from preferences, Eq. 16 of https://arxiv.org/abs/2402.00856."""

    name: Literal["exo_pair"]
    """The objective."""

    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """The paper's epsilon: what the rejected completion keeps of the target; above 0, its logarithm is taken."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return exo_pair(
            evidence.policy,
            evidence.reference,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            divergence=self.divergence,
        )


def exo_pair(
    policy: Logps,
    reference: Logps,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = REVERSE_KL,
) -> ObjectiveValue:
    """
    Efficient exact optimisation, Eq. 16 of https://arxiv.org/abs/2402.00856: the reverse KL from what the policy says
    about the pair to its smoothed label, e = label_smoothing:

        u    = beta * (f'_chosen - f'_rejected)
        loss = sigmoid(u) * (log sigmoid(u) - log(1 - e)) + sigmoid(-u) * (log sigmoid(-u) - log e)
    """
    logratios = policy.logps - reference.logps
    u = beta * divergence.margin(logratios)
    chosen = u.sigmoid() * (functional.logsigmoid(u) - math.log1p(-label_smoothing))
    rejected = (-u).sigmoid() * (functional.logsigmoid(-u) - math.log(label_smoothing))
    return ObjectiveValue(chosen + rejected, (beta * logratios).detach())
