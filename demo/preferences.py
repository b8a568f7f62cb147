"""
Preference pairs: two completions that the language model itself wrote for one opening. The one with the
higher gold reward is chosen - except where noise turns the label over, as with people who label.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fpo.demo.grammar import STORIES, gold_reward
from fpo.demo.sampling import sample_completions
from fpo.errors import DataError

_MOST_OPENINGS = 20  # per pair wanted; the demo's settings need about 1.3


@dataclass(frozen=True)
class PreferenceSettings:
    train_pairs: int = 1200
    test_pairs: int = 200
    label_noise: float = 0.1
    """Probability that the worse completion is called the chosen one."""

    max_new_tokens: int = 96
    oversampling: float = 1.3
    """Openings sampled for every pair wanted: two completions that end equally well make no pair."""


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file; completions start with a space, so prompt + completion is the story."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


def sample_preferences(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: PreferenceSettings, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """
    Training and test pairs; no opening stands in both, none twice. DataError where the model's completions
    hardly ever end, or end alike: it was trained too little.
    """
    wanted = settings.train_pairs + settings.test_pairs
    limit = _MOST_OPENINGS * wanted
    rng = np.random.default_rng([seed, 3])
    pairs: list[Pair] = []
    used: set[str] = set()
    while len(pairs) < wanted:
        if len(used) > limit:
            raise DataError(
                f"demo pairs: {len(used)} openings gave {len(pairs)} of {wanted} pairs, as completions do not"
                " end, or end alike; give the language model more steps"
            )
        count = max(8, int((wanted - len(pairs)) * settings.oversampling))
        openings = sample_openings(rng, count, used)
        used.update(openings)
        first, second = _complete_twice(model, tokenizer, openings, settings, rng)
        pairs += label_pairs(openings, first, second, settings.label_noise, rng)
    return pairs[: settings.train_pairs], pairs[settings.train_pairs : wanted]


def sample_openings(rng: np.random.Generator, count: int, excluded: Iterable[str]) -> list[str]:
    """`count` different openings of stories, none of them in `excluded`."""
    taken = set(excluded)
    openings: list[str] = []
    while len(openings) < count:
        opening = STORIES.sample(rng).opening
        if opening not in taken:
            taken.add(opening)
            openings.append(opening)
    return openings


def label_pairs(
    openings: Sequence[str],
    first: Sequence[str | None],
    second: Sequence[str | None],
    label_noise: float,
    rng: np.random.Generator,
) -> list[Pair]:
    """Pairs of those openings whose completions both end (None: it did not) and differ in reward."""
    pairs = []
    for prompt, a, b in zip(openings, first, second, strict=True):
        if a is None or b is None or gold_reward(a) == gold_reward(b):
            continue
        better_first = gold_reward(a) > gold_reward(b)
        flipped = rng.random() < label_noise
        chosen, rejected = (a, b) if better_first != flipped else (b, a)
        pairs.append(Pair(prompt, chosen, rejected, gold_reward(chosen), gold_reward(rejected)))
    return pairs


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def _complete_twice(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    openings: Sequence[str],
    settings: PreferenceSettings,
    rng: np.random.Generator,
) -> tuple[list[str | None], list[str | None]]:
    prompts = [tokenizer(opening)["input_ids"] for opening in openings for _ in range(2)]
    uniforms = rng.random((len(prompts), settings.max_new_tokens), dtype=np.float32)
    completions = sample_completions(model, prompts, uniforms, "preference pairs")
    texts = [tokenizer.decode(ids[:-1]) if ids[-1] == tokenizer.eos_token_id else None for ids in completions]
    return texts[::2], texts[1::2]
