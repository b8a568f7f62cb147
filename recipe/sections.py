"""
The sections of a recipe, one class each. The docstring under a field is its documentation.

The objective is a section too: its fields stand in objectives/, one file each.
"""

from __future__ import annotations

import os
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from fpo.recipe.arithmetic import Arithmetic, Dtype, HalfDtype
from fpo.section import Section

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
"""The columns that pairs are made of."""


def _iso_date(value: Any) -> Any:
    """YAML reads a bare 2026-11-24 as a date; the recipe keeps it as text."""
    return value.isoformat() if type(value) is date else value


def _check_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"data.today: {value!r} is no date; write it as 2026-11-24") from None


def _check_columns(columns: dict[str, str | None]) -> dict[str, str | None]:
    for ours, theirs in columns.items():
        if theirs is not None and ours not in COLUMNS:
            near = f"{{{theirs}: {ours}}}" if theirs in COLUMNS else f"one of {', '.join(COLUMNS)}"
            raise ValueError(f"data.columns: {ours} is no column of ours; our name comes first, write {near}")
    given = [theirs for theirs in columns.values() if theirs is not None]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise ValueError(f"data.columns: {twice} is given for two columns")
    return columns


Columns = Annotated[dict[str, str | None], AfterValidator(_check_columns)]
IsoDate = Annotated[str, BeforeValidator(_iso_date), AfterValidator(_check_date)]
# ~ is the home folder in every path, expanded here and nowhere else.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path of the user's, or what may stand in its place: a hub id, a URL, a text."""


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

    scored_by: str | None = None
    """
    Another engine that computed the log-probs, with its version: `vllm 0.11.2`. They come by `fpo store import`, and
    stand in caches of their own; null is fpo itself.
    """

    @property
    def arithmetic(self) -> Arithmetic:
        """What stage 1 computes in."""
        return Arithmetic(self.dtype, self.autocast)


class Feature(Section):
    """One hookpoint, and the SAE that reads it."""

    sae: Place
    """Folder or weights file of any format in docs/saes.md, hub id with the path inside, or `sae_lens:RELEASE/ID`."""

    hookpoint: str = ""
    """
    What the SAE reads: a module's output (`model.layers.12`) or its input (`model.layers.12.mlp:input`), or the place's
    name in TransformerLens or sparsify. Left out, it is the place that the SAE's own files name.
    """

    top_k: PositiveInt | Literal["all"] = 64
    """How many pooled features are kept per completion; `all` keeps every non-zero one."""

    self_check: bool = True
    """Hold L0 and variance unexplained against what the SAE advertises before anything is spent."""


class Filter(Section):
    """Groups that training leaves out by what the cache says of them. The cache holds them all: its key is the same."""

    drop: Annotated[float, Field(gt=0, lt=1)]
    """Share of the groups that is left out: those with the largest score, whose sides look most alike."""

    by: Literal["ches", "length_normalised_ches"] = "length_normalised_ches"
    """
    Centred hidden embedding similarity of chosen and rejected, https://arxiv.org/abs/2410.08847: what tells before
    training which pairs will lose likelihood on both sides. It needs `cache.hidden_gram`.
    """


class Transform(Section):
    """What becomes of the groups before they are scored, in the order of these fields: other groups, another cache."""

    pair: Literal["best_worst", "best_random"] | None = None
    """Keep two completions of each group: the best, and the worst or by `seed` one of the others."""

    seed: NonNegativeInt = 0
    """Of `best_random`; what is drawn depends on it and on the row's number alone."""

    min_margin: NonNegativeFloat | None = None
    """Drop groups whose largest and smallest score are nearer than this, or equal."""

    dedup: bool = False
    """Drop a group whose prompt and completions are those of an earlier one."""

    reward_goals: Literal["system", "user"] | None = None
    """
    Reward-augmented data, https://arxiv.org/abs/2410.08067: each pair twice, with either score as the goal and what has
    it preferred. The goal is a system message, or stands before what the user says, as it always does in text.
    """

    goal: str = (
        "You are an assistant that generates responses for the instruction while implicitly achieving the following "
        "target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: {score}."
    )
    """How a goal is said; the paper's words. `{score}` is the score."""

    @field_validator("goal")
    @classmethod
    def _check_goal(cls, goal: str) -> str:
        if goal.count("{score}") != 1:
            raise ValueError("data.transform.goal: {score} must stand in it, once")
        return goal


