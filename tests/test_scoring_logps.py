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
