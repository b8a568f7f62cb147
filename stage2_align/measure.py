"""
From one forward pass over a batch to the loss of each of an objective's units: the policy's scores, the cached
reference's, and what else the objective asks for.

Dimension key:  U units of n completions   C completions   N scored tokens   K columns   F d_sae
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce
from jaxtyping import Float, Int
from torch import Tensor

from fpo.errors import RecipeError
from fpo.objectives import (
    Evidence,
    FeatureTerm,
    Logps,
    Objective,
    ObjectiveValue,
    Tokens,
    feature_distance,
    token_kl,
)
from fpo.recipe import Recipe
from fpo.scoring import (
    ColumnSet,
    KnownColumns,
    Packed,
    Sae,
    Scores,
    SparseRows,
    TokenGrid,
    load_sae,
    look_up,
    policy_top,
    sum_logps,
    union,
)


class Measurement(NamedTuple):
    """A batch under an objective."""

    value: ObjectiveValue
    evidence: Evidence
    incomplete: bool
    """Whether the distance asks for reference activations that the cache may not hold."""


class Metric(NamedTuple):
    """A metric over a batch: its sum, and over how much. float32: Apple GPUs have nothing wider."""

    total: Float[Tensor, ""]
    n: Float[Tensor, ""]


@dataclass(frozen=True)
class Hookpoint:
    """Where a feature term looks: the module, the SAE that reads it, and what its features weigh."""

    name: str
    sae: Sae
    weights: Float[Tensor, " F"] | None
    """None: all weigh 1."""

    def to(self, device: torch.device) -> Hookpoint:
        """The same on `device`."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, sae=self.sae.to(device), weights=weights)


@dataclass(frozen=True)
class ObjectiveMeter:
    """An objective with what it needs to be evaluated: its settings, and the SAEs of its feature term."""

    objective: Objective
    hookpoints: tuple[Hookpoint, ...]
    incomplete: bool
    """Whether the feature set can hold features whose reference activation a top-k cache lacks."""

    @staticmethod
    def of(recipe: Recipe) -> ObjectiveMeter:
        """The recipe's objective; loads the SAEs if there is a feature term. Raises RecipeError, and as `load_sae`."""
        term, entries = recipe.objective.needs.features, recipe.constrained_features()
        if term is None:
            return ObjectiveMeter(recipe.objective, (), incomplete=False)
        hookpoints = []
        for entry in entries:
            sae = load_sae(entry.sae, entry.hookpoint)
            try:
                weights = term.feature_weights(sae.facts.d_sae)
            except ValueError as error:
                raise RecipeError(f"objective: {error} (features.include, exclude and weights)") from None
            hookpoints.append(Hookpoint(entry.hookpoint, sae, weights))
        incomplete = not all(term.exact_from(entry.top_k) for entry in entries)
        return ObjectiveMeter(recipe.objective, tuple(hookpoints), incomplete)

    def to(self, device: torch.device) -> ObjectiveMeter:
        """The same on `device`."""
        return replace(self, hookpoints=tuple(hookpoint.to(device) for hookpoint in self.hookpoints))

    def measure(self, scores: Scores, batch: dict[str, Any], world: int = 1) -> Measurement:
        """
        scores  what the policy says about the batch
        batch   from `batch_tensors`, on the policy's device
        world   processes that share a step, all of which measure now
        """
        packed = Packed.of(batch)
        units, counts = batch["units"], packed.counts
        # A completion of which nothing counts has the mean of nothing, 0.
        sizes = counts.clamp(min=1)[units]
        logps = sum_logps(scores.token_logps, packed)
        policy = Logps(logps[units], logps[units] / sizes)
        reference = Logps(batch["ref_logps"][units], batch["ref_logps"][units] / sizes)
        evidence = Evidence(
            policy,
            reference,
            counts[units].to(logps.dtype),
            self._distances(scores, packed, batch),
            batch["score"][units],
            typicality=_typicality(scores, packed, units) if self.objective.needs.typicality else None,
            tokens=_tokens(scores, packed, batch),
            divergences=_divergences(scores, packed, batch),
            draws=batch.get("draws"),
            present=batch.get("present"),
            desirable=batch.get("desirable"),
            mismatched=_mismatched(logps, batch, world),
        )
        value = self.objective.total(evidence)
        # What the data says that a unit counts; 1 where it says nothing.
        return Measurement(value._replace(losses=value.losses * batch["unit_weight"]), evidence, self.incomplete)

    def _distances(self, scores: Scores, packed: Packed, batch: dict[str, Any]) -> Float[Tensor, "U n"] | None:
        """Those of all hookpoints together; None where there is no feature term."""
        term = self.objective.needs.features
        if term is None:
            return None
        grid = TokenGrid(batch["feature_places"], batch["feature_shares"], packed.counts)
        found = []
        for number, (hookpoint, residual) in enumerate(zip(self.hookpoints, scores.residuals, strict=True)):
            counted = packed.counting(residual)
            known = _feature_set(hookpoint.sae, term, counted, packed.counts, batch, number)
            found.append(feature_distances(hookpoint, term, counted, grid, known))
        return sum(found[1:], found[0])[batch["units"]]


