"""Log-probs of tokens: against log_softmax, chunked or not, soft-capped or not; and what is kept of their logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fpo.scoring import logps as logps_module
from fpo.scoring.families import FamilyHead, adjusted_embeddings
from fpo.scoring.logps import sum_logps, token_logps
from fpo.scoring.packing import pack

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "head.py"


class Plain:
    """A linear layer as a head, soft-capped or not."""

    draws = False

    def __init__(self, linear: nn.Linear, softcap: float | None = None) -> None:
        self.linear, self.softcap = linear, softcap

    def row_bytes(self, hidden: Tensor) -> int:
        return 4 * self.linear.out_features

    def project(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.linear(hidden)
        return projected

    def adjust(self, projected: Tensor) -> Tensor:
        return projected if self.softcap is None else self.softcap * torch.tanh(projected / self.softcap)


def split_up(monkeypatch: pytest.MonkeyPatch, rows: int, row_bytes: int, budget: int = 0) -> None:
    """`rows` at a time where what all of them keep is beyond the budget."""
    monkeypatch.setattr(logps_module, "LOGITS_BUDGET_BYTES", budget)
    monkeypatch.setattr(logps_module, "CHUNK_BYTES", rows * row_bytes)


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_is_said_of_all_logits_is_said_without_gradient(
    chunked: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits near 1000, where an entropy that is the difference of large numbers has lost three digits."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 31)
    linear.bias.data += 1000
    hidden = torch.randn(13, 8, requires_grad=True)
    logits = linear(hidden).detach()
    targets = torch.where(torch.arange(13) % 2 == 0, logits.argmax(-1), logits.argmin(-1))
    if chunked:
        split_up(monkeypatch, 7, 31 * 4)
    monkeypatch.setattr(logps_module, "BLOCK_BYTES", 13 * 31 * 4 // blocks)
    found = token_logps(hidden, targets, Plain(linear))
    found.logps.sum().backward()
    probabilities = logits.double().softmax(-1)
    torch.testing.assert_close(found.entropy, -(probabilities * probabilities.log()).sum(-1).float())
    torch.testing.assert_close(found.log_sum_squares, probabilities.square().sum(-1).log().float())
    torch.testing.assert_close(found.mean_logits, logits.mean(-1))
    assert found.is_top.tolist() == [1.0, 0.0] * 6 + [1.0]
    assert torch.equal(found.logps, logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1))
    said = (found.entropy, found.log_sum_squares, found.mean_logits, found.is_top, found.top_logps)
    assert not any(tensor.requires_grad for tensor in said)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_log_probs_and_gradients_equal_log_softmax(
    chunked: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 31)
    hidden = torch.randn(13, 8, requires_grad=True)
    columns = torch.randint(31, (13, 3))
    weights = torch.randn(13, 3)

    logits = linear(hidden)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = capped.log_softmax(-1).gather(1, columns)
    grads = torch.autograd.grad((expected * weights).sum(), [hidden, linear.weight, linear.bias])

    head = Plain(linear, softcap)
    if chunked:
        split_up(monkeypatch, 3, 31 * 4)
    monkeypatch.setattr(logps_module, "BLOCK_BYTES", 2 * 31 * 4)
    scored = token_logps(hidden, columns[:, 0], head, asked=columns[:, 1:], top=4)
    found = torch.cat([scored.logps[:, None], scored.asked_logps], dim=1)
    found_grads = torch.autograd.grad((found * weights).sum(), [hidden, linear.weight, linear.bias])

    torch.testing.assert_close(found, expected)
    for one, other in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(one, other)
    best = capped.log_softmax(-1).topk(4)
    torch.testing.assert_close(scored.top_logps, best.values)
    assert torch.equal(scored.top_indices, best.indices)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_chunks_never_hold_all_logits(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits the budget to the byte is kept; without gradient nothing is, and the budget does not count."""
    linear = nn.Linear(8, 31)
    hidden, targets = torch.randn(13, 8), torch.zeros(13, dtype=torch.long)
    rows: list[int] = []
    linear.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for budget in (13 * 31 * 4, 13 * 31 * 4 - 1):
        split_up(monkeypatch, 3, 31 * 4, budget)
        rows.clear()
        with mode():
            logps = token_logps(hidden, targets, Plain(linear)).logps
        if logps.requires_grad:
            logps.sum().backward()
        kept = mode is torch.enable_grad and budget == 13 * 31 * 4
        assert rows[:5] == ([13] if kept else [3, 3, 3, 3, 1])
        assert sorted(rows[5:]) == ([1, 3, 3, 3, 3] if logps.requires_grad and not kept else [])


def family_head(family: str, **overrides: object) -> FamilyHead:
    model = tiny_model(family, **overrides)
    decoder = {"gpt2": "transformer"}.get(family, "model")
    return FamilyHead(model, decoder, adjusted_embeddings(model, decoder))


def peft_head(**settings: Any) -> FamilyHead:
    """Gemma-2's soft-capped head, adapted or trained beside an adapter."""
    head = family_head("gemma2", tie_word_embeddings=False)
    torch.manual_seed(1)
    adapted = get_peft_model(head.model, LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5, **settings))
    adapted.eval()
    return head


