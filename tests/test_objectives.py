"""Losses and gradients against hand derivations; what an objective asks of a cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from fpo.objectives import (
    OBJECTIVES,
    Dpo,
    Evidence,
    FeatureTerm,
    Fpo,
    Logps,
    Needs,
    Simpo,
    feature_distance,
)
from fpo.objectives.dpo import dpo
from fpo.objectives.features import FeatureSet
from fpo.objectives.fpo import fpo
from fpo.objectives.simpo import simpo
from fpo.objectives.trl_names import LOSSES


def logps(*pairs: tuple[float, float], lengths: tuple[float, float] = (1.0, 1.0)) -> Logps:
    sums = torch.tensor(pairs, dtype=torch.float32).view(-1, 2)
    return Logps(sums, sums / torch.tensor(lengths))


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def test_dpo_loss_matches_hand_calculation() -> None:
    """
    chosen logratios   = [-0.5, -10, -1] - [-0.5, -10.1, -0.1] = [0, 0.1, -0.9]
    rejected logratios = [-0.1, -30, -21] - [-0.1, -20.1, -0.1] = [0, -9.9, -20.9]
    loss               = -log sigmoid(0.1 * [0, 10, 20])
    """
    policy = logps((-0.5, -0.1), (-10.0, -30.0), (-1.0, -21.0))
    reference = logps((-0.5, -0.1), (-10.1, -20.1), (-0.1, -0.1))
    value = dpo(policy, reference, beta=0.1)
    assert value.losses.tolist() == pytest.approx([minus_log_sigmoid(x) for x in (0.0, 1.0, 2.0)], rel=1e-5)
    assert value.rewards.flatten().tolist() == pytest.approx([0, 0, 0.01, -0.99, -0.09, -2.09], abs=1e-5)


def test_simpo_loss_matches_hand_calculation() -> None:
    """
    mean logps = -6 / 3 = -2 chosen, -6 / 2 = -3 rejected; u = 2 * (-2 + 3) - 0.5 = 1.5
    """
    lengths = torch.tensor([[3.0, 2.0]])
    value = simpo(logps((-6.0, -6.0), lengths=(3.0, 2.0)), lengths, beta=2.0, gamma=0.5)
    assert value.losses.tolist() == pytest.approx([minus_log_sigmoid(1.5)])
    assert value.rewards.tolist() == [[-4.0, -6.0]]


def test_fpo_loss_matches_hand_calculation() -> None:
    """
    mean logratios   chosen (-6 + 9) / 3 = 1, rejected (-8 + 6) / 2 = -1: margin 2
    feature term     0.5 * (D_rejected 3 - D_chosen 1) = 1
    u                0.2 * (2 - 1) = 0.2
    """
    policy, reference = logps((-6.0, -8.0), lengths=(3.0, 2.0)), logps((-9.0, -6.0), lengths=(3.0, 2.0))
    value = fpo(policy, reference, torch.tensor([[1.0, 3.0]]), beta=0.2, alpha=0.5)
    assert value.losses.tolist() == pytest.approx([minus_log_sigmoid(0.2)], rel=1e-6)
    assert value.rewards.tolist() == [pytest.approx([0.2, -0.2])]


def test_fpo_gradients_match_the_derivation_and_the_chosen_side_gets_none_from_the_feature_term() -> None:
    """
    L = -log sigmoid(u), dL/du = sigmoid(u) - 1
    u = beta * [(s_w - s_l) / n - alpha * (D_l - sg(D_w))] with both completions n = 2 tokens
    dL/ds_w = (sigmoid(u) - 1) * beta / 2,  dL/ds_l = -dL/ds_w
    dL/dD_l = (sigmoid(u) - 1) * -beta * alpha,  dL/dD_w = 0
    """
    sums = torch.tensor([[-4.0, -6.0]], requires_grad=True)
    distances = torch.tensor([[0.5, 0.2]], requires_grad=True)
    value = fpo(Logps(sums, sums / 2), logps((-5.0, -5.0), lengths=(2.0, 2.0)), distances, beta=0.3, alpha=0.7)
    value.losses.sum().backward()
    u = 0.3 * ((0.5 - (-0.5)) - 0.7 * (0.2 - 0.5))
    slope = 1 / (1 + math.exp(-u)) - 1
    assert sums.grad is not None
    assert distances.grad is not None
    assert sums.grad.flatten().tolist() == pytest.approx([slope * 0.15, -slope * 0.15], rel=1e-5)
    assert distances.grad.flatten().tolist() == pytest.approx([0.0, -slope * 0.3 * 0.7], rel=1e-5)


def test_an_objective_is_its_formula_with_its_own_settings() -> None:
    """
    summed logratios  chosen -6 + 9 = 3, rejected -8 + 6 = -2        dpo    0.5 * (3 + 2) = 2.5
    mean logps        chosen -6 / 3 = -2, rejected -8 / 2 = -4       simpo  3 * (-2 + 4) - 4 = 2
    mean logratios    chosen 1, rejected -1; D_rejected - D_chosen 2 fpo    0.2 * (2 - 0.7 * 2) = 0.12
    """
    policy, reference = logps((-6.0, -8.0), lengths=(3.0, 2.0)), logps((-9.0, -6.0), lengths=(3.0, 2.0))
    lengths, nothing = torch.tensor([[3.0, 2.0]]), torch.full((1, 2), math.nan)
    evidence = Evidence(policy, reference, lengths, torch.tensor([[1.0, 3.0]]), nothing)
    for objective, u in (
        (Dpo(name="dpo", beta=0.5), 2.5),
        (Simpo(name="simpo", beta=3.0, gamma=4.0), 2.0),
        (Fpo(name="fpo", beta=0.2, alpha=0.7), 0.12),
    ):
        assert objective.value(evidence).losses.tolist() == pytest.approx([minus_log_sigmoid(u)], rel=1e-5)


def test_an_objective_says_what_it_asks_of_a_cache() -> None:
    assert Dpo(name="dpo").needs == Needs(reference=True, features=None)
    assert Simpo(name="simpo").needs == Needs(reference=False, features=None)
    assert Fpo(name="fpo", alpha=0.0).needs == Needs(reference=True)
    constrained = Fpo(name="fpo", k=7, feature_set="union", hookpoints=["model.layers.3"])
    assert constrained.needs == Needs(reference=True, features=constrained)
    term = FeatureTerm(k=7)
    assert Simpo(name="simpo", features=term).needs == Needs(reference=True, features=term)
    assert Dpo(name="dpo", features=FeatureTerm(alpha=0.0)).needs == Needs(reference=True)


@pytest.mark.parametrize(
    ("feature_set", "top_k", "exact"),
    [
        ("reference", 8, True),
        ("reference", 7, False),
        ("reference", "all", True),
        ("union", 10**6, False),
        ("union", "all", True),
        ("policy", 8, False),
        ("policy", "all", True),
    ],
)
def test_the_policys_own_features_are_known_only_where_the_cache_holds_all(
    feature_set: FeatureSet, top_k: int | Literal["all"], exact: bool
) -> None:
    assert FeatureTerm(k=8, feature_set=feature_set).exact_from(top_k) == exact


def test_every_objective_has_its_row_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert [name for name in OBJECTIVES if f"\n| `{name}` | " not in page] == []


def test_a_name_that_is_an_objective_is_not_answered_with_another() -> None:
    assert not LOSSES.keys() & OBJECTIVES.keys()


def test_the_loss_is_log_2_where_the_policy_is_the_reference() -> None:
    same = logps((-3.0, -7.0), (-1.0, -2.0), lengths=(3.0, 5.0))
    nothing = torch.zeros(2, 2)
    log_2 = pytest.approx([math.log(2)] * 2)
    assert dpo(same, same, beta=0.1).losses.tolist() == log_2
    assert fpo(same, same, nothing, beta=0.1, alpha=0.5).losses.tolist() == log_2
    assert fpo(same, same, None, beta=0.1, alpha=0.0).losses.tolist() == log_2


def test_fpo_without_a_feature_term_is_length_normalised_dpo() -> None:
    """TRL's loss_type sigmoid_norm: the same margin of mean logratios."""
    policy, reference = logps((-6.0, -8.0), lengths=(3.0, 2.0)), logps((-9.0, -6.0), lengths=(3.0, 2.0))
    margin = (-6 + 9) / 3 - (-8 + 6) / 2
    assert fpo(policy, reference, None, beta=0.1, alpha=0.0).losses.tolist() == pytest.approx(
        [minus_log_sigmoid(0.1 * margin)]
    )


def test_the_distance_divides_by_k_however_many_features_count() -> None:
    """
    first row   (1 - 3)^2 + (2 - 2)^2 = 4 over k = 4
    second row  only the first counts: (5 - 4)^2 = 1 over k = 4
    """
    policy = torch.tensor([[1.0, 2.0], [5.0, 9.0]])
    reference = torch.tensor([[3.0, 2.0], [4.0, 0.0]])
    valid = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert feature_distance(policy, reference, valid, k=4).tolist() == [1.0, 0.25]


def test_a_feature_that_does_not_count_gets_no_gradient() -> None:
    policy = torch.tensor([[1.0, 2.0]], requires_grad=True)
    distance: Tensor = feature_distance(policy, torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), k=1)
    distance.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[2.0, 0.0]]
