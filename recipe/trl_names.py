"""What users of TRL know by name, and what they are told when a recipe has it."""

from __future__ import annotations

from fpo.objectives.trl_names import SETTINGS

_CUT = "data.max_length cuts prompt and completion together, keeping the start"
_REFERENCE = "the reference is reference.model; it runs once, in fpo cache"

# Arguments of TRL's configs and scripts that stand under `training` by mistake.
ARGUMENTS = {
    **SETTINGS,
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
    "lora_dropout": "it is policy.lora.dropout",
    "lora_target_modules": "it is policy.lora.target_modules",
    "lora_modules_to_save": "it is policy.lora.modules_to_save",
    "use_rslora": "it is policy.lora.rslora",
    "use_dora": "it is policy.lora.dora",
    "load_in_4bit": "name a model whose files are quantised, as reference.model, and set policy.lora",
    "load_in_8bit": "name a model whose files are quantised, as reference.model, and set policy.lora",
    "dataset_name": "it is data.source",
    "dataset_train_split": "it is data.split",
    "dataset_test_split": "it is data.eval_split",
    "dataset_num_proc": "the pairs are tokenised once, by fpo cache",
    "use_liger_loss": "the log-probs of the completions are chunked already",
    "use_logits_to_keep": "only completions reach the head",
    "generate_during_eval": "samples in training are generate: {every: N}",
    "evaluation_strategy": "it is eval_strategy",
    "warmup_ratio": "it is warmup_steps: below 1 it is a share of the run",
    "group_by_length": "the order of the cache buckets by length already",
    "no_cuda": "it is use_cpu",
}
