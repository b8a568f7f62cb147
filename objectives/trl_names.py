"""Losses and their settings that users of TRL know by name, and what they are told when a recipe has one."""

from __future__ import annotations

_NOT_THERE = "no objective has it"

# Settings of TRL's losses that stand under `training` by mistake.
SETTINGS = {
    "beta": "it is objective.beta",
    "alpha": "it is objective.alpha",
    "gamma": "it is objective.gamma",
    "simpo_gamma": "it is objective.gamma",
    "loss_type": "it is objective.name",
    "label_smoothing": "it is objective.label_smoothing",
    "f_divergence_type": "it is objective.f_divergence_type",
    "f_alpha_divergence_coef": "it is objective.f_alpha_divergence_coef",
    "discopop_tau": "it is objective.tau of discopop",
    "use_weighting": "objective.name: wpo weighs dpo with it",
    "rpo_alpha": _NOT_THERE,
    "sft_weight": "it is objective.sft_weight",
    "ld_alpha": _NOT_THERE,
    "cpo_alpha": "it is objective.sft_weight",
    "loss_weights": _NOT_THERE,
    "reference_free": "objective.name: simpo uses no reference",
}

# Losses that TRL has (as loss_type, or as a trainer) by a name that is none here, and what to take.
LOSSES = {
    "sigmoid": "it is called dpo here",
    "sigmoid_norm": "it is fpo with alpha: 0",
    "aot_pair": "it is called aot here",
    **dict.fromkeys(
        ("bco", "grpo", "kto", "ppo", "rpo", "tdpo", "tr_dpo"),
        "it is not there yet",
    ),
}
