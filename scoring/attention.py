"""
Attention over branches: all groups of a batch stand behind each other in one row, and no mask of that row is ever made.

A completion's keys are its prompt's and its own, so each branch is a small attention of its own: the prompt with the
first completion, then every further completion behind the prompt. The family calls it as it calls any attention of
transformers, with its own scale, soft-cap and sinks. Which of its keys a token sees - all before it, a window, a
chunk - comes from the family's own mask function, which is asked about positions. What holds it, and where the branches
are, stands in the place of a mask: so it reaches the attention by the family's own way, and does so again where
activations are computed twice.

Dimension key:  H heads   K key heads   T tokens of the row   Q queries, L keys of a branch   D head size
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from fpo.scoring.packing import Packed, Reach

BRANCHED = {"sdpa": "fpo_sdpa", "eager": "fpo_eager"}
"""Implementations of transformers -> ours, which attend over branches where they are given some, else as those do."""

MASK_ELEMENTS = 1 << 22
"""Of a mask. Branches that would take a larger one are attended to in blocks of queries."""


class _Branch(NamedTuple):
    """Consecutive queries, the last of the keys that they may see."""

    own: int
    """Which part of the row."""
    trunk: int | None = None
    """The part that begins with its group's prompt; None is its own."""
    prompt: int = 0
    """Tokens of that prompt."""


class Branches:
    """
    What stands in the place of a row's mask. No tuple: what wraps a model takes those apart.
    """

    def __init__(self, packed: Packed, reach: Reach, width: int) -> None:
        """
        reach  the family's mask function
        width  tokens of the row: a soft prompt's are among them, or are keys and values alone
        """
        self.reach = reach
        self.virtual = packed.n_virtual
        """Keys of a soft prompt, before all others; every branch sees them."""
        self.embedded = width == packed.position_ids.shape[1]
        """Whether these, if there are any, are of tokens of the row."""
        self.parts = [self.virtual] if self.embedded and self.virtual else []
        """Tokens of each part of the row: the soft prompt, a prompt with its first completion, a further completion."""
        branches = [_Branch(0)] if self.parts else []
        for prompt, *completions in packed.sizes:
            trunk = len(self.parts)
            branches.append(_Branch(trunk))
            branches += [_Branch(trunk + place, trunk, prompt) for place in range(1, len(completions))]
            self.parts += [prompt + completions[0], *completions[1:]]
        self.branches = [branch for branch in branches if self.parts[branch.own]]
        self.keys = self.parts if self.embedded else [self.virtual, *self.parts]
        """Keys of each part; those of a soft prompt that has no tokens stand before them."""
        self._masks: dict[tuple[int, int], Bool[Tensor, "1 1 Q L"]] = {}
        self._reaches: dict[int, bool] = {}

    def mask(self, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 Q L"]:
        """Which keys the last of them, as queries, see."""
        found = self._masks.get((queries, keys))
        if found is None:
            place = torch.arange(keys, device=device)
            zero = place.new_zeros(())
            found = self.reach(zero, zero, place[keys - queries :, None], place[None]).expand(queries, keys)[None, None]
            if queries * keys <= MASK_ELEMENTS // 8:  # those of short branches come again in every layer
                self._masks[queries, keys] = found
        return found

    def is_causal(self, queries: int, keys: int) -> bool:
        """Whether every key is a query, and each sees all before it: as soon as the last one sees the first one."""
        if queries < keys or self.reach is causal_mask_function:
            return queries == keys
        if keys not in self._reaches:  # of any layer: asked once
            zero = torch.zeros((), dtype=torch.long)
            self._reaches[keys] = bool(self.reach(zero, zero, zero + keys - 1, zero))
        return self._reaches[keys]


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
    settings: _Settings,
) -> Float[Tensor, "1 T H E"]:
    queries = query.split(branches.parts, dim=2)
    keys, values = (_prompted(states, branches) for states in (key, value))
    outputs = []
    for branch in branches.branches:
        own = queries[branch.own]
        output = _attend(own, _seen(keys, branch), _seen(values, branch), branches, settings)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


class _Settings(NamedTuple):
    """What a family's layer asks of its attention."""

    scale: float | None
    softcap: float | None
    sinks: Float[Tensor, " H"] | None


def _prompted(states: Float[Tensor, "1 K L D"], branches: Branches) -> tuple[Tensor | None, list[Tensor]]:
    """A soft prompt's keys or values, and each part's."""
    parts = list(states.split(branches.keys, dim=2))
    if not branches.virtual:
        return None, parts
    return parts[0], parts if branches.embedded else parts[1:]


def _seen(states: tuple[Tensor | None, list[Tensor]], branch: _Branch) -> Float[Tensor, "1 K L D"]:
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
    settings: _Settings,
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
    settings: _Settings,
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
    settings: _Settings,
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
        settings = _Settings(kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
        return _branch_attention(query, key, value, attention_mask, settings), None

    return attention


AttentionInterface.register(BRANCHED["sdpa"], _or_branches(sdpa_attention_forward))
AttentionInterface.register(BRANCHED["eager"], _or_branches(_eager))
AttentionMaskInterface.register(BRANCHED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(BRANCHED["eager"], eager_mask)
