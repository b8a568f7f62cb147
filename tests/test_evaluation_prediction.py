"""How well the preference is told: the fit, the AUC, and folds that keep prompts together."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from feature_pairs import pairs_of

from fpo.evaluation import prediction
from fpo.evaluation.gaps import feature_gaps
from fpo.evaluation.pairs import read_gaps, read_pairs
from fpo.evaluation.prediction import (
    Design,
    accuracy,
    auc,
    common_features,
    feature_design,
    fit,
    fold_of,
    length_design,
    predicted,
    predictions,
    sampled_pairs,
)


def design_of(dense: np.ndarray, weight: np.ndarray | None = None, prompt: np.ndarray | None = None) -> Design:
    row, column = np.nonzero(dense)
    P = len(dense)
    weight = np.ones(P) if weight is None else weight
    return Design(row, column, dense[row, column], weight, np.arange(P) if prompt is None else prompt, dense.shape[1])


@pytest.mark.parametrize("dense", [True, False])
def test_a_fit_is_the_minimum_of_its_loss(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gradient of sum w softplus(-X b) + penalty |b|^2 / 2, by autograd on dense numbers, is 0."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(prediction, "MOST_DENSE", 400 if dense else 399)
    rows, weight = rng.normal(0, 1, (80, 5)) + 0.2, rng.integers(1, 4, 80).astype(float)
    b = torch.from_numpy(fit(design_of(rows, weight), 3.0, tolerance=1e-5)).requires_grad_()
    scores = torch.from_numpy(rows) @ b
    loss = (torch.from_numpy(weight) * torch.nn.functional.softplus(-scores)).sum() + 3.0 * b.square().sum() / 2
    loss.backward()
    assert b.grad is not None
    assert b.grad.abs().max() < 1e-3
    assert b.detach().abs().max() > 0.1


def test_an_auc_is_the_share_of_ordered_pairs_by_hand() -> None:
    """Scores 3 1 -2 0, both orders: the positives 3 1 -2 0 against the negatives -3 -1 2 0, one by one."""
    scores = np.array([3.0, 1.0, -2.0, 0.0])
    shares = [float(s > -t) + float(s == -t) / 2 for s, t in product(scores, scores)]
    found = auc(scores, np.ones(4), np.arange(4))
    assert found.value == pytest.approx(np.mean(shares))
    assert accuracy(scores, np.ones(4), np.arange(4)).value == pytest.approx(2.5 / 4)


def test_a_weight_of_two_is_a_pair_twice() -> None:
    scores, twice = np.array([0.5, -0.2, 1.0]), np.array([0.5, -0.2, -0.2, 1.0])
    weighted = auc(scores, np.array([1.0, 2.0, 1.0]), np.arange(3))
    repeated = auc(twice, np.ones(4), np.array([0, 1, 1, 2]))
    assert weighted == pytest.approx(repeated)


def test_an_interval_of_the_auc_is_as_wide_as_its_errors_are() -> None:
    """Of 300 samples of 200 scores ~ N(0.7, 1): P(s + t > 0) = Phi(1.4 / sqrt(2)) = 0.8389 is inside 95 % of them."""
    rng = np.random.default_rng(1)
    found = [auc(rng.normal(0.7, 1, 200), np.ones(200), np.arange(200)) for _ in range(300)]
    inside = np.mean([one.low <= 0.8389 <= one.high for one in found])
    assert abs(inside - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 300)


def test_folds_that_split_prompts_are_optimistic_and_ours_are_not() -> None:
    """
    Prompts of four pairs each. What a pair's sides differ by is the prompt's own direction, and which side is preferred
    was tossed once per prompt: nothing general is there to learn, but who has seen a prompt's other pairs knows it.
    """
    rng = np.random.default_rng(2)
    prompt = np.repeat(np.arange(100), 4)
    own = np.zeros((100, 100))
    own[np.arange(100), np.arange(100)] = rng.choice([-1.0, 1.0], 100)
    design = design_of(own[prompt] * rng.uniform(0.5, 1, (400, 1)), prompt=prompt)
    grouped = predicted(design, fold_of(prompt)).auc
    ungrouped = predicted(design, rng.permutation(400) % 5).auc
    assert ungrouped.value > 0.95
    assert grouped.low <= 0.5 <= grouped.high


def test_no_prompt_stands_in_two_folds() -> None:
    prompt = np.random.default_rng(3).integers(0, 30, 200)
    folds = fold_of(prompt)
    assert len(set(zip(prompt.tolist(), folds.tolist(), strict=True))) == len(set(prompt.tolist()))
    assert set(folds.tolist()) == set(range(5))


def test_features_length_and_both_tell_what_is_in_them() -> None:
    """Feature 2 and the length each know a part of the preference; together they know more than either."""
    rng = np.random.default_rng(4)
    acts = rng.random((600, 2, 8))
    acts[:, 0, 2] += 0.5
    tokens = rng.integers(10, 30, (600, 2))
    tokens[:, 0] += 6
    cache = pairs_of(acts.astype(np.float32), None, tokens, shards=3)
    pairs = read_pairs(cache)
    (gaps,) = feature_gaps(cache, 0, 8, [pairs])
    rows = sampled_pairs(pairs)
    design = feature_design(read_gaps(cache, 0, pairs), pairs, rows, common_features(gaps.n_fired))
    found = predictions(design, length_design(pairs, rows))
    assert (found.n_pairs, found.n_features) == (600, 8)
    assert 0.75 < found.length.auc.value < found.both.auc.value
    assert 0.75 < found.features.auc.value < found.both.auc.value < 1


def test_features_that_never_fire_tell_nothing() -> None:
    cache = pairs_of(np.zeros((30, 2, 4), np.float32))
    pairs = read_pairs(cache)
    rows = sampled_pairs(pairs)
    design = feature_design(read_gaps(cache, 0, pairs), pairs, rows, common_features(np.zeros(4, np.int64)))
    found = predictions(design, length_design(pairs, rows))
    assert found.features.auc == found.length.auc == (0.5, 0.5, 0.5)


def test_a_design_holds_the_gaps_of_what_was_asked_for() -> None:
    rng = np.random.default_rng(5)
    acts = (rng.random((30, 2, 6)) * (rng.random((30, 2, 6)) < 0.5)).astype(np.float32)
    cache = pairs_of(acts, rng.integers(0, 12, 30), shards=4)
    pairs = read_pairs(cache)
    rows, features = sampled_pairs(pairs, 20), np.array([1, 4])
    design = feature_design(read_gaps(cache, 0, pairs), pairs, rows, features)
    dense = np.zeros((len(rows), 2))
    dense[design.row, design.column] = design.value
    np.testing.assert_allclose(dense, (acts[:, 0] - acts[:, 1])[rows][:, features], atol=1e-7)


def test_a_sample_is_of_whole_prompts() -> None:
    rng = np.random.default_rng(6)
    pairs = read_pairs(pairs_of(np.ones((90, 2, 1), np.float32), rng.integers(0, 30, 90)))
    rows = sampled_pairs(pairs, 40)
    assert 20 < len(rows) <= 40
    taken = set(pairs.prompt[rows].tolist())
    assert len(rows) == sum(prompt in taken for prompt in pairs.prompt.tolist())
    assert sampled_pairs(pairs, 90).tolist() == list(range(90))
