"""
The recipe: one YAML file that describes an experiment, both stages.

`reference`, `features`, `data` and `cache` decide what is computed in stage 1 and therefore the cache
key; `policy`, `objective` and `training` never do. This module is the one place that says what a field
is: the docstring under a field is its documentation (`docs/recipe.md` is printed from it), and every
field is checked here before anything heavy loads.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from datetime import date
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from fpo.errors import RecipeError
from fpo.recipe import trl_names

Dtype = Literal["float32", "bfloat16", "float16"]
HalfDtype = Literal["bfloat16", "float16"]
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "margin",
    "completions",
    "scores",
    "ranks",
    "labels",
    "completion",
    "label",
    "weight",
    "tools",
    "chat_template_kwargs",
)
"""The columns that groups are made of."""


def _iso_date(value: Any) -> Any:
    """YAML reads a bare 2026-11-24 as a date; the recipe keeps it as text."""
    return value.isoformat() if type(value) is date else value


def _check_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"data.today: {value!r} is no date; write it as 2026-11-24") from None


IsoDate = Annotated[str, BeforeValidator(_iso_date), AfterValidator(_check_date)]
# ~ is the home folder in every path, expanded here and nowhere else.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path of the user's, or what may stand in its place: a hub id, a URL, a text."""


class Arithmetic(NamedTuple):
    """What a forward computes in. Two forwards of the same weights differ where these differ."""

    dtype: Dtype
    """Of the weights, and with them of the residual stream."""
    autocast: HalfDtype | None
    """What products are rounded to on the way (`torch.autocast`); None rounds nothing."""

    @property
    def precision(self) -> Dtype:
        """The coarser of the two: what tolerances go by."""
        return self.autocast or self.dtype

    def __str__(self) -> str:
        return self.dtype if self.autocast is None else f"{self.dtype} under {self.autocast} autocast"


class Section(BaseModel):
    """A part of the recipe: frozen, unknown fields refused, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Reference(Section):
    """The frozen model that stage 1 scores the pairs with."""

    model: Place
    """Hub id, or folder with `config.json` and safetensors weights."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; null is the hub's default branch."""

    dtype: Dtype = "float32"
    """What the weights are loaded as and computed in. Log-probs are float32 whatever this is."""

    autocast: HalfDtype | None = None
    """Score under `torch.autocast` of this dtype, as `training.bf16` and `fp16` train; with `dtype: float32` alone."""

    adapter: Place | None = None
    """PEFT adapter (hub id or folder) merged into the reference before scoring; null is none."""

    @property
    def arithmetic(self) -> Arithmetic:
        """What stage 1 computes in."""
        return Arithmetic(self.dtype, self.autocast)


class Feature(Section):
    """One hookpoint, and the SAE that reads it."""

    sae: Place
    """SAELens or sparsify folder, Gemma Scope `params.npz` or its folder, or hub id with the path inside."""

    hookpoint: str
    """Module whose output the SAE reads, as a module path of the model: `model.layers.12`."""

    top_k: PositiveInt | Literal["all"] = 64
    """How many pooled features are kept per completion; `all` keeps every non-zero one."""

    self_check: bool = True
    """Hold L0 and variance unexplained against what the SAE advertises before anything is spent."""


class Data(Section):
    """The groups of completions, and how they become tokens (TRL's rules)."""

    source: Place
    """File (.jsonl, .json, .parquet, .csv; .gz too), folder with one file per split, or hub id: see docs/data.md."""

    subset: str | None = None
    """Configuration name of a hub dataset; null is its default."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; null is the default branch."""

    columns: dict[str, str | None] = {}
    """Our column names to the dataset's: `{prompt: question}`; `{system: null}` leaves a column out."""

    split: str = "train"
    """Split to train on; slices such as `train[:90%]` are understood."""

    eval_split: str | None = None
    """Split held out for `fpo evaluate`; it gets a cache of its own. Null evaluates nothing."""

    tokenizer: Place | None = None
    """Hub id or folder of the tokenizer; null takes the reference's."""

    chat_template: Place | None = None
    """Chat template, a Jinja file or its text, that replaces the tokenizer's; null keeps it."""

    today: IsoDate | None = None
    """Date (`2026-11-24`) that a chat template gets which asks for it, such as Llama 3.2's; those refuse null."""

    max_length: PositiveInt | None = 1024
    """Prompt and completion are cut to this many tokens, keeping the start; null never cuts."""

    as_messages: bool = False
    """Read text as a conversation: the prompt as a user's message, each completion as the assistant's."""

    score: Literal["completion", "assistant"] = "completion"
    """What counts: a whole completion but what tools said, or in completions of several turns the assistant's alone."""

    turns: Annotated[list[PositiveInt | None], Field(min_length=2, max_length=2)] | None = None
    """First and last turn of the assistant that count, from 1 at a completion's beginning: `[2, 3]`, `[2, null]`."""

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        if self.turns is None:
            return self
        first, last = self.turns
        if self.score != "assistant":
            raise ValueError("data.turns: turns are the assistant's; set data.score: assistant with it")
        if first is None or (last is not None and last < first):
            raise ValueError(f"data.turns: {self.turns}: the first turn, then the last or null for all that follow")
        return self

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str | None]) -> dict[str, str | None]:
        for ours, theirs in columns.items():
            if theirs is not None and ours not in COLUMNS:
                near = f"{{{theirs}: {ours}}}" if theirs in COLUMNS else f"one of {', '.join(COLUMNS)}"
                raise ValueError(f"data.columns: {ours} is no column of ours; our name comes first, write {near}")
        given = [theirs for theirs in columns.values() if theirs is not None]
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise ValueError(f"data.columns: {twice} is given for two columns")
        return columns


