"""Down-sampled DPO."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, ObjectiveValue, Tokens, penalised
from fpo.objectives.objective import Needs, PairObjective


class Sampo(PairObjective):
    """SamPO, https://arxiv.org/abs/2406.10957: as many tokens of either completion, drawn by pair and epoch."""

    name: Literal["sampo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, tokens=True, draws=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.tokens is not None
        return sampo(evidence.tokens, evidence.lengths, evidence.penalties, beta=self.beta)


def sampo(
    tokens: Tokens, lengths: Float[Tensor, "P 2"], penalties: Float[Tensor, "P 2"] | None = None, *, beta: float
) -> ObjectiveValue:
    """
    SamPO, https://arxiv.org/abs/2406.10957, l the shorter of the two lengths:

        logratio = sum over l tokens of the completion, drawn without replacement
        loss     = -log sigmoid( beta * (logratio_chosen - logratio_rejected) )

    penalties  what a feature term adds to the logratios; None adds nothing
    """
    assert tokens.draws is not None
    # The l tokens of lowest draw: sorted by completion, then by draw, their places are their ranks.
    order = torch.argsort(tokens.draws, stable=True)
    order = order[torch.argsort(tokens.side[order], stable=True)]
    drawn = torch.empty_like(tokens.place).index_copy(0, order, tokens.place) < lengths.amin(1)[tokens.side // 2]
    logratios = tokens.sums(drawn * (tokens.policy - tokens.reference), lengths)
    rewards = beta * penalised(logratios, penalties)
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach())
