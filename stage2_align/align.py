"""`fpo align`: a recipe and its cache to a trained policy in a run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from errors import ModelError, RecipeError
from recipe import Lora, Recipe
from scoring import check_packing, disable_dropout, install_scoring, load_model, model_folder
from stage2_align.measure import ObjectiveMeter
from stage2_align.parity import check_parity
from stage2_align.run import METRICS_FILE, last_checkpoint, open_run, read_run, write_run
from stage2_align.stream import PairStream
from stage2_align.trainer import PairTrainer, read_metrics
from store import Cache

# Where TrainingArguments' own default would surprise; as in TRL's DPOConfig.
DEFAULTS: dict[str, Any] = {"learning_rate": 1e-6, "logging_steps": 10, "report_to": "none"}


@dataclass(frozen=True)
class AlignReport:
    """What `fpo align` says when it is done."""

    run: Path
    steps: int
    pairs: int
    seconds: float
    parity: float | None
    """Mean |difference| of token log-probs to the cache before the first step; None where it was not checked."""
    last: dict[str, float]
    """The last logged metrics."""


def align(recipe: Recipe, cache: Cache, output: Path, resume: bool = False) -> AlignReport:
    """
    Train the recipe's policy from a complete cache.

    output  the run folder; `resume` continues the run that stands there
    Raises RunError, ParityError, ModelError, CacheDamaged.
    """
    args = training_arguments(recipe, output)
    with args.main_process_first(local=False, desc="run folder"):
        if args.process_index == 0:
            checkpoint = open_run(output, recipe, cache, resume)
        else:
            checkpoint = last_checkpoint(output) if resume else None
    if resume and read_run(output)["complete"]:
        return _finished(output)
    set_seed(args.seed)
    meter = ObjectiveMeter.of(recipe)
    model = load_policy(recipe, meter)
    stream = PairStream(
        cache,
        meter.feature,
        seed=args.seed,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=args.process_index,
        world=args.world_size,
    )
    trainer = PairTrainer(model, args, stream, meter, load_tokenizer(recipe), output / METRICS_FILE)
    parity = None
    if recipe.policy.model is None and checkpoint is None:
        parity = check_parity(trainer.model, meter, cache, recipe)

    started, first_step = time.monotonic(), 0
    if checkpoint is not None:
        first_step = int(checkpoint.name.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    trainer.save_model(str(output))
    steps = trainer.state.global_step
    last: dict[str, float] = next((row for row in reversed(trainer.state.log_history) if "rewards/margins" in row), {})
    if trainer.is_world_process_zero():
        write_run(output, {**read_run(output), "complete": True, "steps": steps, "parity": parity})
    return AlignReport(output, steps, (steps - first_step) * stream.global_batch, seconds, parity, last)


def _finished(output: Path) -> AlignReport:
    """The report of a run that was complete already."""
    facts, metrics = read_run(output), read_metrics(output / METRICS_FILE)
    return AlignReport(output, facts["steps"], 0, 0.0, facts["parity"], metrics[-1] if metrics else {})


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """TrainingArguments of a recipe. Raises RecipeError for values that transformers refuses."""
    try:
        args = TrainingArguments(output_dir=str(output), **{**DEFAULTS, **recipe.training}, disable_tqdm=True)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
    # Several GPUs in one process would be DataParallel, which cannot split packed rows: use torchrun.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def load_policy(recipe: Recipe, meter: ObjectiveMeter) -> PreTrainedModel:
    """The policy before training: loaded, dropout off, scoring installed, adapters around it if asked for."""
    policy, reference = recipe.policy, recipe.reference
    name, revision = (policy.model, policy.revision) if policy.model else (reference.model, reference.revision)
    adapter = model_folder(reference.adapter) if reference.adapter and policy.model is None else None
    model = load_model(model_folder(name, revision), policy.dtype, adapter)
    disable_dropout(model, model.config)
    install_scoring(model, () if meter.hookpoint is None else (meter.hookpoint,))
    check_packing(model)
    return model if policy.lora is None else _with_adapter(model, policy.lora)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the pairs; it is saved beside the policy."""
    reference, data = recipe.reference, recipe.data
    tokenizer = AutoTokenizer.from_pretrained(
        data.tokenizer or reference.model, revision=None if data.tokenizer else reference.revision
    )
    if data.chat_template is not None:
        tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
    return tokenizer


def _with_adapter(model: PreTrainedModel, lora: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("policy.lora: adapters need peft: pip install 'fpo[lora]'") from None
    targets = lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets
    )
    return get_peft_model(model, config)
