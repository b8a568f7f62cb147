"""Losses of whole groups and of single completions against calculations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fpo.objectives import Dpo, Evidence, FeatureTerm, InfoNca, Kto, Logps, NcaPair, PlackettLuce

NAN = math.nan


def evidence_of(logratios: Tensor, scores: Tensor | None = None, present: Tensor | None = None) -> Evidence:
    """Completions of these logratios, one token each."""
    reference = torch.full_like(logratios, -1.0)
    policy = reference + logratios
    ones = torch.ones_like(logratios)
    return Evidence(
        Logps(policy, policy),
        Logps(reference, reference),
        ones,
        distances=None,
        scores=torch.full_like(logratios, NAN) if scores is None else scores,
        present=ones.bool() if present is None else present,
    )


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def test_plackett_luce_matches_hand_calculation() -> None:
    """
    r = log(3, 2, 1): 3/6, then 2/3 of what is left, then all of it; the second group has two completions.
    """
    logratios = torch.tensor([[3.0, 2.0, 1.0], [5.0, 1.0, 77.0]]).log()
    present = torch.tensor([[True, True, True], [True, True, False]])
    value = PlackettLuce(name="plackett_luce", beta=1.0).value(evidence_of(logratios, present=present))
    assert value.losses.tolist() == pytest.approx([-math.log(1 / 2 * 2 / 3), -math.log(5 / 6)], rel=1e-5)


def test_of_completions_with_equal_scores_none_is_better() -> None:
    """r = log(3, 2, 1), scores 2, 1, 1: 3/6 for the first; each of the others is alone with itself."""
    seen = evidence_of(torch.tensor([[3.0, 2.0, 1.0]]).log(), torch.tensor([[2.0, 1.0, 1.0]]))
    assert PlackettLuce(name="plackett_luce", beta=1.0).value(seen).losses.item() == about(math.log(2))


def test_a_list_of_two_is_a_pair() -> None:
    seen = evidence_of(torch.tensor([[0.7, -1.1], [2.0, 2.5]]))
    listed = PlackettLuce(name="plackett_luce", beta=0.3).value(seen)
    paired = Dpo(name="dpo", beta=0.3).value(seen)
    assert listed.losses.tolist() == pytest.approx(paired.losses.tolist(), rel=1e-5)
    assert listed.rewards.tolist() == paired.rewards.tolist()


def test_a_place_without_a_completion_has_no_gradient() -> None:
    logratios = torch.tensor([[0.5, -0.2, 9.0]], requires_grad=True)
    present = torch.tensor([[True, True, False]])
    for objective in (PlackettLuce(name="plackett_luce"), InfoNca(name="info_nca")):
        seen = evidence_of(logratios, torch.tensor([[2.0, 1.0, 5.0]]), present)
        (found,) = torch.autograd.grad(objective.value(seen).losses.sum(), logratios)
        assert found[0, 2] == 0
        assert (found[0, :2] != 0).all()


def test_info_nca_matches_hand_calculation() -> None:
    """
    scores / alpha = log(4, 2, 2), so 1/2, 1/4 and 1/4 are wanted; r = log(2, 1, 1): the policy chooses just so.
    The loss is the entropy of that, 3/2 log 2; where the policy is the reference, log 3.
    """
    scores = torch.tensor([[4.0, 2.0, 2.0]]).log() * 0.5
    objective = InfoNca(name="info_nca", beta=1.0, alpha=0.5)
    right = evidence_of(torch.tensor([[2.0, 1.0, 1.0]]).log(), scores)
    assert objective.value(right).losses.item() == about(1.5 * math.log(2))
    assert objective.value(evidence_of(torch.zeros(1, 3), scores)).losses.item() == about(math.log(3))


def test_info_nca_of_a_pair_becomes_dpo_as_the_temperature_falls() -> None:
    seen = evidence_of(torch.tensor([[0.7, -1.1]]), torch.tensor([[2.0, 1.0]]))
    found = InfoNca(name="info_nca", beta=0.3, alpha=0.01).value(seen).losses.item()
    assert found == about(Dpo(name="dpo", beta=0.3).value(seen).losses.item())
    assert found != about(NcaPair(name="nca_pair", beta=0.3).value(seen).losses.item())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("mismatched", "z"), [(0.5, 0.5), (-3.0, 0.0)])
def test_kto_matches_hand_calculation(mismatched: float, z: float) -> None:
    """desirable with logratio 2, undesirable with 1; z is no less than 0"""
    seen = evidence_of(torch.tensor([[2.0], [1.0]]))._replace(
        desirable=torch.tensor([True, False]), mismatched=torch.tensor(mismatched)
    )
    value = Kto(name="kto", beta=0.4, desirable_weight=3.0, undesirable_weight=0.5).value(seen)
    expected = [3 * (1 - sigmoid(0.4 * (2 - z))), 0.5 * (1 - sigmoid(0.4 * (z - 1)))]
    assert value.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert value.rewards.flatten().tolist() == pytest.approx([0.8, 0.4])


def test_of_single_completions_the_undesirable_ones_features_are_held() -> None:
    """With alpha 0.5 an undesirable completion's distance of 2 is a logratio more: 1 + 1."""
    distances = torch.tensor([[1.0], [2.0]], requires_grad=True)
    seen = evidence_of(torch.tensor([[2.0], [1.0]]))._replace(
        desirable=torch.tensor([True, False]), mismatched=torch.tensor(0.0), distances=distances
    )
    value = Kto(name="kto", beta=0.4, features=FeatureTerm(alpha=0.5)).total(seen)
    assert value.losses.tolist() == pytest.approx([1 - sigmoid(0.4 * 2.5), 1 - sigmoid(-0.4 * 2)], rel=1e-5)
    assert value.rewards.flatten().tolist() == pytest.approx([0.8, 0.4])
    value.losses.sum().backward()
    assert distances.grad is not None
    assert distances.grad[0] == 0
    assert distances.grad[1] > 0
