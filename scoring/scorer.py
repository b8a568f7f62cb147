"""
One forward pass over packed groups: token log-probs and what the hookpoints give, nothing else.

`install_scoring` puts this pass in the place of a model's own `forward`, so DDP, FSDP, PEFT and autocast see
it as they see any forward, and nothing reaches around them to the decoder or the head.

Dimension key:  R rows   L row length   N scored completion tokens   C completions   D hidden   M most likely tokens
                A tokens asked for beside each scored one
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fpo.errors import ModelError
from fpo.scoring.attention import attend_in_branches
from fpo.scoring.families import (
    FamilyHead,
    adjusted_embeddings,
    moving_rope_limit,
    packed_row_limit,
    path_of,
    refuse_moving_rope,
    text_decoder,
)
from fpo.scoring.hookpoints import capture
from fpo.scoring.logps import token_logps
from fpo.scoring.masks import branches_for, masks_for
from fpo.scoring.packing import Layout, Packed
from fpo.scoring.routers import router_loss
from fpo.scoring.virtual import SoftPrompt, behind, decoder_input


class Scores(NamedTuple):
    """What a model says about packed groups, completion by completion."""

    token_logps: Float[Tensor, " N"]
    """Log-probability of each scored token, nats, float32."""
    top_indices: Int[Tensor, "N M"]
    """The M most likely tokens at each position."""
    top_logps: Float[Tensor, "N M"]
    """Their log-probabilities."""
    residuals: tuple[Float[Tensor, "N D"], ...]
    """Output of each hookpoint at the positions that predict the scored tokens, in the model's dtype."""
    entropy: Float[Tensor, " N"]
    """Of the next token where each scored one stands, nats, float32; without gradient, as the two that follow."""
    mean_logits: Float[Tensor, " N"]
    """Mean logit over the vocabulary."""
    is_top: Float[Tensor, " N"]
    """1 where no token has a larger logit than the scored one, else 0."""
    log_sum_squares: Float[Tensor, " N"]
    """Log of the summed squares of all probabilities."""
    router_loss: Float[Tensor, ""] | None = None
    """Load-balancing loss over the batch's tokens, not multiplied yet; None where it was not asked for."""
    prompt_residuals: tuple[Float[Tensor, "prompt_tokens D"], ...] = ()
    """Output of each hookpoint at the positions that predict the prompts' own tokens, where the batch asks for them."""
    hidden_sums: Float[Tensor, "C D"] | None = None
    """
    Sum of what the head reads (the last hidden states, after the final norm) over the tokens of each completion that
    count, float32; None where it was not asked for.
    """
    asked_logps: Float[Tensor, "N A"] | None = None
    """Log-probabilities of the tokens that the batch asks for beside each scored one; None: it asks for none."""