HEADS = {
    "plain": lambda: family_head("llama"),
    "soft-capped": lambda: family_head("gemma2"),
    "soft-capped, by autograd": lambda: FamilyHead(tiny_model("gemma2"), "model", None),
    "lora": lambda: peft_head(target_modules=["lm_head"]),
    "dora": lambda: peft_head(target_modules=["lm_head"], use_dora=True),
    "modules_to_save": lambda: peft_head(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [name for name in HEADS if "autograd" not in name])
def test_the_budget_counts_what_autograd_keeps(name: str, autocast: bool) -> None:
    head, hidden = HEADS[name](), torch.randn(64, 32, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (64, 97):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        counted = head.row_bytes(hidden)
        token_logps(hidden, torch.zeros(64, dtype=torch.long), head)
    assert sum(tensor.nbytes for tensor in kept.values()) == 64 * counted
    assert counted == (3 if name == "dora" else 1) * 97 * (2 if autocast else 4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_log_probs_and_gradients_are_those_of_the_familys_own_forward(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs bit by bit where no product has other rows; under autocast each chunk's weight gradient is rounded."""
    head = HEADS[name]()
    hidden, targets, weights = torch.randn(13, 32, requires_grad=True), torch.randint(97, (13,)), torch.randn(13)
    trained = [hidden, *(p for p in head.model.get_output_embeddings().parameters() if p.requires_grad)]

    def both(score: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = score()
        return logps.detach(), *torch.autograd.grad((logps * weights).sum(), trained)

    def own() -> Tensor:
        logits = FamilyHead(head.model, head._child, None).project(hidden).float()
        return (logits.gather(-1, targets[:, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]

    expected, *expected_grads = both(own)
    for chunked in (False, True):
        if chunked:
            split_up(monkeypatch, 3, head.row_bytes(hidden))
        found, *grads = both(lambda: token_logps(hidden, targets, head).logps)
        if not chunked:
            assert torch.equal(found, expected)
        for one, other in zip(grads, expected_grads, strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=scale * (2**-6 if autocast else 1e-5))


class Behind(LlamaForCausalLM):
    """A Llama that makes logits of its head's outputs and of something else, as `kind` says."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.kind = ""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        given = self.lm_head(hidden)
        made = {
            "a learned factor": lambda: given * self.scale,
            "the hidden states": lambda: given * hidden.sum(-1, keepdim=True),
            "a second call": lambda: given + self.lm_head(hidden).square(),
            "in place": lambda: given.mul_(3),
        }
        return CausalLMOutput(logits=made[self.kind]())


@pytest.mark.parametrize("kind", ["a learned factor", "the hidden states", "a second call", "in place"])
def test_a_head_that_takes_more_than_its_outputs_is_left_to_autograd(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Behind(tiny_model("llama").config)
    model.kind = kind
    head = FamilyHead(model, "model", adjusted_embeddings(model, "model"))
    hidden, targets = torch.randn(13, 32, requires_grad=True), torch.randint(97, (13,))
    trained = [hidden, model.lm_head.weight, *([model.scale] if kind == "a learned factor" else [])]
    logits = model.lm_head(hidden)
    factor = {"a learned factor": model.scale, "the hidden states": hidden.sum(-1, keepdim=True), "in place": 3}
    logits = logits + logits.square() if kind == "a second call" else logits * factor[kind]
    expected = torch.autograd.grad(logits.log_softmax(-1).gather(-1, targets[:, None]).sum(), trained)
    split_up(monkeypatch, 3, head.row_bytes(hidden))
    found = torch.autograd.grad(token_logps(hidden, targets, head).logps.sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_head_that_drops_inputs_drops_the_same_again_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    head = peft_head(target_modules=["lm_head"])
    assert not head.draws
    head.model.train()
    assert head.draws
    split_up(monkeypatch, 5, 97 * 4)
    given: list[Tensor] = []
    head.model.lm_head.register_forward_hook(lambda module, args, output: given.append(output.detach()))
    found = token_logps(torch.randn(10, 32, requires_grad=True), torch.zeros(10, dtype=torch.long), head)
    first, second = given
    found.logps.sum().backward()
    again_second, again_first = given[-2:]
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)


def peak(*arguments: str) -> int:
    """MiB that forward and backward of a head need above what stood there before, in a process of their own."""
    command = [sys.executable, str(BENCHMARK), "--rounds", "1", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.long
def test_memory_is_bounded_where_logits_are_not() -> None:
    """
    1024 x 64000 float32 logits are 250 MiB, which log_softmax behind a soft cap holds four times. Here: a chunk of
    16 MiB and its gradient, two weight gradients of 4 MiB, and what libraries make on their first call.
    """
    head = ["--vocabulary", "64000", "--tokens", "1024", "--hidden", "16", "--softcap", "30"]
    assert peak(*head, "--budget", "32", "--chunk", "16") < 300


@pytest.mark.long
def test_8192_tokens_of_a_256k_vocabulary_stay_below_1_gib() -> None:
    """Logits of 7.8 GiB, which log_softmax and its gradient hold three times; here a chunk of 256 MiB and its own."""
    assert peak("--vocabulary", "256000", "--tokens", "8192", "--hidden", "8") < 1024


def test_sums_go_to_their_completion() -> None:
    """Completions of 2 and 1 tokens behind a prompt, and one of 1 token behind none, which is not scored."""
    groups = np.arange(5), np.array([0, 1, 3, 4, 4, 5]), np.array([2, 1])
    logps = torch.tensor([-1.0, -2.0, -4.0])
    assert sum_logps(logps, pack(*groups)).tolist() == [-3.0, -4.0, 0.0]
    masked = pack(*groups, score_mask=np.array([0, 1, 0], np.uint8))
    assert sum_logps(logps, masked).tolist() == [-2.0, 0.0, 0.0]
