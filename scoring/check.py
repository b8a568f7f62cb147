"""
Is a model measured rightly, and in which layout? Asked of the data's own longest and shortest groups, because what a
family does differently may begin at its window, at its original length, or at once.

The other side of the comparison is the family's own forward over one sequence alone, with its own mask, positions and
logits. A layout that does not reproduce it is not used; a model that no layout reproduces is refused.

Dimension key:  G groups   S segments (prompts and completions)   T tokens
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from fpo.errors import ModelError
from fpo.scoring.families import packed_row_limit, refuse_moving_rope
from fpo.scoring.logps import CHUNK_BYTES
from fpo.scoring.packing import Layout, pack

# Mean |difference| of a completion's token log-probs, nats, of the worst completion. Right families stay below 1e-5 in
# float32; bfloat16 rounds hidden states and logits to 3 digits, which moves the worst completion of four trained models
# by up to 0.025. float16 has 3 bits more.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# A mean over few tokens is as far off as one of them: completions of 1, 2, 4 and 8 tokens of a trained model in
# bfloat16 reach 0.098, 0.088, 0.076 and 0.042, longer ones 0.022. Below this many, rounding gets a mean of n's room.
ROUNDED_TOKENS = 16

# A PreTrainedModel with scoring installed, or a PEFT model around one.
Model = Any
# The logits of a sequence (1, L) at some of its positions (n,), by a model's own forward: (n, V).
OwnLogits = Callable[[Tensor, Tensor], Tensor]

# What a forward raises that was not made for its input.
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)


class _Groups(NamedTuple):
    """The first arguments of `pack`."""

    input_ids: Integer[np.ndarray, " T"]
    splits: Integer[np.ndarray, " S1"]
    n_completions: Integer[np.ndarray, " G"]

    @property
    def last(self) -> _Groups:
        """The last of them alone."""
        n = int(self.n_completions[-1])
        return _Groups(self.input_ids, self.splits[-(n + 2) :], self.n_completions[-1:])

    def sequences(self) -> list[_Sequence]:
        """Every completion behind its prompt, group after group."""
        segments = (self.input_ids[start:end] for start, end in pairwise(self.splits.tolist()))
        found = []
        for n in self.n_completions.tolist():
            prompt = next(segments)
            for completion in islice(segments, n):
                found.append(_Sequence(np.concatenate([prompt, completion]).astype(np.int64), len(prompt)))
        return found


class _Sequence(NamedTuple):
    """One completion as the family's own forward reads it."""

    tokens: Int[np.ndarray, " L"]
    prompt: int
    """How many of them are the prompt."""


class _Plain(NamedTuple):
    """What the family's own forward says about one completion."""

    at: Int[Tensor, " n"]
    """Which scored tokens of the completion were looked at."""
    logps: Float[Tensor, " n"]


def extremes(
    splits: Integer[np.ndarray, " S1"], n_completions: Integer[np.ndarray, " G"]
) -> Integer[np.ndarray, " few"]:
    """
    The groups to check a model on, as `pack` takes them, the shortest last: the one with the longest sequence, the
    longest as a whole, the longest of those with the most completions, and the shortest, each once.
    """
    sizes, n = np.diff(splits.astype(np.int64)), n_completions.astype(np.int64)
    prompts = np.cumsum(n + 1) - (n + 1)
    totals = np.add.reduceat(sizes, prompts)
    completions = sizes.copy()
    completions[prompts] = 0
    sequences = sizes[prompts] + np.maximum.reduceat(completions, prompts)
    most = np.lexsort((-np.arange(len(n)), totals, n))[-1]
    shortest = totals.argmin()
    longest = dict.fromkeys([sequences.argmax(), totals.argmax(), most])
    return np.array([*(group for group in longest if group != shortest), shortest])


@torch.no_grad()
def choose_layout(
    model: Model,
    input_ids: Integer[np.ndarray, " T"],
    splits: Integer[np.ndarray, " S1"],
    n_completions: Integer[np.ndarray, " G"],
    own_logits: OwnLogits | None = None,
) -> Layout:
    """
    The cheapest layout in which the model's scores are those of its own separate forwards.

    model                             with scoring installed, on its device
    input_ids, splits, n_completions  a few groups as `pack` takes them, the shortest last; see `extremes`
    own_logits                        its own forward; None is its family's
    Raises ModelError where there is none, with the reason.
    """
    own = own_logits or functools.partial(_family_logits, model)
    groups = _Groups(input_ids, splits.astype(np.int64), n_completions)
    sequences = groups.sequences()
    refuse_moving_rope(model, max(len(sequence.tokens) for sequence in sequences))
    with _deterministic_mode(model):
        try:
            # Short before long: a state that the long one leaves behind must not hide in both sides.
            expected = [_plain(model, own, sequence) for sequence in reversed(sequences)][::-1]
        except _FAILURES as error:
            raise ModelError(f"{model.config.model_type}: its own forward fails: {_first_line(error)}") from error
        _refuse_nan(model, own, sequences, expected)
        reasons = []
        for layout in Layout:
            reason = _reason_against(model, layout, groups, expected)
            if reason is None:
                _refuse_chance(model, layout, groups)
                return layout
            reasons.append(f"  {layout}: {reason}")
    raise ModelError(
        f"{model.config.model_type}: this model cannot be scored, its own forward says something else than\n"
        + "\n".join(reasons)
    )