def install_scoring(
    model: PreTrainedModel,
    hookpoints: tuple[str, ...] = (),
    top_logits: int = 0,
    *,
    routers: bool = False,
    hidden_sums: bool = False,
) -> None:
    """
    Make `model(**packed._asdict())` return Scores, with `prompt=` those behind a soft prompt. `model` is the causal LM
    itself, not a wrapper around it.

    hookpoints   module paths whose outputs are reported
    top_logits   how many most likely tokens to report at each position
    routers      whether to report the load-balancing loss, where the model's config asks for it
    hidden_sums  whether to report each completion's summed last hidden states
    Raises ModelError for a hookpoint that the model does not have.
    """
    balance = router_loss(model) if routers else None
    extras = {} if balance is None else {"output_router_logits": True}
    with capture(model, hookpoints):
        pass  # resolves every name

    attend_in_branches(text_decoder(model))
    decoder_path = path_of(model, text_decoder(model))
    adjusted = adjusted_embeddings(model, decoder_path)
    row_limit = packed_row_limit(model)
    moving_rope = moving_rope_limit(model) is not None

    def forward(self: PreTrainedModel, prompt: SoftPrompt | None = None, **batch: Any) -> Scores:
        # PEFT adds arguments of its own, all None.
        packed = Packed.of(batch)
        if prompt is not None:
            packed = behind(packed, prompt)
        width = packed.position_ids.shape[1]
        if moving_rope:  # such a family asks the device for the longest position itself
            refuse_moving_rope(self, int(packed.position_ids.max()) + 1, packed.n_virtual)
        if row_limit is not None and packed.layout is not Layout.ROWS and width > row_limit:
            raise ModelError(
                f"{self.config.model_type}: a packed row of {width} tokens, and beyond {row_limit} its attention "
                "depends on the place in the row; lower data.max_length"
            )
        with capture(self, hookpoints) as outputs:
            output = _decoder_output(text_decoder(self), packed, prompt, extras)
        columns = output.last_hidden_state.shape[1]
        hidden = output.last_hidden_state.flatten(0, 1)[packed.predictors]
        head = FamilyHead(self, decoder_path, adjusted)
        scored = token_logps(hidden, packed.targets, head, asked=packed.asked, top=top_logits)
        given = [_output(outputs, name).flatten(0, 1) for name in hookpoints]
        of_prompts = given if len(packed.prompt_lengths) else []
        return Scores(
            token_logps=scored.logps,
            top_indices=scored.top_indices,
            top_logps=scored.top_logps,
            residuals=tuple(states[packed.predictors] for states in given),
            entropy=scored.entropy,
            mean_logits=scored.mean_logits,
            is_top=scored.is_top,
            log_sum_squares=scored.log_sum_squares,
            router_loss=None if balance is None else balance(output.router_logits, packed.group[:, -columns:]),
            prompt_residuals=tuple(states[packed.prompt_predictors] for states in of_prompts),
            hidden_sums=_sums(hidden, packed) if hidden_sums else None,
            asked_logps=scored.asked_logps if packed.asked.shape[1] else None,
        )

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def ordinary_forward(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the causal LM answers ordinary calls, such as those of `generate`: nothing scores, or casts around it."""
    replaced = model.__dict__.pop("forward")
    try:
        yield
    finally:
        model.forward = replaced


def mixed_precision(device: torch.device, autocast: str | None) -> AbstractContextManager[Any]:
    """
    What a model is called in to round its products to `autocast`; None rounds nothing. Trainer's own context for
    `training.bf16` and `fp16` is the same one, so that reference and policy differ in their weights alone.
    """
    dtype = None if autocast is None else getattr(torch, autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=autocast is not None)


def _sums(hidden: Float[Tensor, "N D"], packed: Packed) -> Float[Tensor, "C D"]:
    """Over the tokens of each completion that count, in their order on every device; float32 whatever hidden is."""
    # The counts are its own sums of the mask, so the check that would make the host wait is left out.
    return torch.segment_reduce(packed.counting(hidden).float(), "sum", lengths=packed.counts, unsafe=True)


def _output(outputs: dict[str, Tensor], hookpoint: str) -> Tensor:
    """What a hookpoint gave, which must be a vector per token of the decoder's forward."""
    found = outputs.get(hookpoint)
    if isinstance(found, Tensor) and found.ndim == 4:
        # Gemma 3n: AltUp keeps parallel streams, of which layers read and write a learned mixture.
        raise ModelError(
            f"hookpoint {hookpoint} gives {len(found)} streams per token, none of which is the residual stream alone; "
            f"name a module that writes to it, such as {hookpoint}.mlp or {hookpoint}.self_attn"
        )
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise ModelError(f"hookpoint {hookpoint} gives no vector per token while the decoder runs; name a layer")
    return found


def _decoder_output(
    decoder: PreTrainedModel, packed: Packed, prompt: SoftPrompt | None, extras: dict[str, bool]
) -> Any:
    """
    What the decoder says of the rows: where prompts are shared by its branches or under their masks, else as the family
    has it.

    prompt  the virtual tokens that `packed` stands behind
    extras  further arguments of the decoder's forward
    """
    tokens = decoder_input(decoder, packed, prompt)
    if packed.layout is Layout.ROWS:
        # No mask: what stands behind a token cannot reach it, and nothing is padded before one.
        return decoder(**tokens, use_cache=False, **extras)
    width = (packed.position_ids if isinstance(prompt, Tensor) else packed.input_ids).shape[1]
    sees = masks_for if packed.layout is Layout.MASKED else branches_for
    with sees(packed, width):
        return decoder(
            **tokens,
            # A mask of ones: without one the family would take the restarts of the positions for new sequences.
            attention_mask=torch.ones_like(packed.position_ids),
            position_ids=packed.position_ids[:, -width:],
            use_cache=False,
            **extras,
        )
