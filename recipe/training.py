"""
`training`: the arguments of transformers.TrainingArguments, which of them are ours to set, and what they may be.
"""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any, Union

from pydantic import TypeAdapter, ValidationError

from fpo.errors import RecipeError
from fpo.nearest import nearest
from fpo.recipe import trl_names
from fpo.recipe.evaluation import EARLY_STOPPING

_STREAM = "the stream prepares the batches, in threads of its own"
_NO_PREDICTIONS = "an evaluation adds metrics up and keeps no predictions"

# Trainer arguments that the pipeline sets itself or has no use for, and what to use instead.
OWNED_ARGUMENTS = {
    "output_dir": "give the run folder with --output",
    "resume_from_checkpoint": "use --resume",
    "do_train": "fpo align trains",
    "do_eval": "training.eval_strategy evaluates in training, fpo evaluate afterwards",
    "do_predict": "use fpo evaluate",
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "prediction_loss_only": _NO_PREDICTIONS,
    "include_for_metrics": "the metrics are the objective's",
    "batch_eval_metrics": "the metrics are the objective's",
    "bf16_full_eval": "the policy is evaluated in the arithmetic that it trains in",
    "fp16_full_eval": "the policy is evaluated in the arithmetic that it trains in",
    "remove_unused_columns": "the cache has no unused columns",
    "ignore_data_skip": "a resumed run continues where it stopped",
    "restore_callback_states_from_checkpoint": "a resumed run continues where it stopped",
    "save_only_model": "a run saved so could not be resumed",
    "save_on_each_node": "the machines of a run share its folder",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM save a checkpoint already",
    "label_names": "pairs have no labels",
    "label_smoothing_factor": "no objective has it",
    "average_tokens_across_devices": "the loss is a mean over pairs",
    "max_length": "it belongs to data",
    "data_seed": "training.seed orders the pairs too",
    "train_sampling_strategy": "the order of the cache buckets by length already",
    "length_column_name": "the order of the cache buckets by length already",
    "dataloader_num_workers": _STREAM,
    "dataloader_prefetch_factor": _STREAM,
    "dataloader_persistent_workers": _STREAM,
    "dataloader_multiprocessing_context": _STREAM,
    "dataloader_pin_memory": _STREAM,
    "dataloader_in_order": _STREAM,
    "dataloader_drop_last": "every pair is used",
    "neftune_noise_alpha": "its noise would stand in every logratio, at the scale of a packed row's width",
    "accelerator_config": "the stream splits the batches over the processes",
    "parallelism_config": "the stream splits the batches over the processes",
    "local_rank": "torchrun and accelerate launch set it",
    "disable_tqdm": "the bar is a line per log where stderr is no terminal",
    "logging_nan_inf_filter": "the first loss that is not a number stops the run",
    "use_cache": "training keeps no keys and values",
    "use_liger_kernel": "the log-probs of the completions are chunked already",
    "liger_kernel_config": "the log-probs of the completions are chunked already",
    "auto_find_batch_size": "the order of an epoch depends on the batch size",
    "torch_compile": "packed batches change shape every step",
    "torch_compile_backend": "packed batches change shape every step",
    "torch_compile_mode": "packed batches change shape every step",
}
# A recipe may be a stranger's: what sends a run away is asked for on the command line, and never written down.
PUBLISHING_ARGUMENTS = (
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "save_total_limit": 1,
    "eval_delay": 0,
    "early_stopping_patience": 1,
    "early_stopping_threshold": 0,
}
ABOVE_ZERO = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon")


def check_publishing(raw: dict[str, Any], origin: str) -> None:
    """RecipeError where a recipe's file, before any override, sends the run away."""
    training = raw.get("training")
    for name in PUBLISHING_ARGUMENTS:
        if isinstance(training, dict) and name in training:
            raise RecipeError(
                f"{origin}: training.{name}: not from a file; if you want it, give it on the command line: "
                f"--set training.{name}={training[name]}"
            )


def check_training(training: dict[str, Any], origin: str) -> None:
    if not training:
        return
    fields = training_fields()
    for name, value in training.items():
        where = f"{origin}: training.{name}"
        if name in trl_names.ARGUMENTS:
            raise RecipeError(f"{where}: no argument of TrainingArguments; {trl_names.ARGUMENTS[name]}")
        if name in OWNED_ARGUMENTS:
            raise RecipeError(f"{where}: not set here; {OWNED_ARGUMENTS[name]}")
        if name not in fields:
            near = nearest(name, [field for field in fields if field not in OWNED_ARGUMENTS])
            hint = f"; nearest is {near}" if near else ""
            raise RecipeError(f"{where}: no such argument of TrainingArguments{hint}")
        if value is False and name.endswith("_strategy"):
            raise RecipeError(f'{where}: YAML reads a bare no as false; write "no"')
        try:
            fields[name].validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise RecipeError(f"{where}: {message}, not {value!r}") from None
        if name in AT_LEAST and value is not None and value < AT_LEAST[name]:
            raise RecipeError(f"{where}: must be at least {AT_LEAST[name]}, not {value!r}")
        if name in ABOVE_ZERO and value is not None and value <= 0:
            raise RecipeError(f"{where}: must be greater than 0, not {value!r}")
        if name == "max_steps" and value < 1 and value != -1:
            raise RecipeError(f"{where}: must be at least 1, not {value!r} (-1: num_train_epochs decides)")
        _check_choice(name, value, where)
    kwargs = training.get("gradient_checkpointing_kwargs") or training.get("activation_checkpointing_kwargs") or {}
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        raise RecipeError(
            f"{origin}: training.gradient_checkpointing_kwargs: use_reentrant loses the gradient of hookpoints inside "
            "a layer; leave it out"
        )


def _check_choice(name: str, value: Any, where: str) -> None:
    """RecipeError where an argument has a list of valid values, and this is none or needs what is not there."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    choices: dict[str, type[Enum]] = {
        "optim": OptimizerNames,
        "lr_scheduler_type": SchedulerType,
        "save_strategy": SaveStrategy,
        "logging_strategy": IntervalStrategy,
        "eval_strategy": IntervalStrategy,
    }
    if name not in choices:
        return
    valid = [str(choice.value) for choice in choices[name]]
    if value not in valid:
        near = nearest(str(value), valid)
        raise RecipeError(f"{where}: {value!r} is not valid; " + (f"nearest is {near}" if near else ", ".join(valid)))


@functools.cache
def training_fields() -> dict[str, TypeAdapter[Any]]:
    """Name and type of every argument of transformers.TrainingArguments, and of its EarlyStoppingCallback."""
    import dataclasses
    import typing

    from transformers import EarlyStoppingCallback, TrainingArguments

    hints = typing.get_type_hints(TrainingArguments) | typing.get_type_hints(EarlyStoppingCallback.__init__)
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    return {name: TypeAdapter(_lenient(hints[name])) for name in (*names, *EARLY_STOPPING)}


def _lenient(hint: Any) -> Any:
    """The hint without conversion of types, and with what pydantic cannot check replaced by Any."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        hint = Union[hint, str]  # noqa: UP007 - as `|` it would not be an annotation at run time
    try:
        TypeAdapter(hint)
    except Exception:
        return Any
    return hint
