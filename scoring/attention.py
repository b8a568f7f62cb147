"""
Attention over branches: all groups of a batch stand behind each other in one row, and no mask of that row is ever made.

A completion's keys are its prompt's and its own, so each branch is a small attention of its own: the prompt with the
first completion, then every further completion behind the prompt. The family calls it as it calls any attention of
transformers, with its own scale, soft-cap and sinks. Which of its keys a token sees - all before it, a window, a
chunk - comes from the family's own mask function, which is asked about positions (see `branches`). On a GPU one kernel
takes all branches where one can (see `kernels`).

Dimension key:  H heads   K key heads   T tokens of the row   Q queries, L keys of a branch   D head size
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from fpo.scoring.branches import Branch, Branches
from fpo.scoring.kernels import Settings, in_one_kernel

BRANCHED = {"sdpa": "fpo_sdpa", "eager": "fpo_eager"}
"""Implementations of transformers -> ours, which attend over branches where they are given some, else as those do."""

MASK_ELEMENTS = 1 << 22
"""Of a mask. Branches that would take a larger one are attended to in blocks of queries."""


def attend_in_branches(model: PreTrainedModel) -> None:
    """
    Let the model's layers call our attention, which answers as theirs wherever it is given an ordinary mask. A family
    whose attention is its own, and may go by the name of the implementation, is left as it is.
    """
    if not model._supports_attention_backend:
        return
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    for config in configs.values():
        name = getattr(config, "_attn_implementation", None)
        if name in BRANCHED:
            config._attn_implementation = BRANCHED[name]


def _branch_attention(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K L D"],
    value: Float[Tensor, "1 K L E"],
    branches: Branches,
    settings: Settings,
) -> Float[Tensor, "1 T H E"]:
    output = in_one_kernel(query, key, value, branches, settings)
    if output is not None:
        return output
    queries = query.split(branches.parts, dim=2)
    keys, values = (_prompted(states, branches) for states in (key, value))
    outputs = []
    for branch in branches.branches:
        own = queries[branch.own]
        output = _attend(own, _seen(keys, branch), _seen(values, branch), branches, settings)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _prompted(states: Float[Tensor, "1 K L D"], branches: Branches) -> tuple[Tensor | None, list[Tensor]]:
    """A soft prompt's keys or values, and each part's."""
    parts = list(states.split(branches.keys, dim=2))
    if not branches.virtual:
        return None, parts
    return parts[0], parts if branches.embedded else parts[1:]


def _seen(states: tuple[Tensor | None, list[Tensor]], branch: Branch) -> Float[Tensor, "1 K L D"]:
    """The keys or values of a branch: the soft prompt's, its prompt's and its own."""
    soft, parts = states
    found = [parts[branch.own]]
    if branch.trunk is not None:
        found.insert(0, parts[branch.trunk][:, :, : branch.prompt])
    if soft is not None and found[0] is not soft:
        found.insert(0, soft)
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]


def _attend(
    query: Float[Tensor, "1 H Q D"],
    key: Float[Tensor, "1 K L D"],
    value: Float[Tensor, "1 K L E"],
    branches: Branches,
    settings: Settings,
) -> Float[Tensor, "1 H Q E"]:
    n_queries, n_keys = query.shape[2], key.shape[2]
    plainly = settings.softcap is not None or settings.sinks is not None
    if not plainly and branches.is_causal(n_queries, n_keys):
        grouped = query.shape[1] != key.shape[1]
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=settings.scale, enable_gqa=grouped
        )
    rows = max(MASK_ELEMENTS // n_keys, 1)
    outputs = []
    for start in range(0, n_queries, rows):
        block = query[:, :, start : start + rows] if rows < n_queries else query
        seen = n_keys - n_queries + min(start + rows, n_queries)
        masked = _attend_plainly if plainly else _attend_masked
        arguments = block, key[:, :, :seen], value[:, :, :seen], branches, settings
        if plainly and rows < n_queries and torch.is_grad_enabled():
            # Scores of all blocks, several times over, would wait for backward.
            outputs.append(checkpoint(masked, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(masked(*arguments))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _attend_masked(
    query: Float[Tensor, "1 H Q D"],
    key: Float[Tensor, "1 K L D"],
    value: Float[Tensor, "1 K L E"],
    branches: Branches,
    settings: Settings,
) -> Float[Tensor, "1 H Q E"]:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":
        # A GPU's fused kernels take a mask or grouped heads, not both.
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        grouped = False
    mask = branches.mask(query.shape[2], key.shape[2], query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=settings.scale, enable_gqa=grouped
    )


def _attend_plainly(
    query: Float[Tensor, "1 H Q D"],
    key: Float[Tensor, "1 K L D"],
    value: Float[Tensor, "1 K L E"],
    branches: Branches,
    settings: Settings,
) -> Float[Tensor, "1 H Q E"]:
    """With soft-capped scores and sinks, softmax in float32: no fused kernel takes them."""
    _, heads, n_queries, size = query.shape
    # The heads of one key head stand behind each other as queries, so that no key is copied.
    folded = query.reshape(1, key.shape[1], -1, size)
    scores = (folded @ key.transpose(2, 3)).view(1, heads, n_queries, -1)
    scores = scores * (size**-0.5 if settings.scale is None else settings.scale)
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    mask = branches.mask(n_queries, key.shape[2], query.device)
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if settings.sinks is not None:
        sinks = settings.sinks.float().view(1, heads, 1, 1).expand(1, heads, n_queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.view(1, key.shape[1], -1, key.shape[2]) @ value).view(1, heads, n_queries, -1)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The family's own eager attention."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _or_branches(ordinary: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of transformers that attends over branches where it is given them."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, Branches):
            found: tuple[Tensor, Tensor | None] = ordinary(module, query, key, value, attention_mask, **kwargs)
            return found
        settings = Settings(kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
        return _branch_attention(query, key, value, attention_mask, settings), None

    return attention


AttentionInterface.register(BRANCHED["sdpa"], _or_branches(sdpa_attention_forward))
AttentionInterface.register(BRANCHED["eager"], _or_branches(_eager))
AttentionMaskInterface.register(BRANCHED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(BRANCHED["eager"], eager_mask)
