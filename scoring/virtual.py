"""
Virtual tokens: a soft prompt before everything that stands in a row. All groups see it and it sees nothing of them: it
is computed once per row, and every completion's numbers are those of the soft prompt before that completion alone.

It comes in one of two forms. Embeddings are read as tokens are, by every layer. Keys and values stand in a layer's
attention alone: nothing is computed for them.

Dimension key:  R rows   L row length   n virtual tokens   D hidden
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fpo.scoring.packing import PROMPT, VIRTUAL, Packed

SoftPrompt: TypeAlias = "Tensor | Cache"
"""Embeddings (R, n, D), or every layer's keys and values, the same ones in each of R rows."""


def behind(packed: Packed, prompt: SoftPrompt) -> Packed:
    """
    The rows with the virtual tokens before them: R x (n + L) groups, branches and positions, which go on behind the
    prompt's; the flat positions are those in what the decoder gives, which holds no columns for keys and values.
    """
    rows, width = packed.input_ids.shape
    n: int = prompt.shape[1] if isinstance(prompt, Tensor) else prompt.get_seq_length()
    own = torch.arange(n, device=packed.position_ids.device).expand(rows, n)
    filled: dict[str, Any] = {"position_ids": torch.cat([own, packed.position_ids + n], 1)}
    if packed.branch.shape[1] == width:  # many branches in a row
        for name, value in (("group", VIRTUAL), ("branch", PROMPT)):
            tokens = getattr(packed, name)
            filled[name] = torch.cat([tokens.new_full((rows, n), value), tokens], 1)
    if isinstance(prompt, Tensor):
        for name in ("predictors", "prompt_predictors"):
            places = getattr(packed, name)
            filled[name] = places + n * (places // width + 1)
    return packed._replace(**filled)


def decoder_input(decoder: PreTrainedModel, packed: Packed, prompt: SoftPrompt | None) -> dict[str, Any]:
    """What the decoder is given of the tokens and of the prompt before them."""
    if prompt is None:
        return {"input_ids": packed.input_ids}
    if not isinstance(prompt, Tensor):
        return {"input_ids": packed.input_ids, "past_key_values": prompt}
    embedded = decoder.get_input_embeddings()(packed.input_ids)
    return {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], 1)}
