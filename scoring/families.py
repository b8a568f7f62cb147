"""
What a family makes of its own config: where its decoder is, how hidden states become logits, what is random while it
trains, how far its positions reach. Asked of the model itself wherever it can answer; a config may carry names that its
family never reads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fpo.errors import ModelError

# Chances of dropping, by the names that families give them; they count in training alone. A router's jitter is none of
# them: PhiMoE's also decides which experts are mixed in evaluation.
_RANDOM = re.compile(r"dropout|pdrop|layerdrop|drop_prob")


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part from token ids to the last hidden states, without the head."""
    decoder = model.get_decoder()
    # modernbert-decoder has its head under that name, llama4_text answers with itself.
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    within = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(within) != 1:
        raise ModelError(f"{model.config.model_type}: no decoder is found in {type(model).__name__}")
    return within[0]


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name under which `model` holds a module."""
    paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return paths[wanted]


class FamilyHead:
    """
    Hidden states to logits as the family's own forward does it, with its factors, caps and biases: that forward is run
    with a decoder that answers with these hidden states.

    Where the family changes what its output embeddings give, `project` ends with them and `adjust` does the rest, also
    by the family's own forward: so backward redoes a cap from the one copy of (N, V) that is kept.
    """

    def __init__(self, model: PreTrainedModel, decoder_path: str, adjusted: str | None) -> None:
        """`adjusted`: what `adjusted_embeddings` says of this model."""
        self.model = model
        self._child, *self._inner = decoder_path.split(".")
        self._adjusted = adjusted

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """What `adjust` makes logits of, in its own dtype: all of the head that has weights."""
        if self._adjusted is None:
            return self._logits(hidden)
        given: list[Tensor] = []
        real = self.model.get_submodule(self._adjusted)

        def embeddings(states: Tensor) -> Tensor:
            given.append(real(states))
            return given[0].detach().narrow(-2, 0, 0)

        with _answering(self.model, self._adjusted, embeddings):
            self._logits(hidden)
        return given[0].flatten(0, -2)

    def adjust(self, projected: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits of rows that `project` gave."""
        if self._adjusted is None:
            return projected
        answers = [projected[None]]
        # To be called once, without hidden states: logits that also depend on anything else are an error here.
        with _answering(self.model, self._adjusted, lambda *_: answers.pop()):
            return self._logits(projected.new_empty(0, 0))

    def row_bytes(self, hidden: Float[Tensor, "N D"]) -> int:
        """
        What autograd keeps of each row that is as wide as the vocabulary. Not by trying: FSDP2 counts the head's calls,
        and has let go of the final norm's weights when backward comes to it after a call more.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        # DoRA keeps what the weights and what the adapter give, for the gradient of its magnitudes.
        dora = bool(getattr(self.model.get_output_embeddings(), "lora_magnitude_vector", None))
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return (3 if dora else 1) * vocabulary * dtype.itemsize

    @property
    def draws(self) -> bool:
        """Whether anything behind the decoder draws random numbers, as an adapter's dropout does."""
        behind = (child for name, child in self.model.named_children() if name != self._child)
        modules = (module for child in behind for module in child.modules())
        return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules)

    def _logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "L V"]:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        said = _Hidden(hidden[None])
        with _answering(self.model, self._child, lambda *_, **__: said, self._inner):
            logits: Tensor = type(self.model).forward(self.model, input_ids=ids, use_cache=False).logits
        # A view: indexing would make backward fill a second tensor of this size.
        return logits.flatten(0, 1)


def adjusted_embeddings(model: PreTrainedModel, decoder_path: str) -> str | None:
    """
    The path of a model's output embeddings, where its forward makes the logits of what they give alone, without further
    weights, by a cap or a factor; None where nothing is made of it, or where it takes more.
    """
    module = model.get_output_embeddings()
    if module is None:
        return None
    path = path_of(model, module)
    vocabulary = model.config.get_text_config().vocab_size
    given = torch.linspace(-1, 1, 2 * vocabulary, device=next(model.parameters()).device).view(2, vocabulary)
    try:
        with torch.enable_grad():
            found = FamilyHead(model, decoder_path, path).adjust(given)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return None  # it needs the hidden states, or calls its embeddings otherwise
    if found.shape != given.shape or found.requires_grad or torch.equal(found, given):
        return None
    return path


