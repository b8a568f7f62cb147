"""
From one forward pass over a batch to the loss of each pair: the policy's scores, the cached reference's, and the
feature distance between them.

Dimension key:  P pairs   C completions (2P, chosen before rejected)   N tokens that count   K columns
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fpo.objectives import Evidence, FeatureNeed, Objective, ObjectiveValue, PairLogps, feature_distance
from fpo.recipe import Recipe
from fpo.scoring import (
    ColumnSet,
    Packed,
    Sae,
    Scores,
    SparseRows,
    load_sae,
    look_up,
    policy_top,
    reference_top,
    sum_logps,
    union,
)


class Measurement(NamedTuple):
    """A batch of pairs under an objective."""

    value: ObjectiveValue
    evidence: Evidence
    incomplete: bool
    """Whether the distance asks for reference activations that the cache may not hold."""


@dataclass(frozen=True)
class ObjectiveMeter:
    """An objective with what it needs to be evaluated: its settings, and the SAE of its feature term."""

    objective: Objective
    sae: Sae | None
    hookpoint: str | None
    incomplete: bool
    """Whether the feature set can hold features whose reference activation a top-k cache lacks."""

    @staticmethod
    def of(recipe: Recipe) -> ObjectiveMeter:
        """The recipe's objective; loads the SAE if there is a feature term."""
        feature = recipe.constrained_feature()
        if feature is None:
            return ObjectiveMeter(recipe.objective, None, None, incomplete=False)
        entry, need = recipe.features[feature], recipe.objective.needs.features
        assert need is not None
        return ObjectiveMeter(
            recipe.objective,
            load_sae(entry.sae, entry.hookpoint),
            entry.hookpoint,
            incomplete=not need.exact_from(entry.top_k),
        )

    def to(self, device: torch.device) -> ObjectiveMeter:
        """The same on `device`."""
        return replace(self, sae=None if self.sae is None else self.sae.to(device))

    def measure(self, scores: Scores, batch: dict[str, Tensor]) -> Measurement:
        """
        scores  what the policy says about the batch
        batch   from `batch_tensors`, on the policy's device
        """
        packed = Packed(*(batch[name] for name in Packed._fields))
        pairs = batch["pairs"]
        counts = packed.counts[pairs]
        logps = sum_logps(scores.token_logps, packed)[pairs]
        policy = PairLogps(logps, logps / counts)
        reference = PairLogps(batch["ref_logps"][pairs], batch["ref_logps"][pairs] / counts)
        distances, need = None, self.objective.needs.features
        if self.sae is not None:
            assert need is not None
            residual = packed.counting(scores.residuals[0])
            distances = feature_distances(self.sae, need, residual, packed, batch)[pairs]
        typicality = None
        if scores.log_sum_squares is not None:
            apart = scores.token_logps.detach() - scores.log_sum_squares
            typicality = sum_logps(apart, packed)[pairs] / counts
        lengths = counts.to(logps.dtype)
        evidence = Evidence(policy, reference, lengths, distances, batch["score"][pairs], typicality)
        value = self.objective.value(evidence)
        # What the data says that a pair counts; 1 where it says nothing.
        return Measurement(value._replace(losses=value.losses * batch["pair_weight"]), evidence, self.incomplete)


def feature_distances(
    sae: Sae, need: FeatureNeed, residual: Float[Tensor, "N D"], packed: Packed, batch: dict[str, Tensor]
) -> Float[Tensor, " C"]:
    """
    D of every completion of a pair (Eq. 10 of https://arxiv.org/abs/2411.07618) over the feature set that an objective
    needs; 0 of one that is in none.

    Completions that no pair rejects carry no gradient: the chosen side enters the objective detached.
    """
    reference = SparseRows(batch["ref_indices"], batch["ref_acts"], batch["ref_counts"])
    columns = _feature_set(sae, need, residual, packed, reference)
    stored = look_up(reference, columns.columns, sae.facts.d_sae)
    distances = stored.new_zeros(len(stored))
    for side in ("chosen", "rejected"):
        own, tokens = batch[f"{side}_only"], batch[f"{side}_tokens"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and side == "rejected"):
            acts = sae.pooled_columns(residual[tokens], packed.counts[own].tolist(), columns.columns[own])
            distances = distances.index_copy(0, own, feature_distance(acts, stored[own], columns.valid[own], k=need.k))
    return distances


def _feature_set(
    sae: Sae, need: FeatureNeed, residual: Float[Tensor, "N D"], packed: Packed, reference: SparseRows
) -> ColumnSet:
    if need.feature_set == "reference":
        return reference_top(reference, need.k)
    own = policy_top(sae, residual.detach(), packed.counts, need.k)
    return own if need.feature_set == "policy" else union(own, reference_top(reference, need.k))


def counted_groups(batch: dict[str, Tensor]) -> Float[Tensor, " P"]:
    """What each pair counts in a mean over groups; a repeat, whose `weight` is 0, counts nothing."""
    return batch["share"] * (batch["weight"] > 0)


def batch_metrics(measurement: Measurement, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Sums over the batch's groups of every metric that is logged, each the mean over a group's pairs, under TRL's names
    where TRL has one. Repeats, whose `weight` is 0, count in none. float32: Apple GPUs have nothing wider, whoever adds
    batches up does it in float64.
    """
    rewards = measurement.value.rewards
    policy, distances = measurement.evidence.policy, measurement.evidence.distances
    metrics = {
        "loss": measurement.value.losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float(),
        "logps/chosen": policy.logps[:, 0],
        "logps/rejected": policy.logps[:, 1],
    }
    if distances is not None:
        metrics["features/distance_chosen"] = distances[:, 0]
        metrics["features/distance_rejected"] = distances[:, 1]
    if measurement.incomplete:
        # Reference activations that a top-k cache does not hold count as 0; their squares sum to this.
        metrics["features/unknown_sq"] = batch["ref_tail_sq"][batch["pairs"]].mean(1)
    counts = counted_groups(batch)
    return {name: (values.detach().float() * counts).sum() for name, values in metrics.items()}
