"""
Every loss over pairs but those of tests/test_objectives.py against a calculation by hand, through the
settings that a recipe would give it.

The pair of all these calculations, unless a test has its own:

              logps   reference   logratio   length
    chosen      -6          -9          3        3
    rejected    -8          -6         -2        2

so the margin of logratios is 5, that of mean logratios 3/3 - (-2/2) = 2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fpo.objectives import (
    OBJECTIVES,
    AdaDpo,
    Aot,
    AotUnpaired,
    ApoDown,
    ApoZero,
    Asft,
    BcoPair,
    CalDpo,
    Cpo,
    Discopop,
    Dpo,
    Evidence,
    ExoPair,
    FeatureTerm,
    Hinge,
    Ipo,
    Logps,
    Mixture,
    NcaPair,
    Objective,
    Odpo,
    Orpo,
    Robust,
    SailDp,
    Sft,
    Simpo,
    SppoHard,
    Tokens,
    Wpo,
)
from fpo.objectives.ada_dpo import temperature_ratio
from fpo.objectives.divergence import Divergence, FDivergence
from fpo.objectives.objective import PairObjective
from fpo.objectives.robust import robust


def evidence_of(policy: Tensor, reference: Tensor, lengths: Tensor | None = None) -> Evidence:
    lengths = torch.ones_like(policy) if lengths is None else lengths
    return Evidence(
        Logps(policy, policy / lengths),
        Logps(reference, reference / lengths),
        lengths,
        distances=None,
        scores=torch.full_like(policy, math.nan),
    )


def tokens_evidence(lengths: list[int], seed: int = 0) -> Evidence:
    """
    Pairs of these lengths, chosen and rejected in turn, with random token log-probs, divergences and draws: everything
    that an objective may ask for.
    """
    rng = torch.Generator().manual_seed(seed)
    sides = torch.tensor(lengths)
    side = torch.repeat_interleave(torch.arange(len(sides)), sides)
    place = torch.cat([torch.arange(n) for n in lengths])
    policy, reference = -torch.rand(2, len(side), generator=rng) - 0.1
    tokens = Tokens(policy, reference, side, place, torch.rand(len(side), generator=rng))
    counts = sides.view(-1, 2).float()
    sums = [tokens.sums(logps, counts) for logps in (policy, reference)]
    return Evidence(
        *(Logps(logps, logps / counts) for logps in sums),
        counts,
        distances=None,
        scores=torch.tensor([[2.0, 1.0]]).expand(len(counts), 2),
        typicality=-torch.rand(len(counts), 2, generator=rng),
        tokens=tokens,
        divergences=torch.rand(len(counts), 2, generator=rng),
        draws=torch.rand(len(counts), generator=rng),
    )


PAIR = evidence_of(torch.tensor([[-6.0, -8.0]]), torch.tensor([[-9.0, -6.0]]), torch.tensor([[3.0, 2.0]]))


def loss(objective: Objective) -> float:
    return objective.value(PAIR).losses.item()


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


def test_smoothed_labels_mix_dpo_with_the_pair_the_other_way_round() -> None:
    """u = 0.2 * 5 = 1; 0.9 of -log sigmoid(1) and 0.1 of -log sigmoid(-1)"""
    expected = 0.9 * minus_log_sigmoid(1) + 0.1 * minus_log_sigmoid(-1)
    assert loss(Dpo(name="dpo", beta=0.2, label_smoothing=0.1)) == about(expected)


def test_the_hinge_ends_where_the_margin_is_one() -> None:
    """beta 0.1: 1 - 0.5 = 0.5; beta 0.4: 1 - 2 < 0"""
    assert loss(Hinge(name="hinge", beta=0.1)) == about(0.5)
    assert loss(Hinge(name="hinge", beta=0.4)) == 0


def test_ipo_pulls_the_margin_per_token_or_of_sums_to_its_target() -> None:
    """target 1 / (2 * 0.5) = 1; of means (2 - 1)^2 = 1, of sums (5 - 1)^2 = 16"""
    assert loss(Ipo(name="ipo", beta=0.5)) == about(1)
    assert loss(Ipo(name="ipo", beta=0.5, length_normalised=False)) == about(16)


def test_exo_is_the_reverse_kl_to_the_smoothed_label() -> None:
    """
    u = 0 (beta towards 0)    1/2 log((1/2) / (3/4)) + 1/2 log((1/2) / (1/4)) = 1/2 log(4/3)
    u = log 3                 sigmoid(u) = 3/4 is the label itself: 0
    """
    assert loss(ExoPair(name="exo_pair", beta=1e-9, label_smoothing=0.25)) == about(0.5 * math.log(4 / 3))
    assert loss(ExoPair(name="exo_pair", beta=math.log(3) / 5, label_smoothing=0.25)) == pytest.approx(0, abs=1e-6)


def test_nca_takes_half_of_each_completion_as_noise() -> None:
    """r = 0.2 * (3, -2) = (0.6, -0.4)"""
    expected = minus_log_sigmoid(0.6) + 0.5 * minus_log_sigmoid(-0.6) + 0.5 * minus_log_sigmoid(0.4)
    assert loss(NcaPair(name="nca_pair", beta=0.2)) == about(expected)


def test_robust_dpo_matches_hand_calculation() -> None:
    """u = 1, e = 0.1: (0.9 * L(1) - 0.1 * L(-1)) / 0.8 with L = -log sigmoid"""
    expected = (0.9 * minus_log_sigmoid(1) - 0.1 * minus_log_sigmoid(-1)) / 0.8
    assert loss(Robust(name="robust", beta=0.2, label_smoothing=0.1)) == about(expected)


def test_robust_dpo_is_dpo_in_the_mean_over_flipped_labels() -> None:
    """A label that is flipped with probability e: (1 - e) * robust(pair) + e * robust(flipped pair) = dpo(pair)."""
    policy, reference = PAIR.policy, PAIR.reference
    flipped = [Logps(*(value.flip(1) for value in side)) for side in (policy, reference)]
    right = robust(policy, reference, beta=0.2, label_smoothing=0.3).losses.item()
    wrong = robust(*flipped, beta=0.2, label_smoothing=0.3).losses.item()
    assert 0.7 * right + 0.3 * wrong == about(minus_log_sigmoid(1))


def test_bco_classifies_each_completion() -> None:
    """r = (0.6, -0.4): L(0.6) + L(0.4) with L = -log sigmoid"""
    assert loss(BcoPair(name="bco_pair", beta=0.2)) == about(minus_log_sigmoid(0.6) + minus_log_sigmoid(0.4))


def test_sppo_pulls_each_logratio_to_its_target() -> None:
    """1 / (2 * 0.25) = 2: (3 - 2)^2 + (-2 + 2)^2 = 1; 1 / (2 * 0.5) = 1: (3 - 1)^2 + (-2 + 1)^2 = 5"""
    assert loss(SppoHard(name="sppo_hard", beta=0.25)) == about(1)
    assert loss(SppoHard(name="sppo_hard", beta=0.5)) == about(5)


def test_apo_zero_matches_hand_calculation() -> None:
    """r = (0.6, -0.4): 1 - sigmoid(0.6) + sigmoid(-0.4)"""
    assert loss(ApoZero(name="apo_zero", beta=0.2)) == about(1 - sigmoid(0.6) + sigmoid(-0.4))


def test_apo_down_matches_hand_calculation() -> None:
    """r = (0.6, -0.4): sigmoid(0.6) + 1 - sigmoid(0.6 + 0.4)"""
    assert loss(ApoDown(name="apo_down", beta=0.2)) == about(sigmoid(0.6) + 1 - sigmoid(1))


def test_discopop_matches_hand_calculation() -> None:
    """u = 1, m = sigmoid(1 / 0.5): (1 - m) * L(1) + m / e with L = -log sigmoid"""
    m = sigmoid(2)
    expected = (1 - m) * minus_log_sigmoid(1) + m * math.exp(-1)
    assert loss(Discopop(name="discopop", beta=0.2, tau=0.5)) == about(expected)


def test_discopop_stays_finite_where_its_exponential_would_not() -> None:
    """u = -500: m = 0, so the loss is -log sigmoid(-500) = 500 and its slope -1."""
    policy = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    losses = Discopop(name="discopop", beta=1.0).value(evidence_of(policy, torch.zeros(1, 2))).losses
    losses.sum().backward()
    assert policy.grad is not None
    assert losses.tolist() == [500.0]
    assert policy.grad.tolist() == [[-1.0, 1.0]]


def test_aot_holds_margins_of_the_same_rank_against_each_other() -> None:
    """
    margins     policy (5, 1), reference (0, 2)
    by rank     5 with 2, 1 with 0: 3 and 1; DPO has 5 and -1
    """
    policy, reference = torch.tensor([[-1.0, -6.0], [-2.0, -3.0]]), torch.tensor([[-4.0, -4.0], [-1.0, -3.0]])
    losses = Aot(name="aot", beta=0.5, label_smoothing=0.2).value(evidence_of(policy, reference)).losses
    expected = [0.8 * minus_log_sigmoid(u) + 0.2 * minus_log_sigmoid(-u) for u in (1.5, 0.5)]
    assert losses.tolist() == pytest.approx(expected)


def test_unpaired_aot_holds_logratios_of_the_same_rank_against_each_other() -> None:
    """
    logratios   chosen (3, 1, 2), rejected (-2, 4, 0)
    by rank     3 with 4, 1 with -2, 2 with 0: -1, 3, 2
    """
    policy = torch.tensor([[3.0, -2.0], [1.0, 4.0], [2.0, 0.0]], requires_grad=True)
    objective = AotUnpaired(name="aot_unpaired", beta=0.5, label_smoothing=0.2)
    losses = objective.value(evidence_of(policy, torch.zeros(3, 2))).losses
    expected = [0.8 * minus_log_sigmoid(u) + 0.2 * minus_log_sigmoid(-u) for u in (-0.5, 1.5, 1.0)]
    assert losses.tolist() == pytest.approx(expected)
    # The first loss pushes the first chosen and the second rejected completion, its partner, apart.
    losses[0].backward()
    assert policy.grad is not None
    slope = 0.5 * (0.8 * (sigmoid(-0.5) - 1) + 0.2 * sigmoid(-0.5))
    assert policy.grad.flatten().tolist() == pytest.approx([slope, 0, 0, -slope, 0, 0])


@pytest.mark.parametrize(
    ("kind", "alpha", "margin"),
    [
        ("reverse_kl", 0.5, 2 * math.log(2)),
        ("forward_kl", 0.5, 1.5),
        ("js_divergence", 0.5, math.log(2)),
        ("alpha_divergence", 0.5, math.sqrt(2)),
        ("alpha_divergence", 0.0, 1.5),
        ("alpha_divergence", 1.0, 2 * math.log(2)),
        ("alpha_divergence", 2.0, 1.5),
    ],
)
def test_a_divergence_gives_the_margin_of_its_derivative(kind: FDivergence, alpha: float, margin: float) -> None:
    """
    policy / reference = 2 chosen, 1/2 rejected

    log u                    log 2 + log 2
    1 - 1/u                  1/2 - (-1) = 1.5
    log(2u / (1 + u))        log(4/3) - log(2/3) = log 2
    alpha 1/2: 2 - 2/sqrt u  (2 - 2/sqrt 2) - (2 - 2 sqrt 2) = sqrt 2
    alpha 2:   u - 1         1 - (-1/2) = 1.5
    """
    logratios = torch.tensor([[math.log(2), -math.log(2)]])
    assert Divergence(kind, alpha).margin(logratios).item() == about(margin)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Dpo(name="dpo", beta=2.0, f_divergence_type="forward_kl"), minus_log_sigmoid(3)),
        (Hinge(name="hinge", beta=0.2, f_divergence_type="forward_kl"), 0.7),
        (Ipo(name="ipo", beta=0.5, f_divergence_type="forward_kl", length_normalised=False), 0.25),
        (Ipo(name="ipo", beta=0.5, f_divergence_type="forward_kl"), (0.125 + 0.5 - 1) ** 2),
        (ExoPair(name="exo_pair", beta=math.log(3) / 1.5, label_smoothing=0.25, f_divergence_type="forward_kl"), 0),
        (Robust(name="robust", beta=2.0, label_smoothing=0.0, f_divergence_type="forward_kl"), minus_log_sigmoid(3)),
        (
            Discopop(name="discopop", beta=2.0, tau=1.5, f_divergence_type="forward_kl"),
            (1 - sigmoid(2)) * minus_log_sigmoid(3) + sigmoid(2) * math.exp(-3),
        ),
        (
            Dpo(name="dpo", beta=2.0, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0),
            minus_log_sigmoid(3),
        ),
    ],
)
def test_an_objective_of_the_margin_takes_the_divergence_of_its_recipe(objective: Objective, expected: float) -> None:
    """
    policy / reference = 2 chosen, 1/2 rejected: the margin of the forward KL is 1/2 - (-1) = 1.5, the rewards stay
    logratios. Lengths are 4 and 2: per token it is 1/8 - (-1/2).
    """
    policy, lengths = torch.tensor([[math.log(2), -math.log(2)]]), torch.tensor([[4.0, 2.0]])
    value = objective.value(evidence_of(policy, torch.zeros(1, 2), lengths))
    assert value.losses.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert isinstance(objective, Dpo | Hinge | Ipo | ExoPair | Robust | Discopop)
    assert value.rewards.tolist() == [pytest.approx([objective.beta * math.log(2), -objective.beta * math.log(2)])]


def test_the_likelihood_of_the_chosen_completions_is_a_mean_over_their_tokens() -> None:
    """
    logps -6 of 3 tokens and -4 of 1: 10 nats over 4 tokens, 2.5 per token
    a pair's share of the mean over 2 pairs: 6 * 2 / 4 = 3 and 4 * 2 / 4 = 2
    """
    policy, lengths = torch.tensor([[-6.0, -1.0], [-4.0, -9.0]]), torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    value = Sft(name="sft").value(evidence_of(policy, torch.zeros(2, 2), lengths))
    assert value.losses.tolist() == [3.0, 2.0]
    assert value.rewards[0].tolist() == [-2.0, -1.0]


def test_cpo_matches_hand_calculation() -> None:
    """u = 0.5 * (-6 + 8) = 1; the chosen completion has 6 / 3 = 2 nats per token, 3 times 2 = 6"""
    assert loss(Cpo(name="cpo", beta=0.5, sft_weight=3.0)) == about(minus_log_sigmoid(1) + 6)
    smoothed = Cpo(name="cpo", beta=0.5, sft_weight=0.0, label_smoothing=0.1)
    assert loss(smoothed) == about(0.9 * minus_log_sigmoid(1) + 0.1 * minus_log_sigmoid(-1))


def test_orpo_matches_hand_calculation() -> None:
    """
    probability per token   chosen 2/3, rejected 1/3: odds 2 and 1/2, ratio 4, sigmoid(log 4) = 4/5
    loss                    -log(2/3) - 0.3 * log(4/5)
    """
    lengths = torch.tensor([[3.0, 2.0]])
    policy = torch.tensor([[3 * math.log(2 / 3), 2 * math.log(1 / 3)]])
    losses = Orpo(name="orpo", beta=0.3).value(evidence_of(policy, torch.zeros(1, 2), lengths)).losses
    assert losses.item() == about(-math.log(2 / 3) - 0.3 * math.log(4 / 5))


def test_simpo_takes_the_likelihood_of_the_chosen_completions_in() -> None:
    """u = 0.5 * (-6 / 3 + 8 / 2) - 0.5 = 0.5; 0.3 times 2 nats per token"""
    assert loss(Simpo(name="simpo", beta=0.5, gamma=0.5, sft_weight=0.3)) == about(minus_log_sigmoid(0.5) + 0.6)


def test_a_feature_term_is_taken_from_the_margin_and_the_rewards_know_nothing_of_it() -> None:
    """
    0.5 * (D_rejected 3 - D_chosen 1) = 1 less of every margin:

        dpo    0.2 * (5 - 1) = 0.8
        simpo  2 * (-6 / 3 + 8 / 2 - 1) - 0.5 = 1.5
        cpo    0.2 * (-6 + 8 - 1) = 0.2, and 2 nats per token of the chosen completion
    """
    apart = PAIR._replace(distances=torch.tensor([[1.0, 3.0]]))
    term = FeatureTerm(alpha=0.5)
    value = Dpo(name="dpo", beta=0.2, features=term).total(apart)
    assert value.losses.item() == about(minus_log_sigmoid(0.8))
    assert value.rewards.tolist() == [pytest.approx([0.6, -0.4])]
    value = Simpo(name="simpo", features=term).total(apart)
    assert value.losses.item() == about(minus_log_sigmoid(1.5))
    assert value.rewards.tolist() == [[-4, -8]]
    assert Cpo(name="cpo", beta=0.2, features=term).total(apart).losses.item() == about(minus_log_sigmoid(0.2) + 2)
    without = Dpo(name="dpo", beta=0.2, features=FeatureTerm(alpha=0.0))
    assert without.total(PAIR).losses.item() == about(minus_log_sigmoid(1))


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if issubclass(kind, PairObjective)])
def test_of_a_feature_term_the_rejected_completion_alone_gets_a_gradient(name: str) -> None:
    """Whatever the objective; a larger distance of the rejected completion costs more."""
    terms = {"terms": [{"name": "dpo"}, {"name": "simpo"}]} if name == "mixture" else {}
    objective = OBJECTIVES[name](name=name, features=FeatureTerm(alpha=0.7), **terms)
    distances = torch.tensor([[0.1, 0.2]], requires_grad=True)
    objective.total(tokens_evidence([3, 2])._replace(distances=distances)).losses.sum().backward()
    assert distances.grad is not None
    assert distances.grad[0, 0] == 0
    # DiscoPOP is not convex: there a larger distance may cost less.
    assert distances.grad[0, 1] > 0 or name == "discopop"


def test_calibrated_dpo_matches_hand_calculation() -> None:
    """target 1 / (2 * 0.25) = 2: -log sigmoid(5) + ((3 - 2)^2 + (-2 + 2)^2) / 2"""
    assert loss(CalDpo(name="cal_dpo", beta=0.25)) == about(minus_log_sigmoid(5) + 0.5)


def test_odpo_asks_for_a_margin_by_the_gap_of_scores() -> None:
    """u = 0.2 * 5 - 0.5 * log(5 - 3) = 1 - 0.5 log 2"""
    objective = Odpo(name="odpo", beta=0.2, alpha=0.5)
    value = objective.value(PAIR._replace(scores=torch.tensor([[5.0, 3.0]])))
    assert value.losses.item() == about(minus_log_sigmoid(1 - 0.5 * math.log(2)))


def test_odpo_asks_for_nothing_where_scores_are_equal() -> None:
    policy = torch.tensor([[-6.0, -8.0]], requires_grad=True)
    evidence = evidence_of(policy, torch.zeros(1, 2))._replace(scores=torch.tensor([[3.0, 3.0]]))
    losses = Odpo(name="odpo").value(evidence).losses
    losses.sum().backward()
    assert policy.grad is not None
    assert losses.tolist() == [0.0]
    assert policy.grad.tolist() == [[0.0, 0.0]]


def test_wpo_weighs_a_pair_by_how_typical_the_policy_finds_it() -> None:
    """u = 0.2 * 5 = 1; weight exp(-0.5 - 0.2) of L = 0.9 * -log sigmoid(1) + 0.1 * -log sigmoid(-1)"""
    evidence = PAIR._replace(typicality=torch.tensor([[-0.5, -0.2]], requires_grad=True))
    losses = Wpo(name="wpo", beta=0.2, label_smoothing=0.1).value(evidence).losses
    unweighted = 0.9 * minus_log_sigmoid(1) + 0.1 * minus_log_sigmoid(-1)
    assert losses.item() == about(math.exp(-0.7) * unweighted)
    assert not losses.requires_grad


@pytest.mark.parametrize(("max_weight", "weight"), [(1.0, 1.0), (1.2, 1.2), (None, math.exp(0.7))])
def test_wpo_bounds_the_weight_of_a_pair(max_weight: float | None, weight: float) -> None:
    evidence = PAIR._replace(typicality=torch.tensor([[0.5, 0.2]]))
    losses = Wpo(name="wpo", beta=0.2, max_weight=max_weight).value(evidence).losses
    assert losses.item() == about(weight * minus_log_sigmoid(1))


def test_a_logratio_far_below_zero_leaves_a_finite_margin() -> None:
    """1 - 1/u at u = exp(-200) is beyond float32 on both sides; infinity less infinity would be nan."""
    assert Divergence("forward_kl").margin(torch.tensor([[-200.0, -200.0]])).tolist() == [0.0]


def test_asft_matches_hand_calculation() -> None:
    """
    mean logps -2 and -4: log odds o = -2 - log(1 - e^-2) and -4 - log(1 - e^-4), at beta 1 so that
    -log sigmoid(o_chosen) = 2 and -log sigmoid(-o_rejected) = -log(1 - e^-4)
    """
    rejected = -math.log(1 - math.exp(-4))
    assert loss(Asft(name="asft")) == about(2 + 2 + rejected)
    assert loss(Asft(name="asft", alignment_weight=0.5, sft_weight=0.0)) == about(0.5 * (2 + rejected))
    odds = [-2 - math.log(1 - math.exp(-2)), -4 - math.log(1 - math.exp(-4))]
    expected = minus_log_sigmoid(0.3 * odds[0]) + minus_log_sigmoid(-0.3 * odds[1])
    assert loss(Asft(name="asft", beta=0.3, sft_weight=0.0)) == about(expected)


@pytest.mark.parametrize(("rho", "ratio"), [(0.05, 0.649), (0.1, 0.943), (0.2, 1.419)])
def test_ada_dpo_finds_the_temperature_at_which_its_loss_is_least(rho: float, ratio: float) -> None:
    """u = 0.2 * 5 = 1, so tau = 1 / ratio; on a fine grid of temperatures no loss is smaller"""

    def at(tau: float) -> float:
        return tau * minus_log_sigmoid(1 / tau) + (rho - math.log(2)) * tau

    found = loss(AdaDpo(name="ada_dpo", beta=0.2, rho=rho))
    assert temperature_ratio(rho) == pytest.approx(ratio, abs=5e-4)
    assert found == about(at(1 / temperature_ratio(rho)))
    assert found <= min(at(0.1 + 0.001 * step) for step in range(4900)) + 1e-6


def test_ada_dpo_keeps_its_temperature_between_the_bounds_and_starts_as_dpo() -> None:
    """u = 0: tau = tau_min, where tau * log sigmoid(u / tau) has DPO's gradient, whatever tau is."""
    same = torch.tensor([[-6.0, -8.0]], requires_grad=True)
    seen = evidence_of(same, same.detach())
    grads = [
        torch.autograd.grad(objective.value(seen).losses.sum(), same, retain_graph=True)[0]
        for objective in (AdaDpo(name="ada_dpo", beta=0.2), Dpo(name="dpo", beta=0.2))
    ]
    assert torch.allclose(*grads)
    capped = loss(AdaDpo(name="ada_dpo", beta=0.2, rho=0.1, tau_max=0.5))
    assert capped == about(0.5 * minus_log_sigmoid(2) + (0.1 - math.log(2)) * 0.5)
    # A rho of log 2 or more asks for no other temperature than the smallest.
    assert loss(AdaDpo(name="ada_dpo", beta=0.2, rho=0.7, tau_min=1.0)) == about(
        minus_log_sigmoid(1) + 0.7 - math.log(2)
    )
    with pytest.raises(ValueError, match=r"tau_min: 2\.0 is more than objective\.tau_max: 1\.0"):
        AdaDpo(name="ada_dpo", tau_min=2.0, tau_max=1.0)


