"""
A run from the cache and a two-model loop written here - plain padded forwards, a dense SAE, nothing of the project's
arithmetic - give the same losses, step by step.

SGD, because its steps are as large as the gradient: AdamW would hide a wrong scale, and turns the rounding of gradients
that are almost zero into whole steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import TinyWorld, add_conversations, build_tiny_world, user_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.order import cut_batches, epoch_blocks
from fpo.stage2_align.run import METRICS_FILE
from fpo.store import Cache, Groups

EVERY_TOKEN_COUNTS = np.empty(0, np.int64)
STEPS = 20
BATCH = 4
LEARNING_RATE = 3e-3


SGD = {"optim": "sgd", "learning_rate": LEARNING_RATE}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def conversations(world: TinyWorld) -> dict[str, Any]:
    return add_conversations(world, n_train=16, n_test=4)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "fpo", "feature_set": "reference"},
        {"name": "fpo", "feature_set": "union"},
        {"name": "fpo", "feature_set": "policy"},
        {"name": "dpo", "beta": 0.1},
        {"name": "simpo", "beta": 2.0, "gamma": 0.5},
    ],
    ids=lambda objective: f"{objective['name']}-{objective.get('feature_set', '')}".rstrip("-"),
)
def test_offline_equals_online(world: TinyWorld, objective: dict[str, object], tmp_path: Path) -> None:
    top_k = "all" if objective.get("feature_set") in ("union", "policy") else 8
    feature = {**world.raw_recipe()["features"][0], "top_k": top_k}
    recipe = world.recipe(features=[feature], training=SGD, objective=objective)
    cache = build_caches(recipe, world.store)[0].cache
    align(recipe, cache, tmp_path / "run")
    offline = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE)]
    online = online_losses(world, recipe, cache)
    assert len(offline) == len(online) == STEPS
    # The losses must move, or the comparison would not see a wrong gradient.
    assert max(abs(loss - online[0]) for loss in online) > 1e-3
    assert offline == pytest.approx(online, rel=1e-5)


@pytest.mark.parametrize(("name", "beta"), [("fpo", 2.0), ("dpo", 0.1), ("simpo", 2.0)])
def test_what_a_mask_leaves_out_counts_neither_offline_nor_online(
    world: TinyWorld, conversations: dict[str, Any], name: str, beta: float, tmp_path: Path
) -> None:
    """Conversations where the assistant's tokens alone count, in log-probs, in means and in pooled features."""
    recipe = world.recipe(data=conversations, training=SGD, objective={"name": name, "beta": beta})
    cache = build_caches(recipe, world.store)[0].cache
    mask = cache.shard(0).score_mask
    assert mask is not None
    assert 0.2 < mask.mean() < 0.9
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-5)
    offline = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE)]
    online = online_losses(world, recipe, cache, uncounted=user_tokens())
    assert len(offline) == 8
    assert offline == pytest.approx(online, rel=1e-5)
    # The mask must move the losses, or the comparison would not see a token too many.
    unmasked = online_losses(world, recipe, cache)
    assert max(abs(a - b) for a, b in zip(online, unmasked, strict=True)) > 1e-3


def test_the_feature_gradient_is_large_enough_to_matter(world: TinyWorld) -> None:
    """Without it, the losses differ by far more than the tolerance above, which would notice its absence."""
    recipe = world.recipe(training=SGD)
    cache = build_caches(recipe, world.store)[0].cache
    full = online_losses(world, recipe, cache)
    detached = online_losses(world, recipe, cache, feature_gradient=False)
    assert max(abs(a - b) / a for a, b in zip(full, detached, strict=True)) > 1e-3


