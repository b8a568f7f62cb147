"""What users of TRL know by name, and what they are told when a recipe has it."""

from __future__ import annotations

_CUT = "data.max_length cuts prompt and completion together, keeping the start"
_NOT_THERE = "no objective has it"
_REFERENCE = "the reference is reference.model; it runs once, in fpo cache"
NOT_EVALUATED = "nothing is evaluated in training; use fpo evaluate RUN --checkpoint N"

# Arguments of TRL's configs and scripts that stand under `training` by mistake.
ARGUMENTS = {
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
    "max_prompt_length": _CUT,
    "max_completion_length": _CUT,
    "max_seq_length": _CUT,
    "truncation_mode": _CUT,
    "padding_free": "batches are packed without padding",
    "pad_token": "batches are packed without padding",
    "padding_value": "batches are packed without padding",
    "label_pad_token_id": "batches are packed without padding",
    "precompute_ref_log_probs": "the cache holds them: fpo cache",
    "precompute_ref_batch_size": "the cache holds them: fpo cache --batch-tokens",
    "reference_free": "objective.name: simpo uses no reference",
    "ref_model": _REFERENCE,
    "ref_model_init_kwargs": _REFERENCE,
    "ref_adapter_name": "the reference's adapter is reference.adapter",
    "force_use_ref_model": _REFERENCE,
    "sync_ref_model": "the cached reference does not move",
    "ref_model_sync_steps": "the cached reference does not move",
    "ref_model_mixup_alpha": "the cached reference does not move",
    "model_init_kwargs": "use reference.revision, reference.dtype and policy.dtype",
    "model_name_or_path": "it is reference.model",
    "dtype": "it is reference.dtype and policy.dtype; training.bf16 is for mixed precision",
    "torch_dtype": "it is reference.dtype and policy.dtype; training.bf16 is for mixed precision",
    "disable_dropout": "dropout is off",
    "peft_config": "adapters are policy.lora",
    "use_peft": "adapters are policy.lora",
    "lora_r": "it is policy.lora.r",
    "lora_alpha": "it is policy.lora.alpha",
    "lora_target_modules": "it is policy.lora.target_modules",
    "dataset_name": "it is data.source",
    "dataset_train_split": "it is data.split",
    "dataset_test_split": "it is data.eval_split",
    "dataset_num_proc": "the pairs are tokenised once, by fpo cache",
    "use_liger_loss": "the log-probs of the completions are chunked already",
    "use_logits_to_keep": "only completions reach the head",
    "generate_during_eval": NOT_EVALUATED,
    "early_stopping_patience": NOT_EVALUATED,
    "early_stopping_threshold": NOT_EVALUATED,
    "evaluation_strategy": NOT_EVALUATED,
    "warmup_ratio": "it is warmup_steps: below 1 it is a share of the run",
    "group_by_length": "the order of the cache buckets by length already",
    "no_cuda": "it is use_cpu",
}

# Losses that TRL has (as loss_type, or as a trainer), and what to take here.
OBJECTIVES = {
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
