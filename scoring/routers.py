"""
The load-balancing loss of mixtures of experts: where a model's config asks for it (`output_router_logits`), TRL's
trainers add it to theirs, and so do ours. It is computed by the family's own function.

Dimension key:  R rows   L row length
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fpo.errors import ModelError

RouterLoss = Callable[[Any, Int[Tensor, "R L"]], Float[Tensor, ""]]


def router_coefficient(model: Any) -> float:
    """What the router's loss is multiplied by; 0 where the model's config asks for none."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0))


def router_loss(model: PreTrainedModel) -> RouterLoss | None:
    """
    The family's load-balancing loss, from the decoder's `router_logits` and the group of each token, over the tokens
    of groups: no padding, no soft prompt. None where the config asks for none. Raises ModelError where it asks and the
    family has none.
    """
    if not router_coefficient(model):
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        raise ModelError(
            f"{model.config.model_type}: its config asks for the router's loss (output_router_logits: true), which "
            "this family does not compute in a way that is known here; set output_router_logits: false in config.json"
        )

    def loss(router_logits: Any, group: Tensor) -> Tensor:
        value = function(router_logits, experts, chosen, (group >= 0).long())
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{model.config.model_type}: its decoder gives no router_logits to compute their loss from"
            )
        return value

    return loss
