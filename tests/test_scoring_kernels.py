"""One kernel for all branches: what it is told of them, and that it gives what the branches give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import build
from test_scoring_attention import MANY
from tiny_groups import some_groups
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from fpo.scoring import attention, install_scoring, kernels, pack
from fpo.scoring.branches import Branches
from fpo.scoring.kernels import Settings, flex, varlen
from fpo.scoring.packing import attention_mask
from fpo.scoring.virtual import behind

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

HEADS, KEY_HEADS, SIZE = 4, 2, 16
PLAIN = Settings(SIZE**-0.5, None, None)


def soft(form: str | None) -> Any:
    """A soft prompt of 5 virtual tokens."""
    if form == "embeddings":
        return torch.randn(1, 5, 8)
    cache = DynamicCache()
    cache.update(torch.randn(1, KEY_HEADS, 5, SIZE), torch.randn(1, KEY_HEADS, 5, SIZE), 0)
    return cache


def a_row(form: str | None = None, reach: Any = causal_mask_function) -> tuple[Branches, list[Tensor]]:
    """All groups of MANY, behind no soft prompt or one; with random queries, keys and values."""
    torch.manual_seed(0)
    packed = pack(*some_groups(MANY))
    keys = tokens = packed.input_ids.shape[1]
    if form is not None:
        packed = behind(packed, soft(form))
        keys += 5
        tokens += 5 if form == "embeddings" else 0
    sizes = [(HEADS, tokens), (KEY_HEADS, keys), (KEY_HEADS, keys)]
    states = [torch.randn(1, heads, length, SIZE).requires_grad_() for heads, length in sizes]
    return Branches(packed, reach, tokens), states


def one_by_one(states: list[Tensor], branches: Branches, settings: Settings) -> Tensor:
    return attention._branch_attention(*states, branches, settings)


@pytest.mark.parametrize("form", [None, "embeddings", "prefix"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    "settings",
    [PLAIN, Settings(0.3, 2.0, None), Settings(None, None, torch.linspace(-1, 2, HEADS))],
    ids=["plain", "soft-capped", "sinks"],
)
def test_flex_attention_gives_what_branches_give_one_by_one(
    form: str | None, window: int | None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward, which is all that it has on a CPU; in blocks small enough to be skipped."""
    monkeypatch.setattr(kernels, "BLOCK", 32)
    reach = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    branches, states = a_row(form, reach)
    with torch.no_grad():
        states = [state.detach() for state in states]
        found, expected = flex(*states, branches, settings), one_by_one(states, branches, settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_flex_attention_is_traced_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window, a cap and sinks. The first length is taken for a constant, the second one for all further ones."""
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(len(inputs))
        return graph.forward

    compiled = torch.compile(kernels.flexible.flex_attention, dynamic=True, backend=backend)
    settings = Settings(0.3, 2.0, torch.linspace(-1, 2, HEADS))
    for groups in ([MANY[0]], MANY, MANY[:5], 3 * MANY):
        packed = pack(*some_groups(groups))
        tokens = packed.input_ids.shape[1]
        branches = Branches(packed, sliding_window_causal_mask_function(7), tokens)
        states = [torch.randn(1, heads, tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(kernels.flexible, "flex_attention", compiled)
            found = flex(*states, branches, settings)
        torch.testing.assert_close(found, one_by_one(states, branches, settings), rtol=1e-5, atol=2e-6)
    assert len(traced) <= 2


@pytest.mark.parametrize("form", [None, "embeddings", "prefix"])
@pytest.mark.parametrize("block", [8, 32, 128])
def test_blocks_cover_what_is_seen_and_leave_out_most_of_the_row(
    form: str | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of 8, each is left out whose part of the row's mask is empty, but for bounds inside a block."""
    monkeypatch.setattr(kernels, "BLOCK", block)
    branches, (query, *_) = a_row(form)
    packed, tokens = branches.packed, query.shape[2]
    whole = attention_mask(packed.group, packed.branch, packed.position_ids, virtual=form is not None)[0, 0, -tokens:]
    padded = functional.pad(whole, (0, -whole.shape[1] % block, 0, -tokens % block))
    needed = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
    found = torch.from_numpy(kernels._blocks(branches, tokens, whole.shape[1]))
    assert not (needed & ~found).any()
    if block == 8:
        assert found.sum() <= 1.15 * needed.sum() < 0.2 * found.numel()


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, which has no kernel for a CPU, by its documentation."""
    assert window_size == (-1, 0)  # causal, aligned to the last key
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    outputs = []
    for place in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[place] : cu_seq_q[place + 1]].transpose(0, 1)
        k, v = (part[cu_seq_k[place] : cu_seq_k[place + 1]].transpose(0, 1) for part in (key, value))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        attended = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("form", [None, "embeddings", "prefix"])
def test_varlen_attention_is_given_every_branch_with_its_keys(
    form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, in bfloat16, whose unit in the last place is 2^-8 of a value."""
    monkeypatch.setattr(kernels, "varlen_attn", flash_attention)
    kernels._varlen_is_whole.cache_clear()
    branches, states = a_row(form)
    halves = [state.detach().bfloat16().requires_grad_() for state in states]
    weights = torch.randn(1, halves[0].shape[2], HEADS, SIZE)
    found = varlen(*halves, branches, PLAIN)
    assert found is not None
    expected = one_by_one(states, branches, PLAIN)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output, inputs in
                 ((found, halves), (expected, states))]  # fmt: skip
    for own, other in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(own.float(), other, rtol=0, atol=2**-6 * float(other.detach().abs().max()))
    kernels._varlen_is_whole.cache_clear()


@pytest.mark.parametrize(
    ("settings", "window", "dtype"),
    [
        (Settings(None, 30.0, None), None, torch.bfloat16),
        (Settings(None, None, torch.zeros(HEADS)), None, torch.bfloat16),
        (PLAIN, 7, torch.bfloat16),
        (PLAIN, None, torch.float32),
    ],
    ids=["soft-capped", "sinks", "windows", "float32"],
)
def test_varlen_attention_leaves_what_it_cannot_do(settings: Settings, window: int | None, dtype: torch.dtype) -> None:
    reach = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    branches, states = a_row(reach=reach)
    assert varlen(*(state.to(dtype) for state in states), branches, settings) is None
    if window is not None:  # a window that no branch crosses is none
        assert Branches(branches.packed, sliding_window_causal_mask_function(1000), 1).reaches_all


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_oss"])
def test_a_family_scores_alike_with_flex_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's own windows, caps, sinks and scale reach it."""
    model = build(case)
    install_scoring(model)
    packed = pack(*some_groups(MANY))._asdict()
    with torch.no_grad():
        expected = model(**packed).token_logps
        monkeypatch.setattr(attention, "in_one_kernel", flex)
        found = model(**packed).token_logps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", [varlen, flex])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu_each_kernel_trains_as_branches_do(kernel: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, against the branches one by one in float32: both halves err by a few units of 2^-8."""
    model = tiny_model(family).cuda()
    install_scoring(model)
    packed = pack(*some_groups(MANY)).to(torch.device("cuda"))._asdict()

    def step(*on_gpu: Any) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr(kernels, "ON_GPU", on_gpu)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bool(on_gpu)):
            logps = model(**packed).token_logps
        logps.sum().backward()
        return logps.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, exact = step()
    found, gradients = step(kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    for own, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0.03 * float(other.abs().max()) + 1e-4)