@pytest.mark.parametrize(("draw", "sign", "relabelled"), [(0.0, -1, 1), (0.35, 1, 1), (0.4, 1, 0)])
def test_sail_relabels_a_share_of_the_pairs_as_the_policy_would(draw: float, sign: int, relabelled: int) -> None:
    """u = 1; of a share of 0.4, sigmoid(-1) = 0.27 are swapped: draws below 0.4 * 0.27 = 0.108"""
    objective = SailDp(name="sail_dp", beta=0.2, share=0.4, rho=0.2)
    found = objective.value(PAIR._replace(draws=torch.tensor([draw]))).losses.item()
    cost = minus_log_sigmoid(sign * 1.0)
    assert found == about(cost - relabelled * 0.1 * cost**2)


def test_sails_score_function_term_adds_its_gradient_to_both_completions() -> None:
    """-rho * log sigmoid(u) = 0.2 * 0.3133 = 0.0627 to the gradient in either log-prob"""
    policy = torch.tensor([[-6.0, -8.0]], requires_grad=True)
    seen = evidence_of(policy, torch.tensor([[-9.0, -6.0]]))._replace(draws=torch.tensor([0.3]))
    grads = [
        torch.autograd.grad(objective.value(seen).losses.sum(), policy, retain_graph=True)[0]
        for objective in (
            SailDp(name="sail_dp", beta=0.2, score_function=True),
            SailDp(name="sail_dp", beta=0.2),
        )
    ]
    assert (grads[0] - grads[1]).flatten().tolist() == pytest.approx([0.2 * minus_log_sigmoid(1)] * 2, rel=1e-5)


