"""Autoregressive DPO: one preference per segment."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional

from fpo.objectives.evidence import Evidence, ObjectiveValue, Tokens
from fpo.objectives.objective import Needs, PairObjective

# The paper's, for three of its four models.
DEFAULT_SEGMENTS = 256


class Adpo(PairObjective):
    """Autoregressive DPO, https://arxiv.org/abs/2602.09533: the two completions are compared segment by segment."""

    name: Literal["adpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of every segment's margin. The paper searched it and does not print it."""

    segments: PositiveInt | None = None
    """Adaptive segments (the paper's m): each completion in so many nearly equal ones; 1 is DPO. Null is 256."""

    window: PositiveInt | None = None
    """Static segments (the paper's k): windows of so many tokens from the beginning, instead of `segments`."""

    @model_validator(mode="after")
    def _check_segments(self) -> Adpo:
        if self.segments is not None and self.window is not None:
            raise ValueError(
                f"objective.window: {self.window} with objective.segments: {self.segments}; one of them says how a "
                "completion is cut"
            )
        return self

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, tokens=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.tokens is not None
        return adpo(
            evidence.tokens,
            evidence.lengths,
            evidence.penalties,
            beta=self.beta,
            segments=(self.segments or DEFAULT_SEGMENTS) if self.window is None else None,
            window=self.window,
        )


def adpo(
    tokens: Tokens,
    lengths: Float[Tensor, "P 2"],
    penalties: Float[Tensor, "P 2"] | None = None,
    *,
    beta: float,
    segments: int | None,
    window: int | None,
) -> ObjectiveValue:
    """
    Autoregressive DPO, Table 1 and Figure 1 of https://arxiv.org/abs/2602.09533, S the sum of a segment's token
    logratios:

        loss = - sum over i of log sigmoid( beta * (S_chosen(i) - S_rejected(i)) )

    segments   adaptive: of m segments the i-th begins at floor(i T / m) of a completion's T tokens; a pair with a
               completion of fewer than m tokens has as many segments as that one has tokens
    window     static: windows of k tokens; where one completion has ended, its S is 0 (the paper pads with end tokens)
    penalties  what a feature term adds to a completion's logratio, shared by its segments; None adds nothing
    """
    logratios = tokens.policy - tokens.reference
    unit, sizes = tokens.side // 2, lengths.long()
    if segments is not None:
        # Where nothing counts on one side, the other is one segment; where nothing does, there is none.
        counts = sizes.amin(1).clamp(min=1, max=segments).minimum(sizes.sum(1))
        segment = ((tokens.place + 1) * counts[unit] - 1) // sizes.flatten()[tokens.side]
    else:
        assert window is not None
        counts = -(-sizes.amax(1) // window)
        segment = tokens.place // window
    # All segments behind each other: there are no more of them than tokens.
    row = (counts.cumsum(0) - counts)[unit] + segment
    sums = logratios.new_zeros(2 * len(row)).index_add(0, 2 * row + tokens.side % 2, logratios).view(-1, 2)
    owner = torch.zeros_like(row).index_copy(0, row, unit)
    filled = torch.zeros_like(logratios).index_fill(0, row, 1.0)
    margins = sums[:, 0] - sums[:, 1]
    if penalties is not None:
        margins = margins + ((penalties[:, 0] - penalties[:, 1]) / counts.clamp(min=1))[owner]
    losses = -functional.logsigmoid(beta * margins) * filled
    rewards = beta * tokens.sums(logratios, lengths)
    return ObjectiveValue(rewards.new_zeros(len(lengths)).index_add(0, owner, losses), rewards.detach())
