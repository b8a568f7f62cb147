"""
The demo's language model: a Llama of about a million parameters, trained from random weights on fresh stories
of the grammar. Its held-out loss stands beside the grammar's own, which no model can beat.

Dimension key:  R rows   L tokens of a row   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fpo.demo.grammar import STORIES, Story

_IGNORED = -100


@dataclass(frozen=True)
class LanguageModelSettings:
    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 256
    """Positions that the config advertises; a story takes about 85."""

    steps: int = 220
    batch_size: int = 24
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    initializer_range: float = 0.05
    """Of the weights, standard deviation. One run each: 0.43 held-out nats/token at 0.02, 0.345 at 0.05."""

    heldout_stories: int = 300


@dataclass(frozen=True)
class HeldoutLoss:
    """Nats per token over the same held-out stories, end of story included, start excluded."""

    model: float
    grammar: float
    tokens: int


def train_language_model(
    tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings, seed: int
) -> LlamaForCausalLM:
    """A float32 Llama that has read `steps * batch_size` stories, each once."""
    rng = np.random.default_rng([seed, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    progress = tqdm(range(settings.steps), desc="language model", unit="step", disable=None)
    for _ in progress:
        stories = [STORIES.sample(rng) for _ in range(settings.batch_size)]
        loss = _nats(model, pad_stories(tokenizer, stories)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(nats_per_token=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: Sequence[Story]) -> HeldoutLoss:
    """The model's loss beside the grammar's: their difference is what is left to learn."""
    nats = [
        _nats(model, pad_stories(tokenizer, stories[start : start + 64])).double()
        for start in range(0, len(stories), 64)
    ]
    tokens = sum(len(part) for part in nats)
    grammar = -sum(story.log_probability for story in stories)
    return HeldoutLoss(float(sum(part.sum() for part in nats)) / tokens, grammar / tokens, tokens)


def pad_stories(tokenizer: PreTrainedTokenizerFast, stories: Sequence[Story]) -> Int[Tensor, "R L"]:
    """Token ids from `<s>` to `</s>`, padded on the right with -100; a causal model needs no mask there."""
    rows = [[*tokenizer(story.text)["input_ids"], tokenizer.eos_token_id] for story in stories]
    padded = torch.full((len(rows), max(map(len, rows))), _IGNORED)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


def _nats(model: LlamaForCausalLM, padded_RL: Int[Tensor, "R L"]) -> Tensor:
    """Negative log-probability of every real token but the first, one after the other."""
    hidden = model.model(input_ids=padded_RL.clamp(min=0)[:, :-1], use_cache=False).last_hidden_state
    targets = padded_RL[:, 1:]
    real = targets != _IGNORED
    return cross_entropy(model.lm_head(hidden[real]), targets[real], reduction="none")


def _rate(step: int, settings: LanguageModelSettings) -> float:
    """Linear warm-up, then linearly down to a fiftieth."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)
    return max(0.02, left)


def _config(tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=settings.initializer_range,
        dtype="float32",
    )
