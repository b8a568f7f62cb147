"""Length-desensitised DPO."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, ObjectiveValue, Tokens, penalised, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs, PairObjective


class LdDpo(PairObjective):
    """Length-desensitised DPO, https://arxiv.org/abs/2409.06411: tokens beyond the shorter length weigh less."""

    name: Literal["ld_dpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The paper's alpha: weight of the tokens that the shorter completion has none beside; 1 is DPO."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, tokens=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.tokens is not None
        return ld_dpo(
            evidence.tokens,
            evidence.lengths,
            evidence.penalties,
            beta=self.beta,
            ld_alpha=self.ld_alpha,
            label_smoothing=self.label_smoothing,
        )


def ld_dpo(
    tokens: Tokens,
    lengths: Float[Tensor, "P 2"],
    penalties: Float[Tensor, "P 2"] | None = None,
    *,
    beta: float,
    ld_alpha: float,
    label_smoothing: float = 0.0,
) -> ObjectiveValue:
    """
    Length-desensitised DPO, https://arxiv.org/abs/2409.06411, l the shorter of the two lengths:

        logratio = sum of the first l tokens' + ld_alpha * sum of the others'
        u        = beta * (logratio_chosen - logratio_rejected)
        loss     = -(1 - label_smoothing) * log sigmoid(u) - label_smoothing * log sigmoid(-u)

    penalties  what a feature term adds to the logratios; None adds nothing
    """
    shared = lengths.amin(1)[tokens.side // 2]
    weights = torch.where(tokens.place < shared, 1.0, ld_alpha)
    logratios = tokens.sums(weights * (tokens.policy - tokens.reference), lengths)
    rewards = beta * penalised(logratios, penalties)
    return ObjectiveValue(smoothed_loss(rewards[:, 0] - rewards[:, 1], label_smoothing), rewards.detach())
