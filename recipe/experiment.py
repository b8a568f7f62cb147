"""The recipe as a whole, and which of its settings fit together."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from fpo.nearest import nearest
from fpo.objectives import DEFAULT_OBJECTIVE, AnyObjective, FeatureNeed
from fpo.recipe.arithmetic import MIXED_PRECISION, Arithmetic, training_arithmetic
from fpo.recipe.sections import CacheOptions, Data, Feature, Generate, Policy, Reference
from fpo.section import Section


class Recipe(Section):
    """An experiment, both stages."""

    reference: Reference
    """The frozen model."""

    features: Annotated[tuple[Feature, ...], Field(strict=False)] = ()
    """Hookpoints to record; part of the key, so keep them for an objective that needs none: one cache serves all."""

    data: Data
    """The pairs."""

    cache: CacheOptions = CacheOptions()
    """Extras and shard plan."""

    policy: Policy = Policy()
    """The model that is trained."""

    objective: AnyObjective = DEFAULT_OBJECTIVE
    """The loss."""

    training: dict[str, Any] = {}
    """`TrainingArguments`, `EarlyStoppingCallback` by name. Batch sizes count pairs; `learning_rate`: 1e-6 if unset."""

    generate: Generate | None = None
    """Samples while the policy trains; null is none. A resumed run may change it."""

    @model_validator(mode="after")
    def _combine(self) -> Recipe:
        hookpoints = [feature.hookpoint for feature in self.features]
        for hookpoint in hookpoints:
            if hookpoints.count(hookpoint) > 1:
                raise ValueError(f"features: hookpoint {hookpoint} is listed twice")
        if (need := self.objective.needs.features) is not None:
            _check_features(need, self.features, self.objective.name)
        if self.reference.autocast is not None and self.reference.dtype != "float32":
            raise ValueError(
                f"reference.autocast: {self.reference.autocast} rounds the products of float32 weights; set "
                f"reference.dtype: float32, or leave autocast out to compute in {self.reference.dtype}"
            )
        if self.policy.dtype != "float32" and self.policy.lora is None:
            raise ValueError(
                f"policy.dtype: {self.policy.dtype} weights swallow an update below 1/256 of their size, so they would "
                "hardly move; set policy.dtype: float32 and training.bf16: true (or train adapters: policy.lora)"
            )
        if self.training:  # a recipe without it does not say yet how it trains; `fpo align` asks again
            check_arithmetic(self, self.policy_arithmetic())
        return self

    def policy_arithmetic(self) -> Arithmetic:
        """What the policy is trained and evaluated in, as far as the recipe says it."""
        mixed = next((dtype for name, dtype in MIXED_PRECISION.items() if self.training.get(name)), None)
        sharded = bool(self.training.get("fsdp") or self.training.get("deepspeed"))
        return training_arithmetic(self.policy.dtype, mixed, sharded)

    def constrained_feature(self) -> int | None:
        """Index into `features` of the one that the objective constrains; None where it constrains none."""
        need = self.objective.needs.features
        if need is None:
            return None
        return [feature.hookpoint for feature in self.features].index(need.hookpoint) if need.hookpoint else 0


def check_arithmetic(recipe: Recipe, training: Arithmetic) -> None:
    """
    ValueError where the policy starts from the reference's weights and would be held against scores that were
    computed otherwise: the difference of two roundings, nats per completion, would stand in every logratio.
    """
    reference, policy = recipe.reference.arithmetic, recipe.policy
    if policy.model is not None or not policy.same_arithmetic or not recipe.objective.needs.reference:
        return
    if reference != training:
        wanted = f"reference.dtype: {training.dtype}"
        wanted += f" and reference.autocast: {training.autocast}" if training.autocast else ""
        raise ValueError(
            f"reference.{'dtype' if reference.dtype != training.dtype else 'autocast'}: the reference is computed in "
            f"{reference}, the policy in {training}, and the difference would stand in every logratio; set {wanted}, "
            "or policy.same_arithmetic: false to go on regardless"
        )


def _check_features(need: FeatureNeed, features: tuple[Feature, ...], objective: str) -> None:
    """ValueError where `features` do not give what the objective needs."""
    hookpoints = [feature.hookpoint for feature in features]
    if not hookpoints:
        raise ValueError(f"objective.name: {objective} needs an entry in features (or objective.{need.waived_by})")
    if need.hookpoint is None and len(hookpoints) > 1:
        raise ValueError(f"objective.hookpoint: say which of {', '.join(hookpoints)} is constrained")
    if need.hookpoint is not None and need.hookpoint not in hookpoints:
        near = nearest(need.hookpoint, hookpoints) or ", ".join(hookpoints)
        raise ValueError(f"objective.hookpoint: {need.hookpoint} is not among features; nearest is {near}")
    top_k = features[hookpoints.index(need.hookpoint or hookpoints[0])].top_k
    if top_k != "all" and top_k < need.k:
        raise ValueError(f"objective.k: {need.k} features are asked for, the cache keeps top_k: {top_k}")
