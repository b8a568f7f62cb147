"""Gaps of features: against the formulas written out, and against chance in simulated caches."""

from __future__ import annotations

import numpy as np
import pytest
from feature_pairs import MemoryCache, pairs_of
from store_cases import World, make_groups

from fpo.errors import DataError
from fpo.evaluation import gaps as gaps_module
from fpo.evaluation.gaps import Gaps, feature_gaps
from fpo.evaluation.pairs import Pairs, read_pairs
from fpo.evaluation.significance import false_discovery, normal_score, t_quantile, two_sided
from fpo.store import open_cache

F = 12


def gaps_of(cache: MemoryCache, d_sae: int = F) -> Gaps:
    (found,) = feature_gaps(cache, 0, d_sae, [read_pairs(cache)])
    return found


def some_acts(P: int, seed: int = 0, d_sae: int = F) -> np.ndarray:
    """Every feature fires on two of five sides, alike on both."""
    rng = np.random.default_rng(seed)
    return (rng.random((P, 2, d_sae)) * (rng.random((P, 2, d_sae)) < 0.4)).astype(np.float32)


def summed_by(prompt: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.array([values[prompt == one].sum(0) for one in np.unique(prompt)])


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("held", [2**24, 150], ids=["one round", "several rounds"])
def test_gaps_are_those_of_the_formulas(shards: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, shared prompts, lengths: dense matrices and the normal equations instead of sums over entries."""
    monkeypatch.setattr(gaps_module, "HELD_ENTRIES", held)
    rng = np.random.default_rng(1)
    P, acts = 200, some_acts(200)
    prompt, tokens, weight = rng.integers(0, 80, P), rng.integers(1, 30, (P, 2)), rng.integers(1, 4, P)
    found = gaps_of(pairs_of(acts, prompt, tokens, weight, shards=shards))
    gap, w = acts[:, 0].astype(np.float64) - acts[:, 1], weight / weight.sum()
    C = len(np.unique(prompt))

    D = w @ gap
    np.testing.assert_allclose(found.gap.value, D, rtol=1e-9)
    error = np.sqrt(C / (C - 1) * (summed_by(prompt, w[:, None] * (gap - D)) ** 2).sum(0))
    np.testing.assert_allclose(found.gap.error, error, rtol=1e-9)
    n = 1 / (w**2).sum()
    np.testing.assert_allclose(found.effect, D / np.sqrt(w @ (gap - D) ** 2 * n / (n - 1)), rtol=1e-9)

    X = np.stack([np.ones(P), np.log(tokens[:, 0] / tokens[:, 1])], axis=1)
    inverse = np.linalg.inv(X.T @ (X * w[:, None]))
    level, slope = inverse @ X.T @ (gap * w[:, None])
    np.testing.assert_allclose(found.equal_length.value, level, rtol=1e-9)
    np.testing.assert_allclose(found.slope, slope, rtol=1e-9)
    influence = (X @ inverse[0] * w)[:, None] * (gap - X @ np.stack([level, slope]))
    error = np.sqrt(C / (C - 2) * (summed_by(prompt, influence) ** 2).sum(0))
    np.testing.assert_allclose(found.equal_length.error, error, rtol=1e-9)

    np.testing.assert_allclose(found.acts, np.einsum("p,psf->sf", w, acts), rtol=1e-6)
    np.testing.assert_allclose(found.fires, np.einsum("p,psf->sf", w, acts != 0), rtol=1e-9)
    either = (acts != 0).any(1)
    assert found.n_fired.tolist() == either.sum(0).tolist()
    assert found.n_prompts_fired.tolist() == (summed_by(prompt, either) > 0).sum(0).tolist()
    assert (found.n_pairs, found.n_prompts) == (P, C)


def test_halves_share_no_prompt_and_make_up_the_whole() -> None:
    acts = some_acts(60)
    cache = pairs_of(acts, np.repeat(np.arange(20), 3))
    pairs, found = read_pairs(cache), gaps_of(cache)
    half = pairs.half
    assert all(len(set(half[pairs.prompt == prompt])) == 1 for prompt in range(20))
    gap = acts[:, 0] - acts[:, 1]
    for one in (0, 1):
        np.testing.assert_allclose(found.halves[one], gap[half == one].mean(0), rtol=1e-5)
    assert (found.sign_holds == (np.sign(found.halves[0]) == np.sign(found.halves[1]))).all()


def test_some_of_the_pairs_are_told_as_if_the_others_were_not_there() -> None:
    rng = np.random.default_rng(2)
    acts, prompt, tokens = some_acts(90), rng.integers(0, 40, 90), rng.integers(1, 9, (90, 2))
    cache, rows = pairs_of(acts, prompt, tokens, shards=3), rng.random(90) < 0.5
    pairs = read_pairs(cache)
    whole, part = feature_gaps(cache, 0, F, [pairs, pairs.among(rows)])
    alone = gaps_of(pairs_of(acts[rows], prompt[rows], tokens[rows]))
    for name in ("value", "error", "z"):
        np.testing.assert_allclose(getattr(part.gap, name), getattr(alone.gap, name), rtol=1e-7)
        np.testing.assert_allclose(getattr(part.equal_length, name), getattr(alone.equal_length, name), rtol=1e-7)
    np.testing.assert_array_equal(part.n_prompts_fired, alone.n_prompts_fired)
    np.testing.assert_allclose(whole.gap.value, gaps_of(cache).gap.value)


def test_a_group_of_several_counts_as_one_pair_does() -> None:
    """Three completions with activations 5, 1, 3 make the gaps 4 and 2, a half each; beside a pair with gap 7: 5."""
    groups = make_groups([(2, (3, 3, 3)), (2, (3, 3))])
    acts = np.array([[5.0], [1.0], [3.0], [7.0], [0.0]], np.float32)
    cache = _with_acts(groups, acts)
    found = gaps_of(cache, 1)
    assert found.n_pairs == 3
    assert found.n_prompts == 2
    weight = cache.shard(0).weight
    assert found.gap.value[0] == pytest.approx((3 * weight[0] + 7 * weight[1]) / weight.sum())


def _with_acts(groups, acts: np.ndarray) -> MemoryCache:
    from dataclasses import replace

    from feature_pairs import sparse

    distinct = replace(groups, score=np.arange(len(acts), 0, -1).astype(np.float32))
    return MemoryCache([distinct.with_columns([sparse(acts)])])


def test_what_a_top_k_cuts_is_bounded() -> None:
    """The gap of all activations is never further from the cache's than `cut` says; of an uncut cache that is 0."""
    rng = np.random.default_rng(3)
    acts = rng.gamma(0.3, 1, (80, 2, F)).astype(np.float32)
    full, cut = gaps_of(pairs_of(acts)), gaps_of(pairs_of(acts, top_k=4))
    assert (full.cut == 0).all()
    assert full.lost_any == (0, 0)
    off = np.abs(full.gap.value - cut.gap.value)
    assert off.max() > 0.001
    assert (off <= cut.cut + 1e-9).all()
    assert cut.lost_any == pytest.approx((1, 1))
    lost = (np.sort(acts.astype(np.float64), axis=2)[:, :, :-4] ** 2).sum(2) / (acts.astype(np.float64) ** 2).sum(2)
    np.testing.assert_allclose(cut.lost_share, lost.mean(0), rtol=1e-4)


def planted(P: int, seed: int, truth: float, prompts: int | None = None, share: float = 0.0) -> MemoryCache:
    """
    Feature 3 is a true gap away in chosen ones. Features are the prompt's own in part: pairs of one prompt share
    `share` of the variance of their gaps.
    """
    rng = np.random.default_rng(seed)
    prompt = np.arange(P) if prompts is None else np.arange(P) % prompts
    own = rng.normal(0, 1, (P if prompts is None else prompts, F))[prompt]
    gap = np.sqrt(share) * own + np.sqrt(1 - share) * rng.normal(0, 1, (P, F))
    gap[:, 3] += truth
    acts = np.stack([np.maximum(gap, 0), np.maximum(-gap, 0)], axis=1).astype(np.float32)
    return pairs_of(acts, prompt)


def test_a_planted_feature_stands_at_the_top() -> None:
    found = gaps_of(planted(400, 0, 0.4))
    assert found.discoveries(0.05).tolist() == [3]
    assert found.gap.value[3] == pytest.approx(0.4, abs=0.15)
    assert found.effect[3] == pytest.approx(0.4, abs=0.15)
    assert found.sign_holds[3]


REPEATS = 200


def within(share: float, n: int) -> tuple[float, float]:
    """Three standard errors around a probability."""
    reach = 3 * np.sqrt(share * (1 - share) / n)
    return share - reach, share + reach


TRUTH = np.where(np.arange(F) == 3, 0.3, 0.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % of 12 x 200 intervals, and of the planted feature's 200: repeats are independent, as features are."""
    repeats = [gaps_of(planted(100, seed, 0.3)) for seed in range(REPEATS)]
    covered = [np.abs(found.gap.value - TRUTH) <= found.gap.reach for found in repeats]
    low, high = within(0.95, REPEATS * F)
    assert low < np.mean(covered) < high
    low, high = within(0.95, REPEATS)
    assert low < np.mean(covered, axis=0)[3] < high


def test_an_interval_that_takes_pairs_of_a_prompt_for_independent_is_too_narrow() -> None:
    """
    Four pairs of one prompt whose gaps correlate by a half: the variance of their mean is 1 + 3 / 2 times that of four
    strangers, so an interval of sd / sqrt(n) covers 2 Phi(1.96 / sqrt(2.5)) - 1 = 78.5 % and the clustered one 95 %.
    """
    repeats = [gaps_of(planted(400, seed, 0.3, 100, 0.5)) for seed in range(REPEATS)]
    naive = [np.abs(found.gap.value - TRUTH) <= 1.96 * found.sd / np.sqrt(400) for found in repeats]
    low, high = within(0.785, REPEATS * F)
    assert low < np.mean(naive) < high
    clustered = [np.abs(found.gap.value - TRUTH) <= found.gap.reach for found in repeats]
    low, high = within(0.95, REPEATS * F)
    assert low < np.mean(clustered) < high


def test_data_of_which_nothing_differs_gives_no_discoveries_at_the_stated_rate() -> None:
    """With no true gap every discovery is false, so the share of repeats with any is at most the rate."""
    any_found = [len(gaps_of(pairs_of(some_acts(60, seed, 40)), 40).discoveries(0.05)) > 0 for seed in range(REPEATS)]
    assert np.mean(any_found) < within(0.05, REPEATS)[1]


def test_a_feature_that_hardly_fires_is_not_tested() -> None:
    acts = some_acts(60)
    acts[:, :, 0] = 0
    acts[:9, 0, 0] = 1
    found = gaps_of(pairs_of(acts))
    assert found.n_tests == F - 1
    assert np.isnan(found.p[0])
    assert np.isnan(found.adjusted[0])


def test_what_length_explains_is_gone_at_equal_length() -> None:
    """gap = 2 x + noise, and chosen ones are longer: the whole gap is that of length."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 40, (500, 2))
    tokens[:, 0] += 10
    x = np.log(tokens[:, 0] / tokens[:, 1])
    gap = (2 * x + rng.normal(0, 0.3, 500))[:, None]
    found = gaps_of(
        pairs_of(np.stack([np.maximum(gap, 0), np.maximum(-gap, 0)], 1).astype(np.float32), None, tokens), 1
    )
    assert found.gap.value[0] > 0.7
    assert found.slope[0] == pytest.approx(2, abs=0.1)
    assert abs(found.equal_length.value[0]) < found.equal_length.reach[0]


def test_without_a_prompt_groups_have_none_in_common() -> None:
    groups = make_groups([(0, (3, 3))] * 4 + [(2, (3, 3))])
    assert read_pairs(_with_acts(groups, np.ones((10, 1), np.float32))).n_prompts == 5


def test_a_cache_of_single_completions_is_refused() -> None:
    groups = make_groups([(2, (3,)), (2, (4,))])
    with pytest.raises(DataError, match="has no pairs: 2 completions in 2 groups"):
        read_pairs(MemoryCache([groups]))


def test_a_cache_in_a_store_is_read_as_it_lies(tmp_path) -> None:
    """Groups of one, two and three completions in three shards, a column cut finer than the base."""
    world = World(tmp_path)
    world.fill()
    cache = open_cache(tmp_path, world.key)
    pairs = read_pairs(cache)
    cache.read_columns([world.specs[0]])
    (found,) = feature_gaps(cache, 0, 50, [pairs])
    groups = [world.beside(sid) for sid in range(3)]
    assert isinstance(pairs, Pairs)
    assert found.n_pairs == len(pairs) == sum(int((group.n_completions - 1).sum()) for group in groups)


@pytest.mark.parametrize(("df", "t"), [(10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_quantiles_of_t_are_those_of_the_tables(df: int, t: float) -> None:
    """Two-sided 5 % points."""
    assert t_quantile(df) == pytest.approx(t, rel=2e-3)
    assert normal_score(np.array([t_quantile(df)]), df)[0] == pytest.approx(1.959964, abs=1e-5)


def test_p_values_are_those_of_the_normal_table() -> None:
    np.testing.assert_allclose(two_sided(np.array([0.0, 1.959964, -2.575829])), [1, 0.05, 0.01], atol=1e-6)


def test_false_discovery_rates_by_hand() -> None:
    """
    Of 4 tests, sorted 0.01 0.02 0.03 0.5: p m / j = 0.04 0.04 0.04 0.5, each the smallest from there on. A NaN is none.
    """
    p = np.array([0.02, np.nan, 0.5, 0.01, 0.03])
    np.testing.assert_allclose(false_discovery(p), [0.04, np.nan, 0.5, 0.04, 0.04])