class Source(Section):
    """One of several sources of groups."""

    source: Place
    """As `data.source`, but a list."""

    subset: str | None = None
    """Configuration name of a hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    columns: Columns = {}
    """As `data.columns`."""

    split: str | None = None
    """Null takes `data.split`."""

    eval_split: str | None = None
    """Null takes `data.eval_split`; where that is null too, nothing of this source is held out by its split."""

    weight: PositiveFloat = 1.0
    """What the weight of each of its groups is multiplied by."""

    origin: str | None = None
    """What reports call it (`--by origin`); null is the last part of its name."""

    @property
    def name(self) -> str:
        """Its origin."""
        return self.origin or self.source.rstrip("/").rpartition("/")[2]


def _as_sources(value: Any) -> Any:
    """In a list a bare name stands for a source with nothing else said of it."""
    return [{"source": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


# Tags that no field's name can be: an error is told by the field alone.
Sources = Annotated[
    Annotated[Place, Tag("[one]")] | Annotated[tuple[Source, ...], Field(strict=False), Tag("[several]")],
    Discriminator(lambda value: "[several]" if isinstance(value, list | tuple) else "[one]"),
    BeforeValidator(_as_sources),
]


class Data(Section):
    """The groups of completions, and how they become tokens (TRL's rules)."""

    source: Sources
    """
    File (.jsonl, .json, .parquet, .csv, .arrow), folder with one file per split, or hub id: see docs/data.md. A list
    of these, or of sections `data.source[]`, is read one after another.
    """

    subset: str | None = None
    """Configuration name of a hub dataset; null is its default."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; null is the default branch."""

    columns: Columns = {}
    """Our column names to the dataset's: `{prompt: question}`; `{system: null}` leaves a column out."""

    split: str = "train"
    """Split to train on; slices such as `train[:90%]` are understood."""

    eval_split: str | None = None
    """Split held out for evaluation, in training and by `fpo evaluate`; it gets a cache of its own. Null is none."""

    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    """
    Share of the prompts of `split` that is held out, in the place of an `eval_split`: all rows of a prompt are on one
    side, which depends on the prompt alone.
    """

    tokenizer: Place | None = None
    """Hub id or folder of the tokenizer; null takes the reference's."""

    chat_template: Place | None = None
    """Chat template, a Jinja file or its text, that replaces the tokenizer's; null keeps it."""

    today: IsoDate | None = None
    """Date (`2026-11-24`) that a chat template gets which asks for it, such as Llama 3.2's; those refuse null."""

    max_length: PositiveInt | None = 1024
    """Prompt and completion are cut to this many tokens, keeping the start; null never cuts."""

    filter: Filter | None = None
    """Leave the worst groups out of training; null trains on all. Evaluation keeps all of its own."""

    on_bad_row: Literal["error", "drop"] = "error"
    """A row with a value that its column cannot hold: refused, or left out and counted. Broken files are refused."""

    transform: Transform | None = None
    """Pairs from lists, no ties, no duplicates, reward-augmented pairs; null leaves groups as the data has them."""

    as_messages: bool = False
    """
    Read text as a conversation: the prompt as a user's message, each completion as the assistant's, transcripts of
    hh-rlhf turn by turn. Of several sources those of text.
    """

    score: Literal["completion", "assistant"] = "completion"
    """What counts: a whole completion but what tools said, or in completions of several turns the assistant's alone."""

    turns: Annotated[list[PositiveInt | None], Field(min_length=2, max_length=2)] | None = None
    """First and last turn of the assistant that count, from 1 at a completion's beginning: `[2, 3]`, `[2, null]`."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All of them, of each its own split."""
        if isinstance(self.source, str):
            return (
                Source(
                    source=self.source,
                    subset=self.subset,
                    revision=self.revision,
                    columns=self.columns,
                    split=self.split,
                    eval_split=self.eval_split,
                ),
            )
        splits = {"split": self.split, "eval_split": self.eval_split}
        return tuple(
            one.model_copy(update={name: split for name, split in splits.items() if getattr(one, name) is None})
            for one in self.source
        )

    @property
    def held_out_split(self) -> str | None:
        """What the held-out groups are called; None where there are none."""
        if self.held_out is not None:
            return f"{self.split}, {self.held_out:.3g} of its prompts"
        splits = list(dict.fromkeys(one.eval_split for one in self.sources if one.eval_split))
        return ", ".join(splits) or None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.held_out is not None and any(one.eval_split for one in self.sources):
            raise ValueError("data.held_out: there is an eval_split already; leave one of them out")
        if isinstance(self.source, str):
            return self
        if not self.source:
            raise ValueError("data.source: the list is empty; name a source")
        for name, said in (("subset", self.subset), ("revision", self.revision), ("columns", self.columns or None)):
            if said is not None:
                raise ValueError(f"data.{name}: it is one source's; write it into its entry of data.source")
        names = [one.name for one in self.source]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"data.source: {twice} is the name of two; give them an origin each")
        return self

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


