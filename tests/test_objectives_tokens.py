"""
Losses that see single tokens, or whole distributions, against calculations by hand.

The pair of these calculations, unless a test has its own:

    logratios of the chosen completion's tokens     1, 2, -1, 3         sum 5
              of the rejected one's                 -1, 2               sum 1
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fpo.objectives import (
    Adpo,
    Dpo,
    Evidence,
    FeatureTerm,
    LdDpo,
    Logps,
    Sampo,
    SimpoKl,
    Tdpo1,
    Tdpo2,
    Tokens,
    token_kl,
)

LOGRATIOS = ([1.0, 2.0, -1.0, 3.0], [-1.0, 2.0])


def evidence_of(*completions: list[float], draws: list[float] | None = None) -> Evidence:
    """Pairs of these token logratios, chosen and rejected in turn; the policy's log-probs are -1 all."""
    lengths = torch.tensor([len(one) for one in completions])
    logratios = torch.tensor([value for one in completions for value in one])
    policy = torch.full_like(logratios, -1.0).requires_grad_()
    tokens = Tokens(
        policy,
        policy.detach() - logratios,
        torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        torch.cat([torch.arange(int(n)) for n in lengths]),
        torch.zeros_like(logratios) if draws is None else torch.tensor(draws),
    )
    counts = lengths.view(-1, 2).float()
    sums = [tokens.sums(logps, counts) for logps in (tokens.policy, tokens.reference)]
    return Evidence(
        *(Logps(logps, logps / counts) for logps in sums),
        counts,
        distances=None,
        scores=torch.full_like(counts, math.nan),
        tokens=tokens,
    )


PAIR = evidence_of(*LOGRATIOS)


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def gradient(evidence: Evidence, losses: Tensor) -> list[float]:
    """In the policy's token log-probs."""
    assert evidence.tokens is not None
    (found,) = torch.autograd.grad(losses.sum(), evidence.tokens.policy, retain_graph=True)
    return found.tolist()


def test_tokens_beyond_the_shorter_length_weigh_less() -> None:
    """shared length 2: chosen 1 + 2 + 0.25 (-1 + 3) = 3.5, rejected 1; u = 0.4 * 2.5 = 1"""
    objective = LdDpo(name="ld_dpo", beta=0.4, ld_alpha=0.25)
    value = objective.value(PAIR)
    assert value.losses.item() == about(minus_log_sigmoid(1.0))
    assert value.rewards.tolist() == [pytest.approx([1.4, 0.4])]
    slope = (1 / (1 + math.exp(-1.0)) - 1) * 0.4
    assert gradient(PAIR, value.losses) == pytest.approx([slope, slope, slope / 4, slope / 4, -slope, -slope], rel=1e-5)
    whole = LdDpo(name="ld_dpo", beta=0.4, ld_alpha=1.0).value(PAIR).losses
    assert whole.item() == about(Dpo(name="dpo", beta=0.4).value(PAIR).losses.item())


def test_as_many_tokens_of_either_completion_are_drawn() -> None:
    """Lowest draws of the chosen completion: its second and fourth token, 2 + 3 = 5; of the rejected both, 1."""
    evidence = evidence_of(*LOGRATIOS, draws=[0.9, 0.2, 0.8, 0.1, 0.5, 0.4])
    value = Sampo(name="sampo", beta=0.25).value(evidence)
    assert value.losses.item() == about(minus_log_sigmoid(1.0))
    found = gradient(evidence, value.losses)
    assert [number != 0 for number in found] == [False, True, False, True, True, True]


def test_which_tokens_are_drawn_is_told_pair_by_pair() -> None:
    """The second pair's draws are all below the first one's; of each pair one token of the longer side stays."""
    evidence = evidence_of([1.0], [4.0, 2.0], [8.0, 5.0], [3.0], draws=[0.9, 0.8, 0.7, 0.2, 0.1, 0.0])
    value = Sampo(name="sampo", beta=1.0).value(evidence)
    assert value.rewards.tolist() == [[1.0, 2.0], [5.0, 3.0]]


def test_every_segment_is_a_preference_of_its_own() -> None:
    """
    m = 2 of 4 and of 2 tokens: chosen 1 + 2 = 3 and -1 + 3 = 2, rejected -1 and 2, so margins 4 and 0.
    m = 256: as many segments as the shorter completion has tokens, 2.
    k = 3: chosen 1 + 2 - 1 = 2 and 3, rejected 1 and, where it has ended, 0: margins 1 and 3.
    """
    two = minus_log_sigmoid(0.5 * 4) + minus_log_sigmoid(0)
    assert Adpo(name="adpo", beta=0.5, segments=2).value(PAIR).losses.item() == about(two)
    assert Adpo(name="adpo", beta=0.5).value(PAIR).losses.item() == about(two)
    static = Adpo(name="adpo", beta=0.5, segments=None, window=3).value(PAIR)
    assert static.losses.item() == about(minus_log_sigmoid(0.5) + minus_log_sigmoid(1.5))
    assert static.rewards.tolist() == [pytest.approx([2.5, 0.5])]


@pytest.mark.parametrize(
    ("tokens", "segments", "sizes"),
    [(5, 4, [1, 1, 1, 2]), (9, 4, [2, 2, 2, 3]), (7, 4, [1, 2, 2, 2]), (9, 2, [4, 5]), (7, 2, [3, 4])],
)
def test_adaptive_segments_are_those_of_the_papers_figure(tokens: int, segments: int, sizes: list[int]) -> None:
    """A segment's margin is its number of tokens, the rejected completion's logratios being 0."""
    value = Adpo(name="adpo", beta=1.0, segments=segments).value(evidence_of([1.0] * tokens, [0.0] * tokens))
    assert value.losses.item() == about(sum(minus_log_sigmoid(size) for size in sizes))


