"""
Completions sampled from a causal model, and their log-probabilities: what labelling and evaluation both need.

Sampling is by inverse transform: one uniform number decides one token. The same uniforms given to two models
make their samples as alike as their distributions are, so that a comparison of the two is far less noisy.

Dimension key:  R rows (a batch of prompts)   L tokens   T new tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

_ROWS = 128  # larger batches are slower on a CPU: their key-value cache leaves the processor's own


@torch.no_grad()
def sample_completions(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], uniforms: NDArray[np.float32], desc: str
) -> list[list[int]]:
    """
    One completion for each prompt (token ids, not empty), at temperature 1 from the whole distribution.

    `uniforms` is (prompts, longest completion) in [0, 1). A completion ends with the model's end token,
    which it includes, or at the longest length without it.
    """
    completions: list[list[int]] = []
    starts = range(0, len(prompts), _ROWS)
    for start in tqdm(starts, desc=desc, unit="batch", disable=None):
        rows = slice(start, start + _ROWS)
        tokens = _sample_batch(model, prompts[rows], torch.from_numpy(uniforms[rows]))
        completions += [_until_end(row, model.config.eos_token_id) for row in tokens.tolist()]
    return completions


@torch.no_grad()
def completion_logps(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Log-probability of each completion given its prompt, in nats: (completions,)."""
    logps = []
    for start in range(0, len(prompts), _ROWS):
        pairs = list(zip(prompts[start : start + _ROWS], completions[start : start + _ROWS], strict=True))
        rows = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
        ids_RL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = model.model(input_ids=ids_RL[:, :-1], use_cache=False).last_hidden_state
        for (prompt, completion), ids, states in zip(pairs, ids_RL, hidden, strict=True):
            scored = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            log_probs = model.lm_head(states[scored]).double().log_softmax(-1)
            logps.append(float(log_probs.gather(-1, ids[1:][scored, None]).sum()))
    return np.array(logps)


def _sample_batch(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], uniforms: torch.Tensor) -> torch.Tensor:
    """(R, T) token ids; what follows a row's end token means nothing."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width + uniforms.shape[1], dtype=torch.long)
    mask[:, width:] = 1
    for i, prompt in enumerate(prompts):  # padded on the left, so that all rows go on at the same column
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) : width] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    sampled = []
    for step in range(uniforms.shape[1]):
        seen = width + step
        hidden = model.model(
            input_ids=ids,
            attention_mask=mask[:, :seen],
            position_ids=positions[:, seen - ids.shape[1] : seen],
            past_key_values=cache,
        ).last_hidden_state
        ids = _inverse_transform(model.lm_head(hidden[:, -1]), uniforms[:, step])
        sampled.append(ids)
        ended |= ids[:, 0] == model.config.eos_token_id
        if ended.all():
            break
    return torch.cat(sampled, dim=1)


def _inverse_transform(logits_RV: torch.Tensor, uniforms_R: torch.Tensor) -> torch.Tensor:
    cumulative_RV = logits_RV.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cumulative_RV, uniforms_R[:, None].double(), right=True)
    return token.clamp(max=logits_RV.shape[-1] - 1)  # rounding can leave the last sum just below one


def _until_end(tokens: list[int], eos_token_id: int) -> list[int]:
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