class CacheOptions(Section):
    """What the cache holds besides log-probs and features, and how it is cut."""

    top_logits: NonNegativeInt = 0
    """Also keep the reference's most likely tokens at each completion position: how many of them."""

    prompt_features: bool = False
    """Also keep every hookpoint's features of the prompts, pooled over a prompt's own tokens."""

    hidden_gram: bool = False
    """Also keep the inner products of the completions' summed last hidden states, which displacement is told from."""

    mismatched: bool = False
    """Also score each prompt with a completion of another prompt, which KTO takes its reference point from."""

    shard_pairs: Annotated[int, Field(gt=0, le=2**16)] = 2048
    """A shard closes at this many groups (or 2^20 tokens, or 64 MiB): what a killed run can lose."""

    seed: NonNegativeInt = 0
    """Seed of the permutation that assigns pairs to shards."""

    store: Place | None = None
    """Folder or URL of the caches, not in the key; `--store` goes before it, null is `$FPO_STORE` or `~/.cache/fpo`."""


class Lora(Section):
    """Train low-rank adapters (PEFT) instead of all weights."""

    r: PositiveInt = 16
    """Rank."""

    alpha: PositiveFloat = 32
    """Scale; the update is multiplied by alpha / r, with `rslora` by alpha / sqrt(r)."""

    rslora: bool = False
    """Rank-stabilised LoRA, https://arxiv.org/abs/2312.03732: the rank does not shrink the update."""

    dora: bool = False
    """Also train a magnitude per row of an adapted weight, https://arxiv.org/abs/2402.09353; a step costs more."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """
    Chance that an adapter's input is dropped, in training alone. Its noise stands in the logratios of a step, so how a
    step is cut into forwards and processes then moves its numbers; resumed still equals uninterrupted.
    """

    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, as PEFT understands them."""

    modules_to_save: list[str] = []
    """Names of modules that are trained whole and saved beside the adapter: `[lm_head]`; none with shared weights."""


class Prompt(Section):
    """Train a soft prompt before every sequence (PEFT) and no weights; the policy does not start as the reference."""

    virtual_tokens: PositiveInt = 20
    """How many tokens it has; a row of packed pairs holds them once."""

    kind: Literal["embeddings", "prefix"] = "embeddings"
    """
    `embeddings` before the first layer (prompt tuning, https://arxiv.org/abs/2104.08691), or a `prefix` of keys and
    values in every layer's attention (prefix tuning, https://arxiv.org/abs/2101.00190).
    """

    text: str | None = None
    """What it says before training, repeated or cut to fit; null draws tokens from the vocabulary."""


class Policy(Section):
    """The model that is trained."""

    model: Place | None = None
    """Hub id or folder; null starts from the reference's weights."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    dtype: Dtype = "float32"
    """What the weights are kept in; float32 where they are trained. For mixed precision set `training.bf16`."""

    lora: Lora | None = None
    """Adapter settings; without `lora` and `prompt` all weights are trained."""

    prompt: Prompt | None = None
    """Soft prompt or prefix, in the place of `lora`."""

    same_arithmetic: bool = True
    """Refuse a reference that was computed in another arithmetic than the policy; false goes on regardless."""

    @property
    def frozen(self) -> bool:
        """Whether the weights that training starts from stay as they are, and something beside them is trained."""
        return self.lora is not None or self.prompt is not None

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.lora is not None and self.prompt is not None:
            raise ValueError("policy.prompt: a soft prompt is trained alone; leave policy.lora out, or the prompt")
        return self


class Generate(Section):
    """Samples in training, for people to read: the policy continues held-out prompts; in the run's `samples/`."""

    every: PositiveInt
    """Steps between two samples."""

    prompts: PositiveInt = 4
    """The first so many prompts of the held-out cache; one after another, on one process."""

    max_new_tokens: PositiveInt = 128
    """A completion ends after this many tokens, if not by itself."""

    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token; above it tokens are drawn, by `training.seed`."""
