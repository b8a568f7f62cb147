"""
How far a policy is from the reference where it speaks itself: it completes held-out prompts, and both say how likely
each token is.

    k1   sum of log policy - log reference over a completion: unbiased for KL(policy || reference), may be below 0
    k3   sum of r - 1 - log r with r = reference / policy of each token: unbiased too, never below 0, varies less
         (Schulman 2020, http://joschu.net/blog/kl-approx.html, of tokens)

Entropy is the policy's over all tokens of the vocabulary, nats per token. FPO's paper reports an "entropy of the top
100 results" (https://arxiv.org/abs/2411.07618, section 5): read as the entropy of the 100 likeliest tokens, rescaled
to add up to 1. It cannot exceed log 100, and says less the flatter the policy is.

Dimension key:  S samples   T tokens of a completion   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fpo.evaluation.estimates import clustered_mean
from fpo.evaluation.held_out import finite
from fpo.evaluation.sampling import Sampling, check_room, uniforms
from fpo.evaluation.speakers import Opened
from fpo.progress import progress_bar

TOP = 100
"""Tokens of the paper's entropy."""


class TokenStatistics(NamedTuple):
    """What a model says of a completion's tokens."""

    logps: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"]
    top_entropy: Float[Tensor, " T"]
    """Of the TOP likeliest tokens alone."""


@torch.no_grad()
def token_statistics(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> TokenStatistics:
    """By the model's own forward over one sequence, of whose logits only the completion's are made."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(completion) + 1).logits
    logps = logits[0, :-1].float().log_softmax(-1)
    top = logps.topk(min(TOP, logps.shape[-1]), dim=-1).values.log_softmax(-1)
    own = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return TokenStatistics(own, _entropy(logps), _entropy(top))


def _entropy(logps: Float[Tensor, "T n"]) -> Float[Tensor, " T"]:
    # Of a token that cannot come, 0 times minus infinity is 0.
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def own_samples(
    policy: Opened,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int = 16,
) -> dict[str, Any]:
    """
    What a policy's completions of these prompts (token ids, not empty) say of it, in JSON types.

    reference  a causal model that answers ordinary calls, as the policy does
    Raises DataError where a completion would outgrow the model.
    """
    check_room(prompts, sampling, policy.room)
    kl: dict[str, list[float]] = {"kl": [], "kl_k3": []}
    per_token: dict[str, list[float]] = {"entropy": [], "top_entropy": [], "reference_entropy": []}
    lengths: list[int] = []
    with progress_bar(len(prompts), "samples", "speak") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            numbers = [uniforms(sampling.seed, start + row, 0, 0, sampling.max_new_tokens) for row in range(len(batch))]
            written = policy.engine(batch, np.stack(numbers), sampling)
            for prompt, (tokens, _) in zip(batch, written, strict=True):
                ours, theirs = (token_statistics(model, prompt, tokens) for model in (policy.model, reference))
                logratio = (ours.logps - theirs.logps).double()
                kl["kl"].append(float(logratio.sum()))
                kl["kl_k3"].append(float((torch.expm1(-logratio) + logratio).sum()))
                for name, values in zip(per_token, (ours.entropy, ours.top_entropy, theirs.entropy), strict=True):
                    per_token[name].append(float(values.mean()))
                lengths.append(len(tokens))
            bar.update(len(batch))
    every = {**kl, **per_token, "tokens": [float(length) for length in lengths]}
    alone = np.arange(len(lengths))
    means = {name: clustered_mean(np.array(of), alone)._asdict() for name, of in every.items()}
    said: dict[str, Any] = finite({"samples": len(lengths), **means})
    return said
