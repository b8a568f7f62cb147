"""
A grammar of very small stories with exact probabilities, and the gold reward of a story: how it ends.

A story is a set of slots (hero, place, object, ...), drawn once and used wherever they are named, and a
context-free grammar without recursion. No rule depends on a slot, so the entropy of a story is the sum of the
slots' entropies and the start symbol's: an exact yardstick, in nats, for whoever models these texts.

In a production `{name}` is a slot and `<trouble>` a symbol.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from fpo.demo.words import HAPPY_WORDS, RULES, SAD_WORDS, SLOTS

_SYMBOL = re.compile(r"<([a-z0-9-]+)>")
_ENDING_SENTENCES = 2


@dataclass(frozen=True)
class Story:
    """A text of the grammar: `opening` is the prompt, `continuation` starts with a space."""

    opening: str
    continuation: str
    log_probability: float
    """Of this very story under the grammar, in nats."""

    @property
    def text(self) -> str:
        return self.opening + self.continuation


@dataclass(frozen=True)
class Grammar:
    """Weighted slots and rules; weights need not sum to one, probabilities do."""

    slots: Mapping[str, Mapping[str, float]]
    rules: Mapping[str, Mapping[str, float]]

    def sample(self, rng: np.random.Generator) -> Story:
        """One story, with the probability it was drawn with."""
        values, log_probability = {}, 0.0
        for slot, options in self.slots.items():
            values[slot], log_p = _draw(options, rng)
            log_probability += log_p
        parts = []
        for symbol in ("opening", "continuation"):
            template, log_p = self._expand(symbol, rng)
            parts.append(template.format_map(values))
            log_probability += log_p
        return Story(parts[0], parts[1], log_probability)

    def entropy(self) -> float:
        """Exact entropy of a story, in nats."""
        slots = sum(_entropy(options) for options in self.slots.values())
        return slots + self.symbol_entropy("opening") + self.symbol_entropy("continuation")

    def symbol_entropy(self, symbol: str) -> float:
        """Entropy of everything that `symbol` expands to, in nats."""
        options = self.rules[symbol]
        below = sum(
            probability * sum(self.symbol_entropy(child) for child in _SYMBOL.findall(template))
            for template, probability in probabilities(options).items()
        )
        return _entropy(options) + below

    def enumerate(self, symbol: str) -> Iterator[tuple[str, float]]:
        """Every template that `symbol` derives, slots unfilled, with its probability."""
        for template, probability in probabilities(self.rules[symbol]).items():
            pieces = _SYMBOL.split(template)  # text, symbol, text, symbol, ..., text
            choices = [list(self.enumerate(child)) for child in pieces[1::2]]
            for chosen in product(*choices):
                text = pieces[0] + "".join(t + after for (t, _), after in zip(chosen, pieces[2::2], strict=True))
                yield text, probability * math.prod(p for _, p in chosen)

    def _expand(self, symbol: str, rng: np.random.Generator) -> tuple[str, float]:
        template, log_probability = _draw(self.rules[symbol], rng)
        pieces = _SYMBOL.split(template)
        for i in range(1, len(pieces), 2):
            pieces[i], log_p = self._expand(pieces[i], rng)
            log_probability += log_p
        return "".join(pieces), log_probability


STORIES = Grammar(SLOTS, RULES)


def gold_reward(text: str) -> float:
    """
    How the ending feels: the mean mood of the last two sentences, from -1 (sad) to 1 (happy) in halves.

    The mood of a sentence is the sign of (happy words - sad words). Any text has a reward: a fragment counts
    as a sentence, a text of one sentence is its own ending, a text without words is neutral.
    """
    sentences = [s for s in re.split(r"[.!?]+", text) if re.search(r"[A-Za-z]", s)]
    ending = sentences[-_ENDING_SENTENCES:]
    return sum(_mood(sentence) for sentence in ending) / len(ending) if ending else 0.0


def probabilities(options: Mapping[str, float]) -> dict[str, float]:
    """Weights, normalised."""
    total = math.fsum(options.values())
    return {option: weight / total for option, weight in options.items()}


def _mood(sentence: str) -> int:
    words = re.findall(r"[a-z]+", sentence.lower())
    balance = sum(w in HAPPY_WORDS for w in words) - sum(w in SAD_WORDS for w in words)
    return (balance > 0) - (balance < 0)


def _draw(options: Mapping[str, float], rng: np.random.Generator) -> tuple[str, float]:
    weights = probabilities(options)
    option = list(weights)[int(rng.choice(len(weights), p=list(weights.values())))]
    return option, math.log(weights[option])


def _entropy(options: Mapping[str, float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities(options).values() if p > 0)
