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
    "label_smoothing": _NOT_THERE,
    "use_weighting": _NOT_THERE,
    "rpo_alpha": _NOT_THERE,
    "sft_weight": _NOT_THERE,
    "ld_alpha": _NOT_THERE,
    "cpo_alpha": _NOT_THERE,
    "discopop_tau": _NOT_THERE,
    "loss_weights": _NOT_THERE,
    "f_divergence_type": _NOT_THERE,
    "f_alpha_divergence_coef": _NOT_THERE,
    "reference_free": "objective.name: simpo uses no reference",
}

# Losses that TRL has (as loss_type, or as a trainer), and what to take here.
LOSSES = {
    "sigmoid": "it is called dpo here",
    "sigmoid_norm": "it is fpo with alpha: 0",
    **dict.fromkeys(
        (
            "aot", "aot_pair", "aot_unpaired", "apo_down", "apo_zero", "bco", "bco_pair", "cpo", "discopop",
            "exo_pair", "grpo", "hinge", "ipo", "kto", "nca_pair", "orpo", "ppo", "robust", "rpo", "sft",
            "sppo_hard", "tdpo", "tr_dpo",
        ),
        "it is not there yet",
    ),
}  # fmt: skip