class CacheOptions(Section):
    """What the cache holds besides log-probs and features, and how it is cut."""

    top_logits: NonNegativeInt = 0
    """Also keep the reference's most likely tokens at each completion position: how many of them."""

    shard_pairs: Annotated[int, Field(gt=0, le=2**16)] = 2048
    """A shard closes at this many pairs (or 2^20 tokens, or 64 MiB): what a killed run can lose."""

    seed: NonNegativeInt = 0
    """Seed of the permutation that assigns pairs to shards."""

    store: Place | None = None
    """Folder or URL of the caches, not in the key; `--store` goes before it, null is `$FPO_STORE` or `~/.cache/fpo`."""


class Lora(Section):
    """Train low-rank adapters (PEFT) instead of all weights."""

    r: PositiveInt = 16
    """Rank."""

    alpha: PositiveFloat = 32
    """Scale; the update is multiplied by alpha / r."""

    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, as PEFT understands them."""


class Policy(Section):
    """The model that is trained."""

    model: Place | None = None
    """Hub id or folder; null starts from the reference's weights."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    dtype: Dtype = "float32"
    """What the weights are kept in; another than float32 only under `lora`. For mixed precision set `training.bf16`."""

    lora: Lora | None = None
    """Adapter settings; null trains all weights."""

    same_arithmetic: bool = True
    """Refuse a reference that was computed in another arithmetic than the policy; false goes on regardless."""


class Objective(Section):
    """What all objectives share; see docs/objectives.md for the formulas."""

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True


