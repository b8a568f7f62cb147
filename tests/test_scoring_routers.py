"""The load-balancing loss of mixtures of experts is the family's own, over the packed tokens and no padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LLAMA_LIKE
from tiny_world import build_tiny_world
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fpo.errors import ModelError
from fpo.scoring import Layout, install_scoring, pack, router_coefficient
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_experts(family: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**LLAMA_LIKE, **EXPERTS[family], "initializer_range": 0.2, "output_router_logits": True, **settings}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def balancing_loss(per_layer: list[Tensor], experts: int, top_k: int) -> Tensor:
    """Eq. 4-6 of https://arxiv.org/abs/2101.03961 over all layers' tokens: E * sum of f_i * P_i, f over k choices."""
    probabilities = torch.cat(per_layer).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return experts * (chosen.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.MASKED])
@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_the_routers_loss_is_that_of_separate_rows_over_the_same_tokens(family: str, layout: Layout) -> None:
    """Two groups of other lengths, so that rows under masks are padded. The prompt counts once."""
    model = tiny_experts(family)
    rng = np.random.default_rng(0)
    sizes = np.array([5, 9, 4, 3, 2, 7])
    ids = rng.integers(3, 97, sizes.sum())
    splits = np.concatenate([[0], np.cumsum(sizes)])
    layers: list[list[Tensor]] = [[] for _ in range(3)]
    for start, chosen, rejected, end in zip(splits[:-1:3], splits[1::3], splits[2::3], splits[3::3], strict=True):
        for first, last, new in ((start, rejected, 0), (rejected, end, chosen - start)):
            row = ids[first:last] if new == 0 else np.concatenate([ids[start:chosen], ids[first:last]])
            logits = model(input_ids=torch.from_numpy(row)[None], output_router_logits=True).router_logits
            for layer, gate in zip(layers, logits, strict=True):
                layer.append(gate.reshape(len(row), -1)[new:].detach())
    expected = balancing_loss([torch.cat(layer) for layer in layers], 4, 2)
    whole = model(input_ids=torch.from_numpy(ids[:14])[None], output_router_logits=True)
    gates = [gate.reshape(14, -1) for gate in whole.router_logits]
    assert float(whole.aux_loss.detach()) == pytest.approx(float(balancing_loss(gates, 4, 2).detach()), rel=1e-5)

    install_scoring(model, routers=True)
    packed = pack(ids, splits, np.array([2, 2]), layout)
    assert bool((packed.group == -1).any()) is (layout is Layout.MASKED)
    found = model(**packed._asdict()).router_loss
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    found.backward()
    routers = [parameter.grad for name, parameter in model.named_parameters() if "gate.weight" in name]
    assert any(grad is not None and grad.abs().max() > 0 for grad in routers)


def test_training_adds_the_routers_loss_where_the_config_asks_for_it(tmp_path: Path) -> None:
    """At step 0 of DPO: log 2 + coefficient * aux_loss, and routers that no pair moves are moved by it alone."""
    weights = {}
    for asked in (False, True):
        world = build_tiny_world(tmp_path / f"world-{asked}", 8, 2)
        tiny_experts("mixtral", output_router_logits=asked, router_aux_loss_coef=0.5).save_pretrained(
            world.root / "model"
        )
        training = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-2, "save_strategy": "no"}
        recipe = world.recipe(features=[], objective={"name": "dpo"}, training=training)
        build_caches(recipe, world.store)
        align(recipe, find_cache(recipe, world.store), tmp_path / f"run-{asked}")
        row = read_metrics(tmp_path / f"run-{asked}" / METRICS_FILE)[0]
        weights[asked] = load_file(tmp_path / f"run-{asked}" / "model.safetensors")
        added = 0.5 * row["aux_loss"] if asked else 0.0
        assert row["loss"] == pytest.approx(np.log(2) + added, rel=1e-5)
        assert ("aux_loss" in row) == asked
        assert row.get("aux_loss", 1.0) > 0.5
    apart = [name for name in weights[True] if not torch.equal(weights[True][name], weights[False][name])]
    assert any("gate" in name for name in apart)


def test_a_family_without_a_known_router_loss_is_refused_where_its_config_asks_for_one() -> None:
    config = AutoConfig.for_model("llama", **LLAMA_LIKE)
    model = AutoModelForCausalLM.from_config(config)
    install_scoring(model, routers=True)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.01
    assert router_coefficient(model) == 0.01
    with pytest.raises(ModelError, match="llama: its config asks for the router's loss"):
        install_scoring(model, routers=True)