@contextmanager
def _answering(model: nn.Module, path: str, answer: Callable[..., Any], inner: Sequence[str] = ()) -> Iterator[None]:
    """Inside, `answer` is called in the place of a module of the model, or of one that is `inner` in it."""
    parent, _, name = path.rpartition(".")
    children = model.get_submodule(parent)._modules
    real = children[name]
    assert real is not None
    children[name] = _Answer(real, inner, answer)
    try:
        yield
    finally:
        children[name] = real


class _Answer(nn.Module):
    """Stands where a module stands: answers a call as it is told, and everything else with the real module."""

    def __init__(self, real: nn.Module, inner: Sequence[str], answer: Callable[..., Any]) -> None:
        super().__init__()
        # Not as a submodule: nothing of the model may be found here a second time.
        self.__dict__.update(real=real, inner=inner, answer=answer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("real", "inner", "answer"):
            raise AttributeError(name)
        found = getattr(self.real, name)
        # OPT calls `model.decoder`, which is the decoder; the embeddings beside it are real.
        return _Answer(found, self.inner[1:], self.answer) if name in self.inner[:1] else found


class _Hidden:
    """What decoders return, with the last hidden states alone; whatever else a head passes on is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def silence_dropout(model: nn.Module) -> None:
    """
    Set every chance of dropping something to 0: reference and policy are compared token by token.

    Modules get a copy of their config where it holds one; the model's own config, which is saved, stays as it is.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if _RANDOM.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        if module is not model and isinstance(config, PreTrainedConfig):
            module.config = copies.setdefault(id(config), _without_chance(config))


def _without_chance(config: PreTrainedConfig) -> PreTrainedConfig:
    silent = copy.copy(config)
    for name, value in vars(config).items():
        if _RANDOM.search(name) and isinstance(value, float):
            setattr(silent, name, 0.0)
    return silent


def packed_row_limit(model: Any) -> int | None:
    """
    How long packed rows may become, for a family that counts places in the row: Llama 4 turns its attention's
    temperature by them, from `floor_scale` on and so little that bfloat16 would hide it. None for all others.
    """
    scales = [module.floor_scale for module in model.modules() if getattr(module, "attn_temperature_tuning", False)]
    return int(min(scales)) - 1 if scales else None


def moving_rope_limit(model: Any) -> tuple[str, int] | None:
    """
    Kind and reach of position encodings that change with the longest sequence of a batch: `dynamic` NTK and `longrope`.
    Up to that many positions they are what they are for a sequence alone, beyond it they depend on what else is in the
    batch, and dynamic NTK on what was scored before. None for all other encodings.
    """
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if kind == "dynamic":
                limits.append((kind, int(module.original_max_seq_len)))
            elif kind == "longrope":
                parameters = module.config.rope_parameters
                own = parameters if layers is None else parameters[layers]
                limits.append((kind, int(own["original_max_position_embeddings"])))
    return min(limits, key=lambda limit: limit[1], default=None)


def refuse_moving_rope(model: Any, longest: int, virtual: int = 0) -> None:
    """
    ModelError where a sequence of `longest` tokens is beyond what `moving_rope_limit` allows.

    virtual  how many of them are a soft prompt's
    """
    limit = moving_rope_limit(model)
    if limit is not None and longest > limit[1]:
        kind, reach = limit
        raise ModelError(
            f"{model.config.model_type}: a sequence of {longest} tokens, and beyond {reach} its {kind} position "
            f"encoding depends on the rest of the batch; set data.max_length to {reach - virtual} or less"
        )