class Dpo(Objective):
    """Direct preference optimisation, Eq. 7 of https://arxiv.org/abs/2305.18290."""

    name: Literal["dpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the difference of the summed logratios."""


class Simpo(Objective):
    """Simple preference optimisation, Eq. 6 of https://arxiv.org/abs/2405.14734; uses no reference."""

    needs_reference: ClassVar[bool] = False

    name: Literal["simpo"]
    """The objective."""

    beta: PositiveFloat = 2.0
    """Scale of the difference of the mean log-probs."""

    gamma: NonNegativeFloat = 0.5
    """Target reward margin, in nats of the scaled difference (the authors' code calls gamma / beta a ratio)."""


class Fpo(Objective):
    """Feature-level constrained preference optimisation, Eq. 7-11 of https://arxiv.org/abs/2411.07618."""

    needs_features: ClassVar[bool] = True

    name: Literal["fpo"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Scale of the whole margin: pull towards the reference, as in DPO."""

    alpha: NonNegativeFloat = 0.5
    """Weight of the feature term; 0 never loads the SAE."""

    k: PositiveInt = 50
    """How many features a completion's distance is over; the sum is divided by k."""

    feature_set: Literal["reference", "union", "policy"] = "reference"
    """Whose top k: the reference's (exact from any cache), both models' as in the paper, or the policy's."""

    hookpoint: str | None = None
    """Which of `features` is constrained; null is the only one there is."""


AnyObjective = Annotated[Dpo | Simpo | Fpo, Field(discriminator="name")]
OBJECTIVES: dict[str, type[Objective]] = {"dpo": Dpo, "simpo": Simpo, "fpo": Fpo}

_STREAM = "the stream prepares the batches, in threads of its own"

# Trainer arguments that the pipeline sets itself or has no use for, and what to use instead.
OWNED_ARGUMENTS = {
    "output_dir": "give the run folder with --output",
    "resume_from_checkpoint": "use --resume",
    "do_train": "fpo align trains",
    "do_eval": "use fpo evaluate",
    "do_predict": "use fpo evaluate",
    "eval_strategy": trl_names.NOT_EVALUATED,
    "eval_on_start": trl_names.NOT_EVALUATED,
    "eval_steps": trl_names.NOT_EVALUATED,
    "eval_delay": trl_names.NOT_EVALUATED,
    "eval_accumulation_steps": trl_names.NOT_EVALUATED,
    "eval_do_concat_batches": trl_names.NOT_EVALUATED,
    "eval_use_gather_object": trl_names.NOT_EVALUATED,
    "prediction_loss_only": trl_names.NOT_EVALUATED,
    "include_for_metrics": trl_names.NOT_EVALUATED,
    "batch_eval_metrics": trl_names.NOT_EVALUATED,
    "bf16_full_eval": trl_names.NOT_EVALUATED,
    "fp16_full_eval": trl_names.NOT_EVALUATED,
    "load_best_model_at_end": trl_names.NOT_EVALUATED,
    "metric_for_best_model": trl_names.NOT_EVALUATED,
    "greater_is_better": trl_names.NOT_EVALUATED,
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
# Trainer arguments that train in mixed precision, and its dtype.
MIXED_PRECISION: dict[str, HalfDtype] = {"bf16": "bfloat16", "fp16": "float16"}
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
}
ABOVE_ZERO = ("num_train_epochs", "logging_steps", "save_steps", "adam_epsilon")


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

    objective: AnyObjective = Fpo(name="fpo")
    """The loss."""

    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` by their own names. Batch sizes count pairs; `learning_rate`: 1e-6 if unset."""

    @model_validator(mode="after")
    def _combine(self) -> Recipe:
        hookpoints = [feature.hookpoint for feature in self.features]
        for hookpoint in hookpoints:
            if hookpoints.count(hookpoint) > 1:
                raise ValueError(f"features: hookpoint {hookpoint} is listed twice")
        if isinstance(self.objective, Fpo) and self.objective.alpha > 0:
            _check_fpo(self.objective, self.features)
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
        if not isinstance(self.objective, Fpo) or self.objective.alpha == 0:
            return None
        hookpoints = [feature.hookpoint for feature in self.features]
        return hookpoints.index(self.objective.hookpoint) if self.objective.hookpoint else 0


def training_arithmetic(dtype: Dtype, mixed: HalfDtype | None, sharded: bool) -> Arithmetic:
    """
    What a forward in training computes in.

    dtype    of the policy's weights
    mixed    the mixed precision that Trainer runs with; None is none
    sharded  whether FSDP or DeepSpeed holds the weights: both compute with copies in the mixed precision's dtype
    """
    if mixed is not None and (sharded or mixed == dtype):
        return Arithmetic(mixed, None)
    return Arithmetic(dtype, mixed)


def check_arithmetic(recipe: Recipe, training: Arithmetic) -> None:
    """
    ValueError where the policy starts from the reference's weights and would be held against scores that were
    computed otherwise: the difference of two roundings, nats per completion, would stand in every logratio.
    """
    reference, policy = recipe.reference.arithmetic, recipe.policy
    if policy.model is not None or not policy.same_arithmetic or not recipe.objective.needs_reference:
        return
    if reference != training:
        wanted = f"reference.dtype: {training.dtype}"
        wanted += f" and reference.autocast: {training.autocast}" if training.autocast else ""
        raise ValueError(
            f"reference.{'dtype' if reference.dtype != training.dtype else 'autocast'}: the reference is computed in "
            f"{reference}, the policy in {training}, and the difference would stand in every logratio; set {wanted}, "
            "or policy.same_arithmetic: false to go on regardless"
        )


def _check_fpo(objective: Fpo, features: tuple[Feature, ...]) -> None:
    hookpoints = [feature.hookpoint for feature in features]
    if not hookpoints:
        raise ValueError("objective.name: fpo needs an entry in features (or objective.alpha: 0)")
    if objective.hookpoint is None and len(hookpoints) > 1:
        raise ValueError(f"objective.hookpoint: say which of {', '.join(hookpoints)} is constrained")
    if objective.hookpoint is not None and objective.hookpoint not in hookpoints:
        near = nearest(objective.hookpoint, hookpoints)
        raise ValueError(f"objective.hookpoint: {objective.hookpoint} is not among features; nearest is {near}")
    chosen = features[hookpoints.index(objective.hookpoint or hookpoints[0])]
    if chosen.top_k != "all" and chosen.top_k < objective.k:
        raise ValueError(f"objective.k: {objective.k} features are asked for, the cache keeps top_k: {chosen.top_k}")


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """
    Read, override and validate a recipe.

    path       the YAML file
    overrides  `section.field=value` strings, the value in YAML
    Raises RecipeError naming the field, the value and the nearest valid name.
    """
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = nearest(path.name, [p.name for p in folder.glob("*.y*ml")])
        hint = f"; nearest is {folder / near}" if near else ""
        raise RecipeError(f"{path}: no such recipe{hint}")
    raw = parse_yaml(_text(path), str(path))
    if raw is None:
        raise RecipeError(f"{path}: the recipe is empty; it needs reference and data at least (docs/recipe.md)")
    if not isinstance(raw, dict):
        kind = "a list" if isinstance(raw, list) else "plain text" if isinstance(raw, str) else f"the value {raw!r}"
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {kind}")
    if raw.get("training", {}) is None:
        raw["training"] = {}  # `training:` with nothing under it
    _check_publishing(raw, str(path))
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_recipe(raw, str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}: line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None


def validate_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """A Recipe from plain data; `origin` stands at the start of error messages."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "\n  ".join(_explanations(error, raw))) from None
    _check_training(recipe.training, origin)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field, defaults included, but for what a file may not hold."""
    raw = recipe.model_dump(mode="json")
    raw["training"] = {name: value for name, value in raw["training"].items() if name not in PUBLISHING_ARGUMENTS}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


_PAGE = (
    "Paths are relative to the folder in which a command is given, not to the recipe. `--set` overrides a field for",
    "one command, with its value in YAML: `--set objective.alpha=1`, `--set features.0.top_k=all`. An objective of",
    "another name has other fields, so it is set as a whole: `--set 'objective={name: dpo, beta: 0.1}'`.",
)


def reference_page() -> str:
    """docs/recipe.md: every section and field with type, default and documentation, from the definitions above."""
    lines = ["# The recipe", "", "<!-- written by `make docs` from recipe.py -->", "", Recipe.__doc__ or "", "", *_PAGE]
    sections: list[tuple[str, type[Section]]] = [
        ("", Recipe),
        ("reference", Reference),
        ("features[]", Feature),
        ("data", Data),
        ("cache", CacheOptions),
        ("policy", Policy),
        ("policy.lora", Lora),
        *((f"objective ({name})", kind) for name, kind in OBJECTIVES.items()),
    ]
    for name, section in sections:
        if name:
            lines += ["", f"## {name}", "", section.__doc__ or ""]
        lines += ["", "| field | type | default | meaning |", "|---|---|---|---|"]
        for field, info in section.model_fields.items():
            shape = "section" if name == "" and field != "training" else _type_name(info.annotation)
            default = "required" if info.is_required() else "" if name == "" else f"`{json.dumps(info.default)}`"
            lines.append(f"| `{field}` | {shape} | {default} | {info.description} |")
    lines += ["", "## training", "", "Not set here, since the pipeline sets them or has no use for them:", ""]
    lines += ["| argument | instead |", "|---|---|"]
    lines += [f"| `{name}` | {instead} |" for name, instead in OWNED_ARGUMENTS.items()]
    only = ", ".join(f"`{name}`" for name in PUBLISHING_ARGUMENTS)
    lines += ["", f"From the command line alone (`--set`), since a recipe may be a stranger's: {only}."]
    return "\n".join(lines) + "\n"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(annotation))
    if annotation is type(None):
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, "list" if get_origin(annotation) is list else "mapping")


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name closest to `name`, or None where none is at all close."""
    found = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return found[0] if found else None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `5e-7` is a number and a repeated key is an error; there are no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            # Ten lines of them, each naming the line above ten times, are ten billion values.
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"`*{event.anchor}` is an alias, which recipes do not have; write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", own[number].start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # 2026-99-99, !!int five
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"`{node.value}` is no {kind}; for text, write it in quotes", node.start_mark
            ) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML; RecipeError with line and column where it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{origin}: {where}{error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{origin}: line {line}: the character {chr(error.character)!r} is not allowed") from None
    except RecursionError:
        raise RecipeError(f"{origin}: it is nested too deeply for a recipe") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write it as section.field=value")
    target: Any = raw
    *parents, last = path.split(".")
    for name in parents:
        if isinstance(target, list):
            target = target[_position(name, target, override)]
        else:
            if target.get(name) is None:
                target[name] = {}
            target = target[name]
        if not isinstance(target, dict | list):
            raise RecipeError(f"--set {override}: {name} has no fields")
    parsed = parse_yaml(value, f"--set {override}")
    if isinstance(target, list):
        target[_position(last, target, override)] = parsed
    else:
        target[last] = parsed


def _position(name: str, items: list[Any], override: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise RecipeError(f"--set {override}: {name} is not one of the {len(items)} entries, counted from 0")
    return int(name)


_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def _explanations(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """One line per field that is wrong."""
    lines: dict[str, str] = {}
    for item in error.errors():
        # The alternatives of a union stand in the location as parts of their own, and each has its own complaint:
        # for text it is the one about names that helps, for the rest the one about types.
        *outer, last = item["loc"] or ("",)
        unknown = item["type"] == "extra_forbidden"  # the last part is what the user wrote, whatever it looks like
        parts = [p for p in (outer if unknown else [*outer, last]) if isinstance(p, int) or _NAME.fullmatch(p)]
        location = [part for part in parts if part not in OBJECTIVES] + ([last] if unknown else [])
        field = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in location))
        if field not in lines or (item["type"] == "literal_error" and isinstance(item["input"], str)):
            lines[field] = _explain(item, field, location, raw)
    return list(lines.values())


def _explain(error: Any, field: str, location: list[Any], raw: dict[str, Any]) -> str:
    """Field, value and nearest valid name of one pydantic error."""
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        valid = _fields_at(location[:-1], raw)
        if location[0] == "objective" and (owner := _objective_with(str(location[-1]))):
            name = raw["objective"].get("name")
            return (
                f"{field}: {name} has no such field, {owner} has; another objective is given whole: "
                f"--set 'objective={{name: {name}}}'"
            )
        near = nearest(str(location[-1]), valid)
        return f"{field}: no such field; " + (f"nearest is {near}" if near else f"valid are {', '.join(valid)}")
    if kind == "missing":
        return f"{field}: this field is required"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        if str(name) in trl_names.OBJECTIVES:
            return f"objective.name: {name}: {trl_names.OBJECTIVES[str(name)]}; valid are {', '.join(OBJECTIVES)}"
        near = nearest(str(name), list(OBJECTIVES)) or ", ".join(OBJECTIVES)
        return f"objective.name: {name!r} is no objective; nearest is {near}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
        near = nearest(str(value), valid) or ", ".join(valid)
        return f"{field}: {value!r} is not valid; nearest is {near}"
    message = error["msg"].replace("Input should be", "must be").replace("Input", "it")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be a mapping of fields"
    elif kind in ("tuple_type", "list_type"):
        message = "must be a list"
    return f"{field}: {message}, not {value!r}"


def _objective_with(field: str) -> str | None:
    """An objective that has this field."""
    return next((name for name, model in OBJECTIVES.items() if field in model.model_fields), None)


def _fields_at(location: list[Any], raw: dict[str, Any]) -> list[str]:
    """Names of the fields that the section at `location` has."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        if part == "objective":
            name = raw.get("objective", {}).get("name")
            model = OBJECTIVES.get(name, Objective)
        else:
            model = _section_type(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[Section]:
    """The Section inside an annotation such as `tuple[Feature, ...]` or `Lora | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(_section_type(arg) for arg in get_args(annotation) if arg not in (type(None), ...))


def _check_publishing(raw: dict[str, Any], origin: str) -> None:
    """RecipeError where a recipe's file, before any override, sends the run away."""
    training = raw.get("training")
    for name in PUBLISHING_ARGUMENTS:
        if isinstance(training, dict) and name in training:
            raise RecipeError(
                f"{origin}: training.{name}: not from a file; if you want it, give it on the command line: "
                f"--set training.{name}={training[name]}"
            )


def _check_training(training: dict[str, Any], origin: str) -> None:
    if not training:
        return
    fields = _training_fields()
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
        if name in ABOVE_ZERO and value <= 0:
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
    }
    if name not in choices:
        return
    valid = [str(choice.value) for choice in choices[name]]
    if value not in valid:
        near = nearest(str(value), valid)
        raise RecipeError(f"{where}: {value!r} is not valid; " + (f"nearest is {near}" if near else ", ".join(valid)))
    if value in ("best", "reduce_lr_on_plateau", "greedy"):
        raise RecipeError(f"{where}: {value} goes by evaluations; {trl_names.NOT_EVALUATED}")


@functools.cache
def _training_fields() -> dict[str, TypeAdapter[Any]]:
    """Name and type of every argument of transformers.TrainingArguments."""
    import dataclasses
    import typing

    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {
        field.name: TypeAdapter(_lenient(hints[field.name]))
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }


def _lenient(hint: Any) -> Any:
    """The hint without conversion of types, and with what pydantic cannot check replaced by Any."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        hint = Union[hint, str]  # noqa: UP007 - as `|` it would not be an annotation at run time
    try:
        TypeAdapter(hint)
    except Exception:
        return Any
    return hint
