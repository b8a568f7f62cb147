"""Losses and their settings that users of TRL know by name, and what they are told when a recipe has one."""

from __future__ import annotations

# Settings of TRL's losses that stand under `training` by mistake.
SETTINGS = {
    "beta": "it is objective.beta",
    "desirable_weight": "it is objective.desirable_weight of kto",
    "undesirable_weight": "it is objective.undesirable_weight of kto",
    "alpha": "it is objective.alpha",
    "gamma": "it is objective.gamma",
    "simpo_gamma": "it is objective.gamma",
    "loss_type": "it is objective.name",
    "label_smoothing": "it is objective.label_smoothing",
    "f_divergence_type": "it is objective.f_divergence_type",
    "f_alpha_divergence_coef": "it is objective.f_alpha_divergence_coef",
    "discopop_tau": "it is objective.tau of discopop",
    "use_weighting": "objective.name: wpo weighs dpo with it",
    "rpo_alpha": "objective.name: mixture, of dpo and sft, with weights",
    "sft_weight": "it is objective.sft_weight",
    "ld_alpha": "it is objective.ld_alpha of ld_dpo",
    "cpo_alpha": "it is objective.sft_weight",
    "loss_weights": "it is objective.weights of mixture",
    "reference_free": "objective.name: simpo uses no reference",
}

# Losses that TRL has (as loss_type, or as a trainer) by a name that is none here, and what to take.
LOSSES = {
    "sigmoid": "it is called dpo here",
    "sigmoid_norm": "it is fpo with alpha: 0",
    "aot_pair": "it is called aot here",
    "rpo": "it is a mixture of dpo and sft",
    "mpo": "it is a mixture of dpo, bco_pair and sft",
    "tdpo": "there are tdpo1 and tdpo2",
    "sdpo": "it is dpo with data.score: assistant and data.turns",
    **dict.fromkeys(("bco", "grpo", "ppo", "tr_dpo"), "it is not there yet"),
}
