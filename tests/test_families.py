"""
Every family in the layout that the check chooses for it: log-probs, hookpoints and gradients are those of separate
forwards, and docs/families.md says what was measured (`make test-families`; `make families` writes the page).
"""

from __future__ import annotations

import pytest
import torch
from family_models import CASES, PAGE, SHAPES, build, hookpoint, outcome, page
from tiny_groups import separate_forwards, some_groups
from torch import Tensor
from transformers import PreTrainedModel

from fpo.scoring import Layout, pack
from fpo.scoring.families import FamilyHead, adjusted_embeddings, path_of, text_decoder

pytestmark = pytest.mark.families

FOUND: dict[str, str] = {}
# What caps or scales the outputs of its output embeddings.
TWO_STEPS = {
    *("cohere", "cohere2", "cohere2_moe", "gemma2", "gemma3n_text", "granite", "granitemoe", "nanochat"),
    *("recurrent_gemma", "vaultgemma", "xlstm"),
}


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
    groups = some_groups(SHAPES)
    expected = separate_forwards(model, *groups, hookpoint(model))
    expected_grads = gradients(model, *expected)
    scores = model(**pack(*groups, Layout(FOUND[case]))._asdict())
    grads = gradients(model, scores.token_logps, scores.residuals[0])

    torch.testing.assert_close(scores.token_logps, expected[0], rtol=1e-4, atol=1e-4)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(scores.residuals[0], expected[1], rtol=0, atol=1e-5 * max(scale, 1.0))
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_head_in_two_steps_is_the_familys_own(case: str) -> None:
    model = build(case)
    decoder = path_of(model, text_decoder(model))
    adjusted = adjusted_embeddings(model, decoder)
    head, whole = FamilyHead(model, decoder, adjusted), FamilyHead(model, decoder, None)
    hidden = torch.randn(5, model.get_output_embeddings().weight.shape[1])
    assert torch.equal(head.adjust(head.project(hidden)), whole.project(hidden))
    assert (adjusted is not None) == (case in TWO_STEPS)


def test_the_page_says_what_was_measured() -> None:
    """Needs the outcomes of all cases, so it runs behind them."""
    if FOUND.keys() != CASES.keys():
        pytest.skip("only some families were measured")
    assert page(FOUND) == PAGE.read_text(encoding="utf-8"), "run make families"
