"""
Every family in the layout that the check chooses for it: log-probs, hookpoints and gradients are those of separate
forwards, and docs/families.md says what was measured (`make test-families`; `make families` writes the page).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import CASES, PAGE, SHAPES, build, hookpoint, outcome, page, pairs
from torch import Tensor
from transformers import PreTrainedModel

from fpo.scoring import Layout, pack
from fpo.scoring.hookpoints import capture

pytestmark = pytest.mark.families

FOUND: dict[str, str] = {}


def separate(model: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """Log-probs and hookpoint outputs at the scored positions, one unpadded sequence at a time through transformers."""
    ids, splits = pairs()
    logps, residuals = [], []
    for row, (prompt, _, _) in enumerate(SHAPES):
        start, chosen, rejected, end = splits[3 * row : 3 * row + 4]
        for first, last in ((chosen, rejected), (rejected, end)):
            tokens = torch.tensor(np.concatenate([ids[start:chosen], ids[first:last]]).astype(np.int64))
            with capture(model, [name]) as outputs:
                logits = type(model).forward(model, input_ids=tokens[None], use_cache=False).logits[0].float()
            at = torch.arange(max(prompt, 1), len(tokens))
            logps.append(logits[at - 1].log_softmax(-1)[torch.arange(len(at)), tokens[at]])
            residuals.append(outputs[name][0, at - 1])
    return torch.cat(logps), torch.cat(residuals)


def gradients(model: PreTrainedModel, logps: Tensor, residuals: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    ((logps * weights).sum() + residuals.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_family_is_measured_as_by_separate_forwards_or_refused(case: str) -> None:
    model = build(case)
    FOUND[case] = outcome(model)
    if FOUND[case].startswith("refused: "):
        return
    expected = separate(model, hookpoint(model))
    expected_grads = gradients(model, *expected)
    ids, splits = pairs()
    scores = model(**pack(ids, splits, Layout(FOUND[case]))._asdict())
    grads = gradients(model, scores.token_logps, scores.residuals[0])

    torch.testing.assert_close(scores.token_logps, expected[0], rtol=1e-4, atol=1e-4)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(scores.residuals[0], expected[1], rtol=0, atol=1e-5 * max(scale, 1.0))
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}")


def test_the_page_says_what_was_measured() -> None:
    """Needs the outcomes of all cases, so it runs behind them."""
    if FOUND.keys() != CASES.keys():
        pytest.skip("only some families were measured")
    assert page(FOUND) == PAGE.read_text(encoding="utf-8"), "run make families"
