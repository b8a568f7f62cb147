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
        counts = packed.counts.view(-1, 2)
        logps = sum_logps(scores.token_logps, packed).view(-1, 2)
        policy = PairLogps(logps, logps / counts)
        reference = PairLogps(batch["ref_logps"], batch["ref_logps"] / counts)
        distances, need = None, self.objective.needs.features
        if self.sae is not None:
            assert need is not None
            residual = packed.counting(scores.residuals[0])
            distances = feature_distances(self.sae, need, residual, packed, _cached(batch))
        typicality = None
        if scores.log_sum_squares is not None:
            apart = scores.token_logps.detach() - scores.log_sum_squares
            typicality = sum_logps(apart, packed).view(-1, 2) / counts
        lengths = counts.to(logps.dtype)
        evidence = Evidence(policy, reference, lengths, distances, batch["scores"], typicality)
        value = self.objective.value(evidence)
        # What the data says that a pair counts; 1 where it says nothing.
        return Measurement(value._replace(losses=value.losses * batch["group_weight"]), evidence, self.incomplete)


def feature_distances(
    sae: Sae, need: FeatureNeed, residual: Float[Tensor, "N D"], packed: Packed, reference: SparseRows
) -> Float[Tensor, "P 2"]:
    """
    D of chosen and rejected (Eq. 10 of https://arxiv.org/abs/2411.07618) over the feature set that an objective needs.

    Only the rejected completions carry a gradient: the chosen side enters the objective detached.
    """
    columns = _feature_set(sae, need, residual, packed, reference)
    stored = look_up(reference, columns.columns, sae.facts.d_sae)
    side_of_token = packed.counting(packed.completion) % 2
    sides = []
    for side in (0, 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and side == 1):
            acts = sae.pooled_columns(
                residual[side_of_token == side], packed.counts[side::2].tolist(), columns.columns[side::2]
            )
            sides.append(feature_distance(acts, stored[side::2], columns.valid[side::2], k=need.k))
    return torch.stack(sides, dim=1)


def _feature_set(
    sae: Sae, need: FeatureNeed, residual: Float[Tensor, "N D"], packed: Packed, reference: SparseRows
) -> ColumnSet:
    if need.feature_set == "reference":
        return reference_top(reference, need.k)
    own = policy_top(sae, residual.detach(), packed.counts, need.k)
    return own if need.feature_set == "policy" else union(own, reference_top(reference, need.k))


def _cached(batch: dict[str, Tensor]) -> SparseRows:
    return SparseRows(batch["ref_indices"], batch["ref_acts"], batch["ref_counts"])


def batch_metrics(measurement: Measurement, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Sums over the batch's pairs of every metric that is logged, under TRL's names where TRL has one. Repeats, whose
    `weight` is 0, count in none. float32: Apple GPUs have nothing wider, whoever adds batches up does it in float64.
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
        metrics["features/unknown_sq"] = batch["ref_tail_sq"].mean(1)
    counts = batch["weight"] > 0
    return {name: (values.detach().float() * counts).sum() for name, values in metrics.items()}
