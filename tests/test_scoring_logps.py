"""Log-probs of tokens: against log_softmax, chunked or not, soft-capped or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpo.scoring import logps as logps_module
from fpo.scoring.logps import sum_logps, token_logps
from fpo.scoring.packing import pack


class Capped(nn.Module):
    """A head as a family with soft-capped logits has it."""

    def __init__(self, head: nn.Linear, softcap: float) -> None:
        super().__init__()
        self.head, self.softcap = head, softcap

    def forward(self, hidden: Tensor) -> Tensor:
        return self.softcap * torch.tanh(self.head(hidden) / self.softcap)


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_is_said_of_all_logits_is_said_without_gradient(
    chunked: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits near 1000, where an entropy that is the difference of large numbers has lost three digits."""
    torch.manual_seed(0)
    head = nn.Linear(8, 31)
    head.bias.data += 1000
    hidden = torch.randn(13, 8, requires_grad=True)
    logits = head(hidden).detach()
    targets = torch.where(torch.arange(13) % 2 == 0, logits.argmax(-1), logits.argmin(-1))
    if chunked:
        monkeypatch.setattr(logps_module, "LOGITS_BUDGET_BYTES", 0)
        monkeypatch.setattr(logps_module, "CHUNK_BYTES", 7 * 31 * 4)
    monkeypatch.setattr(logps_module, "BLOCK_BYTES", 13 * 31 * 4 // blocks)
    found = token_logps(hidden, targets, head)
    found.logps.sum().backward()
    probabilities = logits.double().softmax(-1)
    torch.testing.assert_close(found.entropy, -(probabilities * probabilities.log()).sum(-1).float())
    torch.testing.assert_close(found.mean_logits, logits.mean(-1))
    assert found.is_top.tolist() == [1.0, 0.0] * 6 + [1.0]
    assert torch.equal(found.logps, logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1))
    assert not any(said.requires_grad for said in (found.entropy, found.mean_logits, found.is_top))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_log_probs_and_gradients_equal_log_softmax(
    chunked: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 31)
    hidden = torch.randn(13, 8, requires_grad=True)
    targets = torch.randint(31, (13,))
    weights = torch.randn(13)

    logits = head(hidden)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = capped.log_softmax(-1)[torch.arange(13), targets]
    grads = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight, head.bias])

    if chunked:  # three rows of 31 float32 logits at a time
        monkeypatch.setattr(logps_module, "LOGITS_BUDGET_BYTES", 0)
        monkeypatch.setattr(logps_module, "CHUNK_BYTES", 3 * 31 * 4)
    found = token_logps(hidden, targets, head if softcap is None else Capped(head, softcap), top=4, squares=True)
    found_grads = torch.autograd.grad((found.logps * weights).sum(), [hidden, head.weight, head.bias])

    torch.testing.assert_close(found.logps, expected)
    for one, other in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(one, other)
    best = capped.log_softmax(-1).topk(4)
    torch.testing.assert_close(found.top_logps, best.values)
    assert torch.equal(found.top_indices, best.indices)
    torch.testing.assert_close(found.log_sum_squares, capped.softmax(-1).square().sum(-1).log())
    assert not found.log_sum_squares.requires_grad


def test_chunks_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(8, 31)
    rows: list[int] = []
    head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    monkeypatch.setattr(logps_module, "LOGITS_BUDGET_BYTES", 0)
    monkeypatch.setattr(logps_module, "CHUNK_BYTES", 3 * 31 * 4)
    found = token_logps(torch.randn(13, 8, requires_grad=True), torch.zeros(13, dtype=torch.long), head)
    found.logps.sum().backward()
    assert found.log_sum_squares.shape == (0,)
    assert rows == [3, 3, 3, 3, 1] * 2 or sorted(rows) == sorted([3, 3, 3, 3, 1] * 2)


def test_sums_go_to_their_completion() -> None:
    """Completions of 2 and 1 tokens behind a prompt, and one of 1 token behind none, which is not scored."""
    groups = np.arange(5), np.array([0, 1, 3, 4, 4, 5]), np.array([2, 1])
    logps = torch.tensor([-1.0, -2.0, -4.0])
    assert sum_logps(logps, pack(*groups)).tolist() == [-3.0, -4.0, 0.0]
    masked = pack(*groups, score_mask=np.array([0, 1, 0], np.uint8))
    assert sum_logps(logps, masked).tolist() == [-2.0, 0.0, 0.0]
