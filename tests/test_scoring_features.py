"""Pooled features: what is kept, whose top k, and looking activations up in a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpo.scoring import features
from fpo.scoring.features import (
    ColumnSet,
    SparseRows,
    look_up,
    policy_top,
    pool_top_features,
    reference_top,
    sparse_rows,
    union,
)
from fpo.scoring.sae import Sae, SaeArrays, SaeFacts, TokenGrid, owners


def relu_identity(size: int = 5) -> Sae:
    """An SAE whose features are the positive parts of its inputs: feature j is max(x_j, 0)."""
    facts = SaeFacts(size, size, "relu", "test", None, None, False)
    return Sae(SaeArrays(facts, np.eye(size, dtype=np.float32), np.zeros(size, np.float32), "relu", "none"))


# Two completions of two and one tokens; pooled features [2, 0, 1, 3, 0.5] and [0, 4, 0, 0, 1].
RESIDUAL = torch.tensor([[4.0, -1, 0, 6, 1], [-9.0, 0, 2, 0, 0], [-1.0, 4, -2, 0, 1]])
LENGTHS = torch.tensor([2, 1])


def test_top_features_are_the_largest_means_in_ascending_order() -> None:
    kept = pool_top_features(relu_identity(), RESIDUAL, LENGTHS, 2)
    assert kept.indices.tolist() == [0, 3, 1, 4]
    assert kept.acts.tolist() == [2.0, 3.0, 4.0, 1.0]
    assert kept.counts.tolist() == [2, 2]
    assert kept.active.tolist() == [4, 2]
    assert kept.tail_sq.tolist() == [1.25, 0.0]


@pytest.mark.parametrize("top_k", ["all", 2])
def test_a_completion_of_which_no_token_counts_has_no_features(top_k: int | str) -> None:
    """The two completions with empty ones before, between and behind them."""
    lengths = torch.tensor([0, 2, 0, 0, 1, 0])
    kept = pool_top_features(relu_identity(), RESIDUAL, lengths, top_k)  # type: ignore[arg-type]
    alone = pool_top_features(relu_identity(), RESIDUAL, LENGTHS, top_k)  # type: ignore[arg-type]
    assert kept.indices.tolist() == alone.indices.tolist()
    assert kept.acts.tolist() == alone.acts.tolist()
    for name in ("counts", "active", "tail_sq"):
        one, other = getattr(alone, name).tolist()
        assert getattr(kept, name).tolist() == [0, one, 0, 0, other, 0], name
    top = policy_top(relu_identity(), RESIDUAL, lengths, 3)
    assert top.valid.any(1).tolist() == [False, True, False, False, True, False]
    columns = relu_identity().pooled_columns(RESIDUAL, lengths.tolist(), torch.zeros(6, 1, dtype=torch.long))
    assert columns[:, 0].tolist() == [0, 2.0, 0, 0, 0, 0]


def test_a_batch_of_no_counted_token_and_one_of_no_completion_have_no_features() -> None:
    for lengths in (torch.tensor([0, 0]), torch.tensor([], dtype=torch.long)):
        kept = pool_top_features(relu_identity(), RESIDUAL[:0], lengths, 2)
        assert (kept.indices.tolist(), kept.acts.tolist()) == ([], [])
        assert kept.active.tolist() == kept.counts.tolist() == kept.tail_sq.tolist() == [0] * len(lengths)


@pytest.mark.parametrize("top_k", ["all", 5, 4])
def test_keeping_all_keeps_every_non_zero_feature_and_no_zero(top_k: int | str) -> None:
    kept = pool_top_features(relu_identity(), RESIDUAL, LENGTHS, top_k)  # type: ignore[arg-type]
    assert kept.indices.tolist() == [0, 2, 3, 4, 1, 4]
    assert kept.acts.tolist() == [2.0, 1.0, 3.0, 0.5, 4.0, 1.0]
    assert kept.tail_sq.tolist() == [0.0, 0.0]


def cached() -> SparseRows:
    """Rows {0: 2, 2: 1, 3: 3} and {1: 4} of five features, as a cache gives them."""
    return sparse_rows(
        np.array([0, 2, 3, 1], np.uint32), np.array([2, 1, 3, 4], np.float32), np.array([0, 3, 4], np.uint64)
    )


def test_the_references_top_k_is_smaller_where_fewer_features_are_active() -> None:
    top = reference_top(cached(), 2)
    assert [row[valid].tolist() for row, valid in zip(top.columns, top.valid, strict=True)] == [[3, 0], [1]]


def test_the_references_top_k_is_largest_first_with_the_lower_index_of_equal_ones_and_padded_to_the_widest() -> None:
    """Rows {1: 2, 4: 3, 6: 3, 9: 1}, none and {7: 5}; of the first, the third largest comes last."""
    indices, acts = np.array([1, 4, 6, 9, 7], np.uint32), np.array([2, 3, 3, 1, 5], np.float32)
    rows = sparse_rows(indices, acts, np.array([0, 4, 4, 5], np.uint64))
    top = reference_top(rows, 3)
    assert top.columns.tolist() == [[4, 6, 1], [0, 0, 0], [7, 0, 0]]
    assert top.acts.tolist() == [[3.0, 3.0, 2.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]
    assert top.valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert reference_top(rows, 1).columns.tolist() == [[4], [0], [7]]
    assert reference_top(rows, 50).columns.shape == (3, 4)
    nothing = sparse_rows(np.empty(0, np.uint32), np.empty(0, np.float32), np.zeros(3, np.uint64))
    assert reference_top(nothing, 3).columns.shape == (2, 0)


@given(st.lists(st.integers(0, 5)))
def test_a_grid_holds_every_token_once_in_the_row_of_its_completion(lengths: list[int]) -> None:
    grid = TokenGrid.of(np.array(lengths, np.int64))
    held = [row[shares > 0].tolist() for row, shares in zip(grid.places, grid.shares, strict=True)]
    assert held == [part.tolist() for part in torch.arange(sum(lengths)).split(lengths)] if lengths else held == []
    assert grid.places.numel() == 0 or 0 <= grid.places.min() <= grid.places.max() < sum(lengths)
    torch.testing.assert_close(grid.shares.sum(1), (grid.lengths > 0).float())
    assert [rows.tolist() for rows in owners(grid.lengths, sum(lengths)).split(lengths)] == [
        [row] * length for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_policys_top_k_is_the_same_in_blocks(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MEMORY_BUDGET", tokens * 5 * 4)
    test_the_policys_top_k_leaves_out_zeros()


def test_the_policys_top_k_leaves_out_zeros() -> None:
    top = policy_top(relu_identity(), RESIDUAL, LENGTHS, 3)
    assert [set(row[valid].tolist()) for row, valid in zip(top.columns, top.valid, strict=True)] == [
        {3, 0, 2},
        {1, 4},
    ]


def test_a_union_counts_a_shared_feature_once() -> None:
    first = ColumnSet(torch.tensor([[3, 0], [1, 0]]), torch.tensor([[True, True], [True, False]]))
    second = ColumnSet(torch.tensor([[0, 4], [0, 1]]), torch.tensor([[True, True], [True, True]]))
    both = union(first, second)
    found = [sorted(row[valid].tolist()) for row, valid in zip(both.columns, both.valid, strict=True)]
    assert found == [[0, 3, 4], [0, 1]]


def test_looking_up_gives_the_cached_activation_or_zero() -> None:
    found = look_up(cached(), torch.tensor([[3, 1, 4], [1, 3, 0]]), 5)
    assert found.tolist() == [[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    nothing = sparse_rows(np.empty(0, np.uint32), np.empty(0, np.float32), np.zeros(3, np.uint64))
    assert look_up(nothing, torch.tensor([[3], [1]]), 5).tolist() == [[0.0], [0.0]]
