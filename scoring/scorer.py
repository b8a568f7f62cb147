"""
One forward pass over packed pairs: token log-probs and what the hookpoints give, nothing else.

`install_scoring` puts this pass in the place of a model's own `forward`, so DDP, FSDP, PEFT and autocast see
it as they see any forward, and nothing reaches around them to the decoder or the head.

Dimension key:  R rows   L row length   N scored completion tokens   D hidden   M most likely tokens
"""

from __future__ import annotations

import types
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from errors import ModelError
from scoring.hookpoints import capture
from scoring.logps import token_logps
from scoring.packing import Packed, attention_mask, pack
from scoring.routers import router_loss


class Scores(NamedTuple):
    """What a model says about packed pairs, completion by completion."""

    token_logps: Float[Tensor, " N"]
    """Log-probability of each scored token, nats, float32."""
    top_indices: Int[Tensor, "N M"]
    """The M most likely tokens at each position."""
    top_logps: Float[Tensor, "N M"]
    """Their log-probabilities."""
    residuals: tuple[Float[Tensor, "N D"], ...]
    """Output of each hookpoint at the positions that predict the scored tokens, in the model's dtype."""
    router_loss: Float[Tensor, ""] | None = None
    """Load-balancing loss over the batch's tokens, not multiplied yet; None where it was not asked for."""


def install_scoring(
    model: PreTrainedModel, hookpoints: tuple[str, ...] = (), top_logits: int = 0, *, routers: bool = False
) -> None:
    """
    Make `model(**packed._asdict())` return Scores. `model` is the causal LM itself, not a wrapper around it.

    hookpoints  module paths whose outputs are reported
    top_logits  how many most likely tokens to report at each position
    routers     whether to report the load-balancing loss, where the model's config asks for it
    Raises ModelError for a hookpoint that the model does not have.
    """
    balance = router_loss(model) if routers else None
    extras = {} if balance is None else {"output_router_logits": True}
    with capture(model, hookpoints):
        pass  # resolves every name

    def forward(self: PreTrainedModel, **batch: Any) -> Scores:
        # PEFT adds arguments of its own, all None.
        packed = Packed(*(batch[name] for name in Packed._fields))
        with capture(self, hookpoints) as outputs:
            output = self.get_decoder()(
                input_ids=packed.input_ids,
                attention_mask=model_masks(self, packed),
                position_ids=packed.position_ids,
                use_cache=False,
                **extras,
            )
        at = packed.predictors
        scored = token_logps(
            output.last_hidden_state.flatten(0, 1)[at],
            packed.targets,
            self.get_output_embeddings(),
            softcap=getattr(self.config.get_text_config(), "final_logit_softcapping", None),
            top=top_logits,
        )
        residuals = tuple(_output(outputs, name).flatten(0, 1)[at] for name in hookpoints)
        balancing = None if balance is None else balance(output.router_logits, packed.pair)
        return Scores(scored.logps, scored.top_indices, scored.top_logps, residuals, balancing)

    model.forward = types.MethodType(forward, model)


def mixed_precision(device: torch.device, autocast: str | None) -> AbstractContextManager[Any]:
    """
    What a model is called in to round its products to `autocast`; None rounds nothing. Trainer's own context for
    `training.bf16` and `fp16` is the same one, so that reference and policy differ in their weights alone.
    """
    dtype = None if autocast is None else getattr(torch, autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=autocast is not None)


def _output(outputs: dict[str, Tensor], hookpoint: str) -> Tensor:
    """What a hookpoint gave, which must be a vector per token of the decoder's forward."""
    found = outputs.get(hookpoint)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise ModelError(f"hookpoint {hookpoint} gives no vector per token while the decoder runs; name a layer")
    return found


def model_masks(model: PreTrainedModel, packed: Packed) -> Tensor | dict[str, Tensor]:
    """
    The packed attention mask in the form that the model's family takes: one tensor, or one per layer type;
    boolean for sdpa, additive for eager attention.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return _mask(model, packed, window)
    unknown = set(layer_types) - set(windows)
    if unknown:
        raise ModelError(f"{config.model_type}: layers of type {sorted(unknown)[0]} cannot read packed pairs")
    return {kind: _mask(model, packed, windows[kind]) for kind in sorted(set(layer_types))}


def _mask(model: PreTrainedModel, packed: Packed, window: int | None) -> Tensor:
    allowed = attention_mask(packed.pair, packed.branch, packed.position_ids, window)
    if model.config._attn_implementation == "sdpa":
        return allowed
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def check_packing(model: PreTrainedModel) -> None:
    """
    Score two small pairs packed and, with the family's own forward, one sequence at a time. Raises ModelError
    where they differ: such a family (ALiBi, state space, scaled logits) would be measured wrongly.
    """
    rng = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sizes = np.array([5, 9, 4, 1, 2, 7])
    ids = rng.integers(0, vocabulary, sizes.sum())
    splits = np.concatenate([[0], np.cumsum(sizes)])
    device = next(model.parameters()).device
    with torch.no_grad():
        try:
            packed = Packed(*(tensor.to(device) for tensor in pack(ids, splits)))
            ours = model(**packed._asdict()).token_logps
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{model.config.model_type}: this family cannot read packed pairs ({error})") from error
        theirs = torch.cat([part for p in range(2) for part in _separate_logps(model, ids, splits, p, device)])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    difference = float((ours - theirs).abs().mean())
    if not difference <= tolerance:
        raise ModelError(
            f"{model.config.model_type}: packed and separate forwards differ by {difference:.2g} nats per token "
            f"(at most {tolerance:g}), so this family cannot be scored"
        )


def _separate_logps(
    model: PreTrainedModel, ids: np.ndarray, splits: np.ndarray, pair: int, device: torch.device
) -> list[Tensor]:
    start, chosen, rejected, end = splits[3 * pair : 3 * pair + 4]
    logps = []
    for first, last in ((chosen, rejected), (rejected, end)):
        sequence = torch.from_numpy(np.concatenate([ids[start:chosen], ids[first:last]]))[None].to(device)
        logits = type(model).forward(model, input_ids=sequence, use_cache=False).logits[0].float()
        prompt = chosen - start
        targets = sequence[0, prompt:]
        logps.append(logits[prompt - 1 : -1].log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    return logps