def _reason_against(model: Model, layout: Layout, groups: _Groups, expected: list[_Plain]) -> str | None:
    """Why this layout is not right; None where it is."""
    limit = LAYOUT_TOLERANCE[model.dtype]
    row_limit = packed_row_limit(model)
    if row_limit is not None and layout is Layout.PACKED:
        return f"beyond {row_limit} tokens its attention depends on the place in the row"
    if row_limit is not None and layout is Layout.MASKED:
        width = pack(*groups, layout).input_ids.shape[1]
        if width > row_limit:
            return f"rows of {width} tokens, and beyond {row_limit} its attention depends on the place in the row"
    try:
        before = _score(model, layout, groups.last)
        together = _score(model, layout, groups)
        after = _score(model, layout, groups.last)
        off = _worst(together, expected, model.dtype)
        if not off <= limit:
            return f"off by {off:.2g} nats per token (at most {limit:g})"
        off = max(_worst(short, expected[-len(short) :], model.dtype) for short in (before, after))
        if not off <= limit:
            return f"off by {off:.2g} nats per token (at most {limit:g}) before or after a longer batch"
    except _FAILURES as error:
        return f"its decoder does not take it ({_first_line(error)})"
    return None


def _refuse_chance(model: Model, layout: Layout, groups: _Groups) -> None:
    """ModelError where two forwards of the same tokens in training mode differ in any bit."""
    model.train()
    trained = _repeats(model, layout, groups)
    model.eval()
    # A device whose kernels do not repeat themselves shows it in evaluation mode, too.
    if not trained and _repeats(model, layout, groups):
        raise ModelError(
            f"{model.config.model_type}: two forwards of the same tokens in training mode differ, so it cannot be "
            "compared token by token; set what is random in its config.json (a router's jitter, for instance) to 0"
        )


def _repeats(model: Model, layout: Layout, groups: _Groups) -> bool:
    once, again = (_score(model, layout, groups) for _ in range(2))
    return all(map(torch.equal, once, again))


def _first_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return next(iter(str(error).strip().splitlines()), repr(error))


def _score(model: Model, layout: Layout, groups: _Groups) -> list[Tensor]:
    """Token log-probs, one tensor per completion."""
    packed = pack(*groups, layout)
    scores = model(**packed.to(next(model.parameters()).device)._asdict())
    return list(scores.token_logps.split(packed.lengths.tolist()))


def _worst(found: list[Tensor], expected: list[_Plain], dtype: torch.dtype) -> float:
    """
    Mean |difference| of the completion that differs most, NaN where anything is. Where weights are rounded, one of n
    tokens counts for sqrt(n / ROUNDED_TOKENS) of it, at most for all.
    """
    few = 1 if dtype == torch.float32 else ROUNDED_TOKENS
    means = [
        (logps[at] - plain).abs().mean() * min(1.0, len(at) / few) ** 0.5
        for logps, (at, plain) in zip(found, expected, strict=True)
        if len(at)
    ]
    return float(torch.stack(means).max()) if means else 0.0


def _plain(model: Model, own_logits: OwnLogits, sequence: _Sequence) -> _Plain:
    """A completion, scored alone by the model's own forward."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(sequence.tokens)[None].to(device)
    # The first token of a sequence has no predictor.
    skipped = max(sequence.prompt, 1)
    at = _looked_at(len(sequence.tokens) - skipped, model).to(device)
    if len(at) == 0:
        return _Plain(at, torch.empty(0, device=device))
    logits = own_logits(tokens, at + skipped - 1).float()
    return _Plain(at, logits.log_softmax(-1).gather(-1, tokens[0, at + skipped][:, None])[:, 0])


def _looked_at(scored: int, model: Model) -> Int[Tensor, " n"]:
    """All of a completion's tokens, or as many evenly spaced ones as have their logits in the memory of a chunk."""
    most = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
    return torch.linspace(0, scored - 1, min(scored, most)).round().long()


def logits_at(
    forward: Callable[..., Any], family: type[Any], sequence: Int[Tensor, "1 L"], at: Int[Tensor, " n"]
) -> Float[Tensor, "n V"]:
    """What a forward of a family's model gives at some of its outputs; no others are made where the family can."""
    keeps = "logits_to_keep" in inspect.signature(family.forward).parameters
    kept = {"logits_to_keep": at} if keeps else {}
    logits: Tensor = forward(input_ids=sequence, use_cache=False, **kept).logits[0]
    return logits if keeps else logits[at]


def _family_logits(model: Model, sequence: Int[Tensor, "1 L"], at: Int[Tensor, " n"]) -> Float[Tensor, "n V"]:
    return logits_at(functools.partial(type(model).forward, model), type(model), sequence, at)


@contextmanager
def _deterministic_mode(model: Model) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that it was in."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _refuse_nan(model: Model, own_logits: OwnLogits, sequences: list[_Sequence], expected: list[_Plain]) -> None:
    """ModelError naming the first module whose output is not finite, where the family's own log-probs are not."""
    judged = zip(sequences, expected, strict=True)
    bad = next((sequence for sequence, plain in judged if not bool(plain.logps.isfinite().all())), None)
    if bad is None:
        return
    first: list[tuple[str, nn.Module]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            if (
                not first
                and isinstance(found, Tensor)
                and found.is_floating_point()
                and not bool(found.isfinite().all())
            ):
                first.append((name, module))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(look(name)).remove)
        _plain(model, own_logits, bad)
    name, module = first[0] if first else ("its logits", model)
    weights = any(not bool(parameter.isfinite().all()) for parameter in module.parameters(recurse=bool(first)))
    what = "weights give NaN or infinity" if weights and first else "the forward gives NaN or infinity"
    raise ModelError(f"{model.config.model_type}: {what}: {name}; repair the weights, or use another dtype")
