"""The hinge loss on DPO's margin."""

from __future__ import annotations

from typing import Literal

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs


class Hinge(MarginObjective):
    """Hinge loss on DPO's margin: SLiC's, https://arxiv.org/abs/2305.10425, as RSO, https://arxiv.org/abs/2309.06657."""

    name: Literal["hinge"]
    """The objective."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return hinge(evidence.policy, evidence.reference, beta=self.beta, divergence=self.divergence)


def hinge(policy: Logps, reference: Logps, *, beta: float, divergence: Divergence = REVERSE_KL) -> ObjectiveValue:
    """
    Hinge loss of SLiC, https://arxiv.org/abs/2305.10425, on the normalised margin of RSO,
    https://arxiv.org/abs/2309.06657:

        loss = max(0, 1 - beta * (f'_chosen - f'_rejected))
    """
    logratios = policy.logps - reference.logps
    return ObjectiveValue((1 - beta * divergence.margin(logratios)).relu(), (beta * logratios).detach())
