"""What every objective is: a section of the recipe that says what it asks of a cache and gives a loss per unit."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from fpo.objectives.evidence import Evidence, ObjectiveValue
from fpo.objectives.features import FeatureTerm
from fpo.section import Section

LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""Probability that a pair is the wrong way round; at a half the pairs would say nothing."""


@dataclass(frozen=True)
class Needs:
    """
    What an objective asks of a cache besides the tokens, and of the policy besides log-probs. The recipe is refused
    where its cache would not hold that, and training gathers nothing else.
    """

    reference: bool
    """Whether what the reference says enters the loss (`ref_logps` or features)."""
    features: FeatureTerm | None = None
    """The feature term; None is none."""
    scores: bool = False
    """Whether the data's scores of the completions enter the loss."""
    typicality: bool = False
    """Whether the policy's whole distributions enter the loss, as `Evidence.typicality` sums them up."""
    tokens: bool = False
    """Whether the log-probs of single tokens enter the loss."""
    divergence: bool = False
    """Whether the KL divergence of whole distributions enters the loss, from the column of top logits."""
    mismatched: bool = False
    """Whether the logratios of mismatched completions enter the loss, from their column."""
    draws: bool = False
    """Whether chance enters the loss."""


Pairing = Literal["best_rest", "best_worst", "adjacent", "all"]
UnitKind = Literal[Pairing, "completions", "groups"]
"""What a loss is given for: pairs of a group's completions, each completion, or the group as a list."""


class Objective(Section):
    """What all objectives share; see docs/objectives.md for the formulas."""

    @property
    @abstractmethod
    def units(self) -> UnitKind:
        """What a loss is given for."""

    @property
    @abstractmethod
    def formula_needs(self) -> Needs:
        """What the formula asks of a cache with these settings."""

    @property
    def needs(self) -> Needs:
        """What these settings ask of a cache."""
        return self.formula_needs

    @abstractmethod
    def value(self, evidence: Evidence) -> ObjectiveValue:
        """The objective's formula with these settings."""

    def total(self, evidence: Evidence) -> ObjectiveValue:
        """The same with the feature term that `features` adds, of which rewards know nothing."""
        return self.value(evidence)


class Composable(Objective):
    """An objective to which a feature term can be added: one of margins or logratios."""

    features: FeatureTerm | None = None
    """A feature term: each logratio (without a reference, each log-prob of the margin) grows by alpha x distance."""

    @property
    def needs(self) -> Needs:
        needs = self.formula_needs
        term = self.features
        if term is None or term.alpha == 0:
            return needs
        return replace(needs, features=term, reference=True)

    def total(self, evidence: Evidence) -> ObjectiveValue:
        if self.features is None or evidence.distances is None:
            return self.value(evidence)
        with torch.no_grad():
            rewards = self.value(evidence).rewards
        return self.value(evidence.constrained(self.features.alpha))._replace(rewards=rewards)


class Paired(Objective):
    """An objective over pairs of completions."""

    pairs: Pairing = "best_rest"
    """Which completions of a group of more than two are compared; all its pairs together count as one pair does."""

    @property
    def units(self) -> UnitKind:
        return self.pairs


class ListObjective(Composable):
    """An objective over groups as lists, to which a feature term can be added."""

    @property
    def units(self) -> UnitKind:
        return "groups"


class PairObjective(Composable, Paired):
    """An objective over pairs to which a feature term can be added."""