def test_one_segment_is_dpo_and_at_the_reference_any_number_has_its_gradient() -> None:
    one = Adpo(name="adpo", beta=0.3, segments=1).value(PAIR).losses
    assert one.item() == about(Dpo(name="dpo", beta=0.3).value(PAIR).losses.item())
    same = evidence_of([0.0] * 7, [0.0] * 4, [0.0] * 3, [0.0] * 9)
    expected = gradient(same, Dpo(name="dpo", beta=0.3).value(same).losses)
    for cut in ({"segments": 1}, {"segments": 3}, {"segments": 256}, {"segments": None, "window": 2}):
        assert gradient(same, Adpo(name="adpo", beta=0.3, **cut).value(same).losses) == pytest.approx(expected)


def test_a_completion_of_which_nothing_counts_is_no_segment() -> None:
    """Alone with a completion of two tokens, 1 + 2 = 3, that one is a segment; a pair of nothing costs nothing."""
    seen = evidence_of([], [], [1.0, 2.0], [])
    for cut in ({"segments": 4}, {"window": 9}):
        value = Adpo(name="adpo", beta=0.5, features=FeatureTerm(alpha=1.0), **cut)
        held = seen._replace(distances=torch.zeros(2, 2))
        assert value.total(held).losses.tolist() == pytest.approx([0.0, minus_log_sigmoid(1.5)])


def test_a_pair_is_cut_into_segments_or_windows_and_not_both() -> None:
    with pytest.raises(ValueError, match="one of them says how a completion is cut"):
        Adpo(name="adpo", segments=4, window=2)


def test_the_divergence_over_all_tokens_is_the_kl_and_over_a_few_a_lower_bound_of_it() -> None:
    """
    p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2)      KL = 1/2 log 2 - 1/4 log 2 = 1/4 log 2
    of the likeliest token and the rest            1/2 log 2 + 1/2 log(1/2 / 3/4) = 1/2 log(4/3)
    """
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert token_kl(p, q).item() == about(math.log(2) / 4)
    assert token_kl(p[:, :2], q[:, :2]).item() == about(math.log(2) / 4)
    assert token_kl(p[:, :1], q[:, :1]).item() == about(math.log(4 / 3) / 2)
    random = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    order = random[0].argsort(descending=True)
    p, q = random[0].gather(1, order), random[1].gather(1, order)
    whole = (p.exp() * (p - q)).sum(-1)
    found = [token_kl(p[:, :m], q[:, :m]) for m in (1, 4, 16, 39, 40)]
    for fewer, more in zip(found, [*found[1:], whole], strict=True):
        assert (fewer <= more + 1e-5).all()
    assert torch.allclose(found[-1], whole, atol=1e-5)
    assert torch.allclose(found[-2], whole, atol=1e-5)


def test_where_the_policy_is_the_reference_the_divergence_and_its_gradient_are_nothing() -> None:
    p = torch.randn(5, 30).log_softmax(-1)[:, :8]
    q = p.clone().requires_grad_()
    kl = token_kl(p, q)
    (found,) = torch.autograd.grad(kl.sum(), q)
    assert kl.abs().max() < 1e-6
    # dK/dlog q = -p + q p_rest / q_rest = 0 at q = p
    assert found.abs().max() < 1e-5


def test_the_two_losses_of_tdpo_match_hand_calculation() -> None:
    """
    margin 5 - 1 = 4, K = (1, 3)
    TDPO1  0.5 * (4 - (3 - 1)) = 1        TDPO2  0.5 * (4 - 0.25 * (3 - 1)) = 1.75
    """
    kl = torch.tensor([[1.0, 3.0]], requires_grad=True)
    seen = PAIR._replace(divergences=kl)
    first = Tdpo1(name="tdpo1", beta=0.5).value(seen)
    second = Tdpo2(name="tdpo2", beta=0.5, alpha=0.25).value(seen)
    assert first.losses.item() == about(minus_log_sigmoid(1.0))
    assert second.losses.item() == about(minus_log_sigmoid(1.75))
    assert first.rewards.tolist() == second.rewards.tolist() == [pytest.approx([3.0, 2.0])]
    slopes = [1 / (1 + math.exp(-u)) - 1 for u in (1.0, 1.75)]
    grads = [torch.autograd.grad(value.losses.sum(), kl, retain_graph=True)[0][0].tolist() for value in (first, second)]
    assert grads[0] == pytest.approx([slopes[0] * 0.5, -slopes[0] * 0.5], rel=1e-5)
    assert grads[1] == pytest.approx([0.0, -slopes[1] * 0.125], rel=1e-5)


def test_simpo_with_a_divergence_takes_it_per_token() -> None:
    """mean log-probs are -1 both, mean K (2/4, 3/2): u = 2 * (0 - 0.5 * (1.5 - 0.5)) - 0.25 = -1.25"""
    seen = PAIR._replace(divergences=torch.tensor([[2.0, 3.0]]))
    value = SimpoKl(name="simpo_kl", gamma=0.25).value(seen)
    assert value.losses.item() == about(minus_log_sigmoid(-1.25))
    assert value.rewards.tolist() == [[-2.0, -2.0]]