def _typicality(scores: Scores, packed: Packed, units: Tensor) -> Float[Tensor, "U n"]:
    apart = scores.token_logps.detach() - scores.log_sum_squares
    return sum_logps(apart, packed)[units] / packed.counts.clamp(min=1)[units]


def _tokens(scores: Scores, packed: Packed, batch: dict[str, Any]) -> Tokens | None:
    if "token_rows" not in batch:
        return None
    policy, side = packed.counting(scores.token_logps)[batch["token_rows"]], batch["token_side"]
    return Tokens(policy, batch["ref_token_logps"], side, batch["token_place"], batch.get("token_draws"))


def _divergences(scores: Scores, packed: Packed, batch: dict[str, Any]) -> Float[Tensor, "U n"] | None:
    if scores.asked_logps is None:
        return None
    return sum_logps(token_kl(batch["ref_top_logps"], scores.asked_logps), packed)[batch["units"]]


def _mismatched(logps: Float[Tensor, " C"], batch: dict[str, Any], world: int) -> Float[Tensor, ""] | None:
    """The mean logratio of the mismatched completions of all processes, without gradient."""
    if "mismatched" not in batch:
        return None
    logratios = (logps.detach() - batch["ref_logps"])[batch["mismatched"]]
    # A group that is there twice, so that all processes have as many, counts once.
    counts = batch["counted_groups"].to(logratios.dtype)
    sums = torch.stack([(logratios * counts).sum(), counts.sum()])
    every: Tensor = sums if world == 1 else reduce(sums, reduction="sum")
    return every[0] / every[1]


def feature_distances(
    hookpoint: Hookpoint, term: FeatureTerm, residual: Float[Tensor, "N D"], grid: TokenGrid, known: KnownColumns
) -> Float[Tensor, " C"]:
    """
    D of every completion (Eq. 10 of https://arxiv.org/abs/2411.07618) over the feature set that an objective needs.

    residual  hookpoint output at the positions that predict tokens that count, which are those of the grid
    """
    weights = known.valid.float()
    if hookpoint.weights is not None:
        weights = weights * hookpoint.weights[known.columns]
    acts = hookpoint.sae.mean_columns(residual, grid, known.columns)
    return feature_distance(acts, known.acts, weights, k=term.k, distance=term.distance)


def _feature_set(
    sae: Sae,
    term: FeatureTerm,
    residual: Float[Tensor, "N D"],
    counts: Int[Tensor, " C"],
    batch: dict[str, Any],
    number: int,
) -> KnownColumns:
    """The features that a distance is over, at the hookpoint with this number among the objective's."""

    def given(*names: str) -> Iterator[Tensor]:
        return (batch[f"ref_{name}_{number}"] for name in names)

    if term.feature_set == "reference":
        return KnownColumns(*given("columns", "column_valid", "column_acts"))
    own = policy_top(sae, residual.detach(), counts, term.k)
    if term.feature_set == "union":
        own = union(own, ColumnSet(*given("columns", "column_valid")))
    reference = SparseRows(*given("indices", "acts", "counts"))
    return KnownColumns(*own, look_up(reference, own.columns, sae.facts.d_sae))


def counted_groups(batch: dict[str, Any]) -> Float[Tensor, " U"]:
    """What each unit counts in a mean over groups; a repeat, whose `weight` is 0, counts nothing."""
    counted: Tensor = batch["share"] * (batch["weight"] > 0)
    return counted