def online_losses(
    world: TinyWorld,
    recipe: Recipe,
    cache: Cache,
    *,
    feature_gradient: bool = True,
    uncounted: np.ndarray = EVERY_TOKEN_COUNTS,
) -> list[float]:
    """
    FPO, DPO or SimPO with both models in memory, from the papers' equations.

    uncounted  ids of the tokens that do not count
    """
    reference = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    policy = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    sae = load_file(world.root / "sae" / "sae_weights.safetensors")
    optimiser = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE)
    steps = 2 * -(-cache.n_groups // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (steps - step) / steps)
    losses = []
    for epoch in (0, 1):
        for pairs in epoch_batches(cache, recipe, epoch):
            loss = torch.stack(
                [
                    pair_loss(pairs, p, policy, reference, sae, recipe, feature_gradient, uncounted)
                    for p in range(len(pairs))
                ]
            )
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(loss.mean().item())
    return losses


def epoch_batches(cache: Cache, recipe: Recipe, epoch: int) -> Iterator[Groups]:
    """The pairs of each step: the order is the project's, everything computed from them is not."""
    everything = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    for index, block in enumerate(epoch_blocks(cache.shard_groups, seed=42, epoch=epoch, batch=BATCH)):
        pairs = everything.take(block.rows)
        for positions in cut_batches(pairs.sizes, index, seed=42, epoch=epoch, batch=BATCH):
            yield pairs.take(positions)


def pair_loss(
    pairs: Groups,
    p: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    sae: dict[str, Tensor],
    recipe: Recipe,
    feature_gradient: bool,
    uncounted: np.ndarray,
) -> Tensor:
    objective = recipe.objective.model_dump()
    start, chosen, rejected, end = pairs.splits[3 * p : 3 * p + 4].astype(int)
    prompt = pairs.input_ids[start:chosen]
    completions = [pairs.input_ids[chosen:rejected], pairs.input_ids[rejected:end]]
    counting = [torch.from_numpy(~np.isin(completion, uncounted)) for completion in completions]
    logps, pooled = forward_padded(policy, prompt, completions, counting, sae)
    with torch.no_grad():
        ref_logps, ref_pooled = forward_padded(reference, prompt, completions, counting, sae)
    sizes = torch.stack([counts.sum() for counts in counting]).float()
    beta = objective["beta"]
    if objective["name"] == "dpo":
        ratios = logps - ref_logps
        return -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
    if objective["name"] == "simpo":
        means = logps / sizes
        return -torch.nn.functional.logsigmoid(beta * (means[0] - means[1]) - objective["gamma"])
    ratios = (logps - ref_logps) / sizes
    d_chosen, d_rejected = (
        distance(pooled[side], ref_pooled[side], objective["k"], objective["feature_set"]) for side in (0, 1)
    )
    if not feature_gradient:
        d_rejected = d_rejected.detach()
    u = beta * ((ratios[0] - ratios[1]) - objective["alpha"] * (d_rejected - d_chosen.detach()))
    return -torch.nn.functional.logsigmoid(u)


def forward_padded(
    model: PreTrainedModel,
    prompt: np.ndarray,
    completions: list[np.ndarray],
    counting: list[Tensor],
    sae: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """
    Summed log-probs (2,) and mean SAE activations (2, d_sae) of both completions, as two right-padded rows, over the
    tokens that are `counting`.
    """
    width = len(prompt) + max(len(completion) for completion in completions)
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, completion in enumerate(completions):
        size = len(prompt) + len(completion)
        ids[row, :size] = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        mask[row, :size] = 1
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    all_logps = output.logits.log_softmax(-1)
    layer_1 = output.hidden_states[2]  # [0] is the embedding, [i + 1] the output of layer i below the last
    logps, pooled = [], []
    for row, completion in enumerate(completions):
        here = torch.arange(len(prompt), len(prompt) + len(completion))[counting[row]]
        logps.append(all_logps[row, here - 1, ids[row, here]].sum())
        h = (layer_1[row, here - 1] - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]
        pooled.append((torch.relu(h) * (h > sae["threshold"])).mean(0))
    return torch.stack(logps), torch.stack(pooled)


def distance(policy: Tensor, reference: Tensor, k: int, feature_set: str) -> Tensor:
    chosen = torch.zeros_like(reference, dtype=torch.bool)
    if feature_set in ("reference", "union"):
        chosen[reference.topk(k).indices] = True
        chosen &= (reference > 0) | (policy.detach() > 0) if feature_set == "union" else reference > 0
    if feature_set in ("policy", "union"):
        own = torch.zeros_like(chosen)
        own[policy.topk(k).indices] = True
        chosen |= own & (policy > 0)
    return (policy - reference).square()[chosen].sum() / k
