"""Identity preference optimisation."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from fpo.objectives.divergence import REVERSE_KL, Divergence, MarginObjective
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs


class Ipo(MarginObjective):
    """Identity preference optimisation, Eq. 17 of https://arxiv.org/abs/2310.12036."""

    name: Literal["ipo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """The paper's tau: the margin is pulled to 1 / (2 beta)."""

    length_normalised: bool = True
    """Take the margin per token, as TRL does and the authors did; false takes it of the sums, as the paper writes."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return ipo(
            evidence.policy,
            evidence.reference,
            evidence.lengths if self.length_normalised else None,
            beta=self.beta,
            divergence=self.divergence,
        )


def ipo(
    policy: Logps,
    reference: Logps,
    lengths: Float[Tensor, "P 2"] | None,
    *,
    beta: float,
    divergence: Divergence = REVERSE_KL,
) -> ObjectiveValue:
    """
    Identity preference optimisation, Eq. 17 of https://arxiv.org/abs/2310.12036:

        loss = (f'_chosen / length_chosen - f'_rejected / length_rejected - 1 / (2 beta))^2

    lengths  None does not divide
    """
    logratios = policy.logps - reference.logps
    scores = divergence.scores(logratios)
    if lengths is not None:
        scores = scores / lengths.clamp(min=1)
    return ObjectiveValue((scores[:, 0] - scores[:, 1] - 1 / (2 * beta)).square(), (beta * logratios).detach())
