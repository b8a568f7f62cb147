"""
Columns: what a cache holds beside its base, each with a key, shards and a seal of its own. Which numbers a column
holds is its *spec*, a JSON object that stands in its recipe.json:

    {"kind": "features", "hookpoint", "sae": {"weights", "config"}, "d_sae", "top_k", "pooling"}    of each completion
    {"kind": "prompt_features", ...the same}                                                        of each prompt
    {"kind": "top_logits", "m", "vocab_size"}                                                       of each scored token
    {"kind": "hidden_gram"}                                                                         of each group
    {"kind": "mismatched", "vocab_size"}                                                            of each group

Dimension key:  G groups   K completions   N entries   m top logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fpo.store.format.ragged import F32, U8, U32, Ragged, starts_of

Per = Literal["group", "completion"]
Spec = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Column(Ragged):
    """One row per group or per completion."""

    PER: ClassVar[Per]


@dataclass(frozen=True, eq=False)
class Features(Column):
    """Pooled SAE activations of K completions at one hookpoint: the largest `top_k` of each, or every non-zero one."""

    PER: ClassVar[Per] = "completion"
    ENTRIES = ("indices", "acts")
    ROWS = ("active", "tail_sq")

    indices: U32
    """(N,) ascending inside a row."""

    acts: F32
    """(N,) mean activation over the tokens that count."""

    active: U32
    """(R,) pooled features that were non-zero before the top-k cut."""

    tail_sq: F32
    """(R,) sum of squares of the pooled activations that were not kept."""


@dataclass(frozen=True, eq=False)
class PromptFeatures(Features):
    """The same of G prompts, over the positions that predict a prompt's own tokens."""

    PER = "group"


@dataclass(frozen=True, eq=False)
class TopLogits(Column):
    """The reference's m most likely tokens at each scored completion position; a row is a completion."""

    PER = "completion"
    ENTRIES = ("indices", "logps")

    indices: U32
    """(C, m) token ids, the likeliest first."""

    logps: F32
    """(C, m) their log-probs, nats."""


@dataclass(frozen=True, eq=False)
class HiddenGram(Column):
    """Inner products of the completions' summed last hidden states; a row is a group of n completions."""

    PER = "group"
    ENTRIES = ("products",)

    products: F32
    """(n * n entries per row) row-major; over the tokens that count, at the positions that predict them."""


@dataclass(frozen=True, eq=False)
class Mismatched(Column):
    """Of each group, another group's completion behind its own prompt, which it does not answer; a row is a group."""

    PER: ClassVar[Per] = "group"
    ENTRIES = ("input_ids", "score_mask")
    ROWS = ("ref_logps",)

    input_ids: U32
    """(N,) the completion's tokens."""

    score_mask: U8
    """(N,) which of them count: 0 also for the first one behind an empty prompt, which is not scored."""

    ref_logps: F32
    """(G,) sum of the log-probs of those that count, behind the group's prompt; accumulated in float64, nats."""


KINDS: dict[str, type[Column]] = {
    "features": Features,
    "prompt_features": PromptFeatures,
    "top_logits": TopLogits,
    "hidden_gram": HiddenGram,
    "mismatched": Mismatched,
}


def covers(held: Spec, wanted: Spec) -> bool:
    """Whether a column of spec `held` holds all that one of spec `wanted` does: equal, but for more of the largest."""
    if {**held, "top_k": 0, "m": 0} != {**wanted, "top_k": 0, "m": 0}:
        return False
    return _rank(held, "top_k") >= _rank(wanted, "top_k") and held.get("m", 0) >= wanted.get("m", 0)


def cut(column: Column, held: Spec, wanted: Spec) -> Column:
    """A column of spec `held` as one of spec `wanted`, which it `covers`."""
    if isinstance(column, Features) and held["top_k"] != wanted["top_k"]:
        return _keep_largest(column, wanted["top_k"], wanted["d_sae"])
    if isinstance(column, TopLogits) and held["m"] != wanted["m"]:
        return TopLogits(column.splits, column.indices[:, : wanted["m"]], column.logps[:, : wanted["m"]])
    return column


def column_name(spec: Spec) -> str:
    """features at model.layers.12, top 64: for people."""
    match spec.get("kind"):
        case "features" | "prompt_features" as kind:
            return f"{str(kind).replace('_', ' ')} at {spec.get('hookpoint')}, top {spec.get('top_k')}"
        case "top_logits":
            return f"top {spec.get('m')} logits"
        case "mismatched":
            return "mismatched completions"
        case kind:
            return str(kind).replace("_", " ")


def _rank(spec: Spec, field: str) -> float:
    return float("inf") if spec.get(field) == "all" else float(spec.get(field, 0))


def _keep_largest(column: Features, k: int, d_sae: int) -> Features:
    """
    What is not zero among the k largest of all d_sae activations of a row (ties: the lower index), as the scorer pools;
    `tail_sq` grows by what goes.
    """
    rows = np.repeat(np.arange(len(column)), column.lengths)
    order = np.lexsort((column.indices, -column.acts, rows))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts_of(column.lengths)[:-1], column.lengths)
    # The features that are zero stand before those below zero.
    place += np.where(column.acts < 0, d_sae - column.active.astype(np.int64)[rows], 0)
    kept = place < k
    gone = np.bincount(rows[~kept], column.acts[~kept].astype(np.float64) ** 2, minlength=len(column))
    return type(column)(
        splits=starts_of(np.bincount(rows[kept], minlength=len(column))).astype(np.uint64),
        indices=column.indices[kept],
        acts=column.acts[kept],
        active=column.active,
        tail_sq=(column.tail_sq.astype(np.float64) + gone).astype(np.float32),
    )
