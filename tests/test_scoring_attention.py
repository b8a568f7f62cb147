"""Attention over branches: nothing as large as a row's mask, every family's own settings, any way to call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from family_models import build
from tiny_groups import separate_forwards, some_groups
from tiny_models import layer_of, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import sliding_window_causal_mask_function

from fpo.scoring import Layout, attention, install_scoring, pack
from fpo.scoring.branches import Branches
from fpo.scoring.packing import attention_mask

MANY = [(20, 30, 25), (1, 1, 6), (0, 40, 3), (30, 12, 5, 7, 9), (2, 2), (25, 18, 20), (7, 33, 1), (16, 16, 16)]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.found = max(self.found, *sizes, 0)
        return output


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_oss"])
def test_no_tensor_of_a_step_is_as_large_as_a_rows_mask(case: str) -> None:
    """Of 1,380 tokens, no group longer than 75; a token's widest vector has 192 columns."""
    model = build(case)
    install_scoring(model)
    packed = pack(*some_groups(4 * MANY))
    tokens = packed.input_ids.shape[1]
    with Largest() as largest:
        model(**packed._asdict()).token_logps.sum().backward()
    assert packed.layout is Layout.PACKED
    assert tokens * 32 <= largest.found < tokens * tokens / 6


@pytest.mark.parametrize("elements", [attention.MASK_ELEMENTS, 200])
@pytest.mark.parametrize("case", ["gpt_oss", "gemma2", "cohere2", "deepseek_v3", "qwen3_moe", "granite_swa"])
def test_sinks_caps_windows_and_gradients_are_those_of_separate_forwards(
    case: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of one to four completions that cross every window, one without a prompt; whole and in blocks."""
    monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
    model = build(case)
    hookpoint = layer_of("llama")
    groups = some_groups(MANY)
    weights = torch.randn(len(pack(*groups).targets))
    expected, _ = separate_forwards(model, *groups, hookpoint)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install_scoring(model)
    scores = model(**pack(*groups)._asdict())
    (scores.token_logps * weights).sum().backward()
    torch.testing.assert_close(scores.token_logps, expected, rtol=1e-4, atol=2e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            size = float(gradients[name].abs().max())
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=5e-5 * max(size, 1.0))


@pytest.mark.parametrize("window", [None, 3, 7, 1000])
def test_the_branches_of_a_row_see_what_its_mask_shows(window: int | None) -> None:
    """Branch by branch: the mask of the branch against the rows of the mask that the whole row would have."""
    packed = pack(*some_groups(MANY))
    reach: Any = (lambda *_: _[3] <= _[2]) if window is None else sliding_window_causal_mask_function(window)
    whole = attention_mask(packed.group, packed.branch, packed.position_ids, reach)[0, 0]
    branches = Branches(packed, reach, packed.input_ids.shape[1])
    starts = np.append(0, np.cumsum(branches.parts))
    shown = torch.zeros_like(whole)
    for own, trunk, prompt in branches.branches:
        queries = torch.arange(starts[own], starts[own + 1])
        keys = queries if trunk is None else torch.cat([torch.arange(starts[trunk], starts[trunk] + prompt), queries])
        seen = branches.mask(len(queries), len(keys), torch.device("cpu"))[0, 0]
        if branches.is_causal(len(queries), len(keys)):
            assert torch.equal(seen, torch.ones_like(seen).tril())
        shown[queries[:, None], keys[None]] = seen
    assert torch.equal(shown, whole)


def test_a_model_that_scores_answers_ordinary_calls_as_before() -> None:
    """With a padded batch and with a cache; what is saved names no attention of ours."""
    for family in ("llama", "gemma2"):
        model = tiny_model(family)
        ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
        padding = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
        before = model(input_ids=ids, attention_mask=padding).logits
        written = model.generate(ids[1:], max_new_tokens=5, do_sample=False)
        install_scoring(model)
        ordinary = type(model).forward
        assert torch.equal(ordinary(model, input_ids=ids, attention_mask=padding).logits, before)
        model.forward = ordinary.__get__(model)
        assert torch.equal(model.generate(ids[1:], max_new_tokens=5, do_sample=False), written)
        assert "fpo" not in model.config.to_json_string()
