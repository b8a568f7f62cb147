"""A packed batch says what separate, unpadded forwards say: numbers, hookpoints and gradients."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_groups import separate_forwards, sequences, some_groups
from tiny_models import FAMILIES, layer_of, tiny_model
from transformers.masking_utils import sliding_window_causal_mask_function

from fpo.scoring.packing import Layout, Packed, attention_mask, pack
from fpo.scoring.scorer import install_scoring

# (prompt, completion, completion, ...) token counts: very different lengths, one-token completions, a one-token prompt.
SHAPES = [(12, 20, 3), (1, 1, 6), (4, 1, 1), (7, 2, 18), (1, 5, 2)]


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.MASKED])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_forwards(family: str, attention: str, layout: Layout) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no soft-capped sdpa")
    model = tiny_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    hookpoint = layer_of(family)
    groups = some_groups(SHAPES)
    weights = torch.randn(sum(chosen + rejected for _, chosen, rejected in SHAPES))

    expected_logps, expected_residuals = separate_forwards(model, *groups, hookpoint)
    ((expected_logps * weights).sum() + expected_residuals.square().sum()).backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    install_scoring(model, (hookpoint,))
    packed = pack(*groups, layout)
    assert packed.layout is layout
    scores = model(**packed._asdict())
    ((scores.token_logps * weights).sum() + scores.residuals[0].square().sum()).backward()

    torch.testing.assert_close(scores.token_logps, expected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.residuals[0], expected_residuals, rtol=1e-5, atol=1e-5)
    assert expected_grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected_grads:
            scale = float(expected_grads[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected_grads[name], rtol=0, atol=1e-5 * max(scale, 1.0))


def test_positions_restart_for_every_completion_and_first_tokens_share_their_predictor() -> None:
    """Prompt 10 11, completions 20 21 22, 30 and 40 41: one row of eight tokens."""
    packed = pack(np.array([10, 11, 20, 21, 22, 30, 40, 41]), np.array([0, 2, 5, 6, 8]), np.array([3]), prompts=True)
    assert packed.layout is Layout.PACKED
    assert packed.input_ids.tolist() == [[10, 11, 20, 21, 22, 30, 40, 41]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 2, 3]]
    assert packed.group.tolist() == [[0] * 8]
    assert packed.branch.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]
    assert packed.branch.dtype == torch.int16
    assert packed.predictors.tolist() == [1, 2, 3, 1, 1, 6]
    assert packed.targets.tolist() == [20, 21, 22, 30, 40, 41]
    assert (packed.lengths.tolist(), packed.completion.tolist()) == ([3, 1, 2], [0, 0, 0, 1, 2, 2])
    assert (packed.prompt_predictors.tolist(), packed.prompt_lengths.tolist()) == ([0], [1])


def test_rows_hold_the_prompt_before_each_completion() -> None:
    """The same three completions, then a group of the prompt 50 51 52 and the completion 60."""
    ids = np.array([10, 11, 20, 21, 22, 30, 40, 41, 50, 51, 52, 60])
    rows = pack(ids, np.array([0, 2, 5, 6, 8, 11, 12]), np.array([3, 1]), Layout.ROWS, prompts=True, pad_id=0)
    assert rows.layout is Layout.ROWS
    assert [row[:5] for row in rows.input_ids.tolist()] == [
        [10, 11, 20, 21, 22],
        [10, 11, 30, 0, 0],
        [10, 11, 40, 41, 0],
        [50, 51, 52, 60, 0],
    ]
    assert rows.position_ids.tolist() == [list(range(8))] * 4
    assert (rows.group.tolist(), rows.branch.tolist()) == ([[0], [0], [0], [1]], [[1], [2], [3], [1]])
    assert rows.predictors.tolist() == [1, 2, 3, 8 + 1, 16 + 1, 16 + 2, 24 + 2]
    assert rows.targets.tolist() == [20, 21, 22, 30, 40, 41, 60]
    assert rows.lengths.tolist() == [3, 1, 2, 1]
    assert (rows.prompt_predictors.tolist(), rows.prompt_lengths.tolist()) == ([0, 24, 25], [1, 2])


def test_padding_is_of_no_group() -> None:
    packed = pack(np.array([10, 11, 20, 30]), np.array([0, 2, 3, 4]), np.array([2]), Layout.MASKED, pad_id=9)
    assert packed.input_ids.tolist() == [[10, 11, 20, 30, 9, 9, 9, 9]]
    assert packed.group.tolist() == [[0, 0, 0, 0, -1, -1, -1, -1]]
    assert packed.branch.tolist() == [[0, 0, 1, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("layout", "tokens", "padding"),
    [(Layout.PACKED, 6 + 12, 0), (Layout.MASKED, 6 + 12, 14), (Layout.ROWS, (5 + 3) + (11 + 9), 36)],
)
def test_tokens_are_counted_without_their_padding(layout: Layout, tokens: int, padding: int) -> None:
    """Prompts of 2 and 8, completions of 3 and 1, of 3 and 1: in rows a prompt counts with each completion."""
    packed = pack(*some_groups([(2, 3, 1), (8, 3, 1)]), layout)
    assert packed.input_ids.numel() == tokens + padding
    assert packed.n_tokens == tokens


def test_the_mask_hides_the_other_branches_and_what_the_family_does_not_reach() -> None:
    """Prompt a b, completions c d, e and f; window 2 by position id: e and f stand at position 2 beside b at 1."""
    packed = pack(np.arange(6), np.array([0, 2, 4, 5, 6]), np.array([3]), Layout.MASKED)
    facts = packed.group, packed.branch, packed.position_ids
    full = attention_mask(*facts)[0, 0, :6, :6].int().tolist()
    assert full == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    near = attention_mask(*facts, sliding_window_causal_mask_function(2))[0, 0, :6, :6].int().tolist()
    assert near == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("layout", Layout)
def test_an_empty_prompt_leaves_the_first_token_of_each_completion_unscored(layout: Layout) -> None:
    """Completions 5 6 7, 8 9 and 4; the group behind it is one completion of one token, of which nothing is scored."""
    groups = np.array([5, 6, 7, 8, 9, 4, 3]), np.array([0, 0, 3, 5, 6, 6, 7]), np.array([3, 1])
    packed = pack(*groups, layout, prompts=True)
    assert packed.targets.tolist() == [6, 7, 9]
    assert packed.lengths.tolist() == packed.counts.tolist() == [2, 1, 0, 0]
    assert (packed.prompt_lengths.tolist(), packed.prompt_predictors.tolist()) == ([0, 0], [])
    assert packed.predictors.tolist() == ([0, 1, 8] if layout is Layout.ROWS else [0, 1, 3])


@pytest.mark.parametrize("layout", Layout)
def test_the_layout_shows_in_the_shapes_of_the_smallest_batches(layout: Layout) -> None:
    """One completion of one token, and no group at all."""
    one = pack(np.array([7]), np.array([0, 0, 1]), np.array([1]), layout)
    none = pack(np.array([], np.uint32), np.array([0]), np.array([], np.uint32), layout)
    # No group leaves a row of padding, which is under a mask.
    assert (one.layout, none.layout) == (layout, Layout.MASKED if layout is Layout.PACKED else layout)
    assert (len(one.targets), one.lengths.tolist(), one.counts.tolist()) == (0, [0], [0])
    assert bool((none.group == -1).all())
    assert len(none.lengths) == len(none.counted) == 0


def test_rows_are_filled_first_fit_up_to_the_longest_group() -> None:
    """Sizes 8, 5, 3, 2, 2: the 5 takes the 3 beside it, the two 2s share the third row."""
    sizes = [(2, 1, 1, 1, 3), (1, 4), (1, 1, 1), (0, 1, 1), (1, 1)]
    packed = pack(*some_groups(sizes), Layout.MASKED)
    assert packed.input_ids.shape == (3, 8)
    assert [sorted(set(row.tolist())) for row in packed.group] == [[0], [1, 2], [-1, 3, 4]]


def test_the_score_mask_says_which_scored_tokens_count() -> None:
    """Scored tokens 6 7 | 9 of completions 5 6 7 and 8 9 behind an empty prompt, then 2 | 3 4 behind the prompt 1."""
    groups = np.array([5, 6, 7, 8, 9, 1, 2, 3, 4]), np.array([0, 0, 3, 5, 6, 7, 9]), np.array([2, 2])
    packed = pack(*groups, score_mask=np.array([0, 1, 0, 1, 1, 1], np.uint8))
    assert packed.targets.tolist() == [6, 7, 9, 2, 3, 4]
    assert packed.lengths.tolist() == [2, 1, 1, 2]
    assert (packed.counted.tolist(), packed.counts.tolist()) == ([1, 3, 4, 5], [1, 0, 1, 2])
    assert packed.counting(packed.targets).tolist() == [7, 2, 3, 4]
    everything = pack(*groups)
    assert (everything.counted.tolist(), everything.counts.tolist()) == ([0, 1, 2, 3, 4, 5], [2, 1, 1, 2])
    assert everything.counting(everything.targets) is everything.targets


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    ids, splits, n_completions = some_groups([(2, 3, 1)])
    with pytest.raises(ValueError, match="the score mask has 3 entries, the groups have 4 scored tokens"):
        pack(ids, splits, n_completions, score_mask=np.ones(3, np.uint8))
    with pytest.raises(ValueError, match="1 groups of 3 completions have 5 splits, not 4"):
        pack(ids, splits, np.array([3]))


def seen_by(packed: Packed, flat: int) -> list[tuple[int, int]]:
    """(position, token) of everything that the token at this flat position looks at, itself included."""
    width = packed.input_ids.shape[1]
    row, column = divmod(flat, width)
    if packed.layout is Layout.ROWS:
        seen = torch.arange(width) <= column
    else:
        seen = attention_mask(packed.group, packed.branch, packed.position_ids)[row, 0, column]
    return sorted(zip(packed.position_ids[row, seen].tolist(), packed.input_ids[row, seen].tolist(), strict=True))


ragged = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 5), min_size=1, max_size=9)).map(lambda g: (g[0], *g[1])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(shapes=ragged, layout=st.sampled_from(Layout), draw=st.randoms(use_true_random=False))
def test_every_token_is_predicted_by_its_own_prompt_and_completion_alone(
    shapes: list[tuple[int, ...]], layout: Layout, draw: Random
) -> None:
    ids, splits, n_completions = some_groups(shapes)
    expected, lengths, prompts = [], [], {}
    for group, tokens, prompt in sequences(ids, splits, n_completions):
        behind = tokens.tolist()
        scored = range(max(prompt, 1), len(behind))
        expected += [(list(enumerate(behind[:place])), behind[place]) for place in scored]
        lengths.append(len(scored))
        prompts[group] = [list(enumerate(behind[:place])) for place in range(1, prompt)]
    mask = np.array([draw.random() < 0.5 for _ in expected], np.uint8)

    packed = pack(ids, splits, n_completions, layout, score_mask=mask, prompts=True)
    found = zip(packed.predictors.tolist(), packed.targets.tolist(), strict=True)
    assert [(seen_by(packed, at), target) for at, target in found] == expected
    assert packed.lengths.tolist() == lengths
    asked = [seen_by(packed, at) for at in packed.prompt_predictors.tolist()]
    assert asked == [context for group in prompts.values() for context in group]
    assert packed.prompt_lengths.tolist() == [len(group) for group in prompts.values()]
    assert packed.counted.tolist() == np.flatnonzero(mask).tolist()
    assert packed.counts.tolist() == [int(part.sum()) for part in np.split(mask, np.cumsum(lengths)[:-1])]


def test_the_same_tokens_are_scored_whatever_else_is_in_the_batch() -> None:
    model = tiny_model("llama")
    install_scoring(model)
    ids, splits, n_completions = some_groups(SHAPES)
    together = model(**pack(ids, splits, n_completions)._asdict()).token_logps
    alone = [
        model(**pack(ids, splits[3 * group : 3 * group + 4], n_completions[:1])._asdict())
        for group in range(len(SHAPES))
    ]
    torch.testing.assert_close(together, torch.cat([scores.token_logps for scores in alone]), rtol=1e-5, atol=1e-5)
