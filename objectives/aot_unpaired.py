"""Alignment by optimal transport, of unpaired data."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from fpo.objectives.aot import ranks
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs, PairObjective


class AotUnpaired(PairObjective):
    """Alignment by optimal transport, unpaired, https://arxiv.org/abs/2406.05882; sorts a forward's completions."""

    name: Literal["aot_unpaired"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return aot_unpaired(evidence.policy, evidence.reference, beta=self.beta, label_smoothing=self.label_smoothing)


def aot_unpaired(policy: Logps, reference: Logps, *, beta: float, label_smoothing: float) -> ObjectiveValue:
    """
    Alignment by optimal transport, unpaired, https://arxiv.org/abs/2406.05882: the chosen completions' logratios as a
    distribution above the rejected ones', whichever pairs they come from:

        u_k  = beta * (sorted(logratio_chosen)_k - sorted(logratio_rejected)_k)
        loss = -(1 - label_smoothing) * log sigmoid(u_k) - label_smoothing * log sigmoid(-u_k)

    A pair's loss is that of its chosen completion. The batch is one forward of one process, as in `aot`.
    """
    logratios = policy.logps - reference.logps
    u = beta * (logratios[:, 0] - logratios[:, 1].sort().values[ranks(logratios[:, 0])])
    return ObjectiveValue(smoothed_loss(u, label_smoothing), (beta * logratios).detach())