def test_a_mixture_is_the_weighted_sum_of_its_terms() -> None:
    """MPO, https://arxiv.org/abs/2411.10442"""
    terms = [Dpo(name="dpo", beta=0.2), BcoPair(name="bco_pair", beta=0.3), Sft(name="sft")]
    mixture = Mixture(name="mixture", terms=terms, weights=[0.8, 0.2, 1.0])
    assert loss(mixture) == about(0.8 * loss(terms[0]) + 0.2 * loss(terms[1]) + loss(terms[2]))
    assert mixture.value(PAIR).rewards.tolist() == terms[0].value(PAIR).rewards.tolist()
    assert loss(Mixture(name="mixture", terms=terms)) == about(sum(map(loss, terms)))


def test_a_mixture_asks_for_what_any_of_its_terms_asks_for() -> None:
    needs = Mixture(name="mixture", terms=[{"name": "sft"}, {"name": "tdpo2"}, {"name": "odpo"}]).needs
    assert (needs.reference, needs.divergence, needs.scores, needs.tokens) == (True, True, True, False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"terms": [{"name": "dpo"}], "weights": [1.0, 2.0]}, "2 weights for 1 terms"),
        ({"terms": [{"name": "sft"}, {"name": "dpo", "pairs": "all"}]}, r"terms\[1\]\.pairs: a mixture's terms share"),
        ({"terms": [{"name": "fpo"}]}, r"terms\[0\]: fpo brings a feature term of its own"),
        ({"terms": []}, "a mixture of nothing"),
        ({"terms": [{"name": "kto"}]}, "does not match any of the expected tags"),
    ],
)
def test_a_mixture_of_what_does_not_go_together_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(name="mixture", **fields)


@pytest.mark.parametrize("name", ["orpo", "asft"])
@pytest.mark.parametrize("mean", [0.0, 1e-8, -1e-8])
def test_a_completion_that_is_certain_has_finite_odds(name: str, mean: float) -> None:
    policy = torch.tensor([[mean, -0.7], [-0.7, mean]], requires_grad=True)
    losses = OBJECTIVES[name](name=name).value(evidence_of(policy, torch.zeros(2, 2))).losses
    (found,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert found.isfinite().all()
