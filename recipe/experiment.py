"""The recipe as a whole, and which of its settings fit together."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, model_validator

from fpo.nearest import nearest
from fpo.objectives import DEFAULT_OBJECTIVE, AnyObjective, FeatureTerm, Pairing
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
            if hookpoint and hookpoints.count(hookpoint) > 1:
                raise ValueError(f"features: hookpoint {hookpoint} is listed twice")
        _check_features(self.objective, self.features)
        if self.objective.needs.mismatched and not self.cache.mismatched:
            raise ValueError(
                f"cache.mismatched: {self.objective.name} takes its reference point from mismatched completions; "
                "set it to true (a column beside the cache: one pass, the rest stays)"
            )
        if self.objective.needs.divergence and not self.cache.top_logits:
            raise ValueError(
                f"cache.top_logits: {self.objective.name} takes a KL divergence from the reference's likeliest tokens; "
                "say how many are kept, such as 64 (a column beside the cache: one pass, the rest stays)"
            )
        if self.data.filter is not None and not self.cache.hidden_gram:
            raise ValueError(
                "cache.hidden_gram: data.filter tells pairs apart by their completions' hidden states; set it to true "
                "(a column beside the cache: one pass, the rest stays)"
            )
        if self.data.filter is not None and self.objective.units not in get_args(Pairing):
            raise ValueError(
                f"data.filter: it compares chosen with rejected, and {self.objective.name} takes no pairs; leave it out"
            )
        if self.reference.autocast is not None and self.reference.dtype != "float32":
            raise ValueError(
                f"reference.autocast: {self.reference.autocast} rounds the products of float32 weights; set "
                f"reference.dtype: float32, or leave autocast out to compute in {self.reference.dtype}"
            )
        if self.policy.dtype != "float32" and not self.policy.frozen:
            raise ValueError(
                f"policy.dtype: {self.policy.dtype} weights swallow an update below 1/256 of their size, so they would "
                "hardly move; set policy.dtype: float32 and training.bf16: true (or train adapters: policy.lora)"
            )
        prompt, checkpointing = self.policy.prompt, ("gradient_checkpointing", "activation_checkpointing")
        if prompt is not None and prompt.kind == "prefix" and any(map(self.training.get, checkpointing)):
            raise ValueError(
                "policy.prompt.kind: transformers drops a prefix where activations are computed again in backward; "
                "leave training.gradient_checkpointing out, or set kind: embeddings"
            )
        if self.training:  # a recipe without it does not say yet how it trains; `fpo align` asks again
            check_arithmetic(self, self.policy_arithmetic())
        return self

    def policy_arithmetic(self) -> Arithmetic:
        """What the policy is trained and evaluated in, as far as the recipe says it."""
        mixed = next((dtype for name, dtype in MIXED_PRECISION.items() if self.training.get(name)), None)
        sharded = bool(self.training.get("fsdp") or self.training.get("deepspeed"))
        return training_arithmetic(self.policy.dtype, mixed, sharded)

    def constrained_features(self) -> tuple[Feature, ...]:
        """Those of `features` that the objective constrains, in its order; none where it constrains none."""
        term = self.objective.needs.features
        if term is None:
            return ()
        entries = {feature.hookpoint: feature for feature in self.features}
        return tuple(entries[hookpoint] for hookpoint in term.hookpoints or entries)


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


def _check_features(objective: AnyObjective, features: tuple[Feature, ...]) -> None:
    """ValueError where `features` do not give what the objective needs."""
    term = objective.needs.features
    if term is None:
        return
    entries = {feature.hookpoint: feature for feature in features}
    where = "objective" if isinstance(objective, FeatureTerm) else "objective.features"
    if not entries:
        raise ValueError(f"objective.name: {objective.name} needs an entry in features (or {where}.alpha: 0)")
    if term.hookpoints is None and len(entries) > 1:
        raise ValueError(f"{where}.hookpoints: say which of {', '.join(entries)} are constrained")
    for hookpoint in term.hookpoints or entries:
        if hookpoint not in entries:
            near = nearest(hookpoint, list(entries)) or ", ".join(entries)
            raise ValueError(f"{where}.hookpoints: {hookpoint} is not among features; nearest is {near}")
        top_k = entries[hookpoint].top_k
        if top_k != "all" and top_k < term.k:
            raise ValueError(f"{where}.k: {term.k} features are asked for, the cache keeps top_k: {top_k}")
    if term.hookpoints is not None and len(set(term.hookpoints)) < len(term.hookpoints):
        raise ValueError(f"{where}.hookpoints: {', '.join(term.hookpoints)}: one of them is named twice")