def batch_metrics(measurement: Measurement, scores: Scores, batch: dict[str, Any]) -> dict[str, Metric]:
    """
    Every metric that is logged, under TRL's names where TRL has one: over groups the mean of their pairs, over a
    batch's completions, or over their tokens. Repeats, whose `weight` is 0, count in none. Whoever adds batches up
    does it in float64.
    """
    counts = counted_groups(batch)
    every = {"loss": (measurement.value.losses, counts), **_sides_of(measurement, counts)}
    if measurement.evidence.mismatched is not None:
        # What KTO takes as its reference point, by TRL's name.
        every["kl"] = (measurement.evidence.mismatched.clamp(min=0).expand_as(counts), counts)
    if measurement.incomplete:
        # Reference activations that a top-k cache does not hold count as 0; their squares sum to this.
        tails = [batch[name] for name in batch if name.startswith("ref_tail_sq_")]
        every["features/unknown_sq"] = (torch.stack(tails).sum(0)[batch["units"]].mean(1), counts)
    return {name: _metric(values, own) for name, (values, own) in every.items()} | _token_metrics(
        measurement.evidence, scores, batch, counts
    )


def _token_metrics(evidence: Evidence, scores: Scores, batch: dict[str, Any], counts: Tensor) -> dict[str, Metric]:
    """Means over the tokens that count, each as often as its completion counts in the other metrics."""
    packed = Packed.of(batch)
    lengths = _by_side(evidence.lengths, evidence, counts)

    def means(values: Float[Tensor, " N"]) -> dict[str, Metric]:
        sums = _by_side(sum_logps(values, packed)[batch["units"]], evidence, counts)
        return {
            side: Metric((summed * own).sum(), (lengths[side][0] * own).sum()) for side, (summed, own) in sums.items()
        }

    logits, entropy = means(scores.mean_logits), means(scores.entropy)
    return {
        "logits/chosen": logits["chosen"],
        "logits/rejected": logits["rejected"],
        "entropy": Metric(*(torch.stack(of_sides).sum() for of_sides in zip(*entropy.values(), strict=True))),
        "mean_token_accuracy": means(scores.is_top)["chosen"],
    }


def _metric(values: Tensor, counts: Tensor) -> Metric:
    return Metric((values.detach().float() * counts).sum(), counts.sum())


def _sides_of(measurement: Measurement, counts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What is said of chosen and rejected completions, and what each value counts."""
    evidence, rewards = measurement.evidence, measurement.value.rewards
    said = {"rewards": rewards, "logps": evidence.policy.logps}
    if evidence.distances is not None:
        said["features/distance"] = evidence.distances
    if evidence.divergences is not None:
        said["kl"] = evidence.divergences
    found = {
        _side_name(name, side): value_and_count
        for name, values in said.items()
        for side, value_and_count in _by_side(values, evidence, counts).items()
    }
    if evidence.desirable is not None:
        return found
    better = (rewards[:, :1] > rewards[:, 1:]).float()
    margins = found["rewards/chosen"][0] - found["rewards/rejected"][0]
    accuracies = (better * _shares(evidence)).sum(1)
    return found | {"rewards/margins": (margins, counts), "rewards/accuracies": (accuracies, counts)}


def _by_side(values: Float[Tensor, "U n"], evidence: Evidence, counts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a unit's chosen completion and of its rejected ones, their mean: the values, and what each counts."""
    if evidence.desirable is not None:
        labelled = {"chosen": counts * evidence.desirable, "rejected": counts * ~evidence.desirable}
        return {side: (values[:, 0], own) for side, own in labelled.items()}
    return {"chosen": (values[:, 0], counts), "rejected": ((values[:, 1:] * _shares(evidence)).sum(1), counts)}


def _shares(evidence: Evidence) -> Float[Tensor, "U others"]:
    """What part of its unit's rejected side each completion but the first is."""
    logps = evidence.policy.logps[:, 1:]
    others = torch.ones_like(logps) if evidence.present is None else evidence.present[:, 1:].to(logps.dtype)
    return others / others.sum(1, keepdim=True)


def _side_name(name: str, side: str) -> str:
    return f"{name}{'_' if name.startswith('features/') else '/'}{side}"
