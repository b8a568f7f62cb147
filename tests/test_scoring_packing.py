"""A packed batch says what separate, unpadded forwards say: numbers, hookpoints and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, layer_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_causal_mask_function

from fpo.scoring.hookpoints import capture
from fpo.scoring.packing import attention_mask, pack
from fpo.scoring.scorer import install_scoring

# (prompt, chosen, rejected) token counts: very different lengths, one-token completions, a one-token prompt.
SHAPES = [(12, 20, 3), (1, 1, 6), (4, 1, 1), (7, 2, 18), (1, 5, 2)]


def some_pairs(shapes: list[tuple[int, int, int]] = SHAPES) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(shapes).ravel()
    ids = np.random.default_rng(1).integers(3, 97, sizes.sum()).astype(np.uint32)
    return ids, np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)


def separate_forwards(
    model: PreTrainedModel, ids: np.ndarray, splits: np.ndarray, hookpoint: str
) -> tuple[Tensor, Tensor]:
    """Log-probs and hookpoint outputs at the scored positions, one sequence at a time through transformers."""
    logps, residuals = [], []
    bounds = splits.astype(int)
    for pair in range(len(SHAPES)):
        start, chosen, rejected, end = bounds[3 * pair : 3 * pair + 4]
        for first, last in ((chosen, rejected), (rejected, end)):
            tokens = torch.tensor(np.concatenate([ids[start:chosen], ids[first:last]]).astype(np.int64))[None]
            with capture(model, [hookpoint]) as outputs:
                logits = type(model).forward(model, input_ids=tokens, use_cache=False).logits[0]
            prompt = chosen - start
            here = torch.arange(prompt - 1, tokens.shape[1] - 1)
            logps.append(logits[here].log_softmax(-1)[torch.arange(len(here)), tokens[0, prompt:]])
            residuals.append(outputs[hookpoint][0, here])
    return torch.cat(logps), torch.cat(residuals)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_forwards(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no soft-capped sdpa")
    model = tiny_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    hookpoint = layer_of(family)
    ids, splits = some_pairs()
    weights = torch.randn(sum(chosen + rejected for _, chosen, rejected in SHAPES))

    expected_logps, expected_residuals = separate_forwards(model, ids, splits, hookpoint)
    ((expected_logps * weights).sum() + expected_residuals.square().sum()).backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    install_scoring(model, (hookpoint,))
    packed = pack(ids, splits)
    scores = model(**packed._asdict())
    ((scores.token_logps * weights).sum() + scores.residuals[0].square().sum()).backward()

    torch.testing.assert_close(scores.token_logps, expected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.residuals[0], expected_residuals, rtol=1e-5, atol=1e-5)
    assert expected_grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected_grads:
            scale = float(expected_grads[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected_grads[name], rtol=0, atol=1e-5 * max(scale, 1.0))


def test_positions_restart_for_the_rejected_branch_and_first_tokens_share_their_predictor() -> None:
    """Prompt 10 11, chosen 20 21 22, rejected 30: one row of six tokens, padded to eight."""
    packed = pack(np.array([10, 11, 20, 21, 22, 30]), np.array([0, 2, 5, 6]), pad_id=0)
    assert packed.input_ids.tolist() == [[10, 11, 20, 21, 22, 30, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]]
    assert packed.pair.tolist() == [[0, 0, 0, 0, 0, 0, -1, -1]]
    assert packed.branch.tolist() == [[0, 0, 1, 1, 1, 2, 0, 0]]
    assert packed.predictors.tolist() == [1, 2, 3, 1]
    assert packed.targets.tolist() == [20, 21, 22, 30]
    assert packed.lengths.tolist() == [3, 1]
    assert packed.completion.tolist() == [0, 0, 0, 1]


def test_the_mask_hides_the_other_branch_and_what_the_family_does_not_reach() -> None:
    """Prompt a b, chosen c d, rejected e; window 2 by position id: e stands at position 2 beside b at 1."""
    packed = pack(np.arange(5), np.array([0, 2, 4, 5]))
    full = attention_mask(packed.pair, packed.branch, packed.position_ids)[0, 0, :5, :5].int().tolist()
    assert full == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    window_of_two = sliding_window_causal_mask_function(2)
    near = attention_mask(packed.pair, packed.branch, packed.position_ids, window_of_two)[0, 0, :5, :5].int().tolist()
    assert near == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_an_empty_prompt_leaves_the_first_token_of_each_completion_unscored() -> None:
    packed = pack(np.array([5, 6, 7, 8, 9]), np.array([0, 0, 3, 5]))
    assert packed.targets.tolist() == [6, 7, 9]
    assert packed.predictors.tolist() == [0, 1, 3]
    assert packed.lengths.tolist() == [2, 1]


def test_rows_are_filled_first_fit_up_to_the_longest_pair() -> None:
    """Sizes 8, 5, 3, 2, 2: the 5 takes the 3 beside it, the two 2s share the third row."""
    sizes = [(2, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1), (0, 1, 1)]
    packed = pack(*some_pairs(sizes))
    assert packed.input_ids.shape == (3, 8)
    assert [sorted(set(row.tolist())) for row in packed.pair] == [[0], [1, 2], [-1, 3, 4]]


def test_the_same_tokens_are_scored_whatever_else_is_in_the_batch() -> None:
    model = tiny_model("llama")
    install_scoring(model)
    ids, splits = some_pairs()
    together = model(**pack(ids, splits)._asdict()).token_logps
    alone = [
        model(**pack(ids[splits[3 * p] : splits[3 * p + 3]], splits[3 * p : 3 * p + 4] - splits[3 * p])._asdict())
        for p in range(len(SHAPES))
    ]
    torch.testing.assert_close(together, torch.cat([scores.token_logps for scores in alone]), rtol=1e-5, atol=1e-5)
