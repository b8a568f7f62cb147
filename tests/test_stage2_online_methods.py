"""
Objectives that see tokens, distributions, single completions, lists or several hookpoints: a run from the cache and a
two-model loop written here, from the papers' and their authors' formulas, give the same losses step by step.

The loop knows nothing of the project but the order of the groups: one plain forward per completion and model, without
padding, packing or a cache. SGD, because its steps are as large as the gradient.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_stage2_offline_equals_online import BATCH, LEARNING_RATE, SGD, epoch_batches
from tiny_models import tiny_model
from tiny_world import WORDS, TinyWorld, build_tiny_world
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.units import draws, units_of
from fpo.store import Cache, Groups

pytestmark = pytest.mark.long

GROUPS = 24
STEPS = GROUPS // BATCH


class Said(NamedTuple):
    """What one model says about a completion."""

    tokens: Tensor
    """(T,) log-probs."""
    whole: Tensor
    """(T, V) log-probs of all tokens."""
    pooled: dict[int, Tensor]
    """Mean SAE activations after a layer."""


class Both(NamedTuple):
    """What policy and reference say about a completion."""

    policy: Said
    reference: Said

    @property
    def ratios(self) -> Tensor:
        return self.policy.tokens - self.reference.tokens

    @property
    def kl(self) -> Tensor:
        """KL(reference || policy), summed."""
        p, q = self.reference.whole, self.policy.whole
        return (p.exp() * (p - q)).sum()


class Online:
    """Both models in memory, and an SAE."""

    def __init__(self, world: TinyWorld, policy: str | None) -> None:
        folders = (world.root / "model", policy or world.root / "model")
        self.reference, self.policy = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
        self.sae = load_file(world.root / "sae" / "sae_weights.safetensors")

    def both(self, prompt: np.ndarray, completion: np.ndarray) -> Both:
        with torch.no_grad():
            reference = self._said(self.reference, prompt, completion)
        return Both(self._said(self.policy, prompt, completion), reference)

    def _said(self, model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Said:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        at = torch.arange(len(prompt), ids.shape[1]) - 1
        whole = output.logits[0, at].log_softmax(-1)
        pooled = {}
        for layer, states in enumerate(output.hidden_states[1:-1]):
            h = (states[0, at] - self.sae["b_dec"]) @ self.sae["W_enc"] + self.sae["b_enc"]
            pooled[layer] = (torch.relu(h) * (h > self.sae["threshold"])).mean(0)
        return Said(whole.gather(1, ids[0, at + 1][:, None])[:, 0], whole, pooled)


class Step(NamedTuple):
    """A step's groups."""

    online: Online
    groups: Groups
    epoch: int
    settings: dict[str, Any]
    everything: dict[int, list[np.ndarray]]
    """Prompt and completions of every group of the data, by its id."""

    def said(self) -> list[list[Both]]:
        """Of every group, its completions."""
        segments = [self.everything[int(group)] for group in self.groups.group_id]
        return [[self.online.both(prompt, one) for one in completions] for prompt, *completions in segments]

    def drawn(self) -> list[tuple[float, np.ndarray]]:
        """Of every pair, its own number and those of its tokens: chance is the project's, what it does is not."""
        units = units_of(self.groups, "best_rest")
        per_unit = self.groups.counted[units.completions].sum(1)
        heads, tokens = draws(self.groups, units, per_unit, 42, self.epoch)
        return list(zip(heads.tolist(), np.split(tokens, np.cumsum(per_unit)[:-1]), strict=True))


Loss = Callable[[Step], Tensor]


def of_pairs(loss: Callable[..., Tensor]) -> Loss:
    """The mean over pairs of a loss of (chosen, rejected)."""

    def mean(step: Step) -> Tensor:
        return torch.stack([loss(chosen, rejected, **step.settings) for chosen, rejected in step.said()]).mean()

    return mean


@of_pairs
def tdpo1(w: Both, o: Both, beta: float, **_: Any) -> Tensor:
    return -logsigmoid(beta * (w.ratios.sum() - o.ratios.sum()) - beta * (o.kl - w.kl))


@of_pairs
def tdpo2(w: Both, o: Both, beta: float, alpha: float, **_: Any) -> Tensor:
    return -logsigmoid(beta * (w.ratios.sum() - o.ratios.sum()) - alpha * beta * (o.kl - w.kl.detach()))


@of_pairs
def ld_dpo(w: Both, o: Both, beta: float, ld_alpha: float, **_: Any) -> Tensor:
    shared = min(len(w.ratios), len(o.ratios))
    h = [side.ratios[:shared].sum() + ld_alpha * side.ratios[shared:].sum() for side in (w, o)]
    return -logsigmoid(beta * (h[0] - h[1]))


@of_pairs
def adpo(w: Both, o: Both, beta: float, segments: int | None, window: int | None = None, **_: Any) -> Tensor:
    sizes = [len(w.ratios), len(o.ratios)]
    if segments is not None:
        m = min(segments, *sizes)
        cuts = [[i * size // m for i in range(m + 1)] for size in sizes]
    else:
        assert window is not None
        cuts = [list(range(0, max(sizes) + window, window))] * 2
    sums = [
        torch.stack([side.ratios[a:b].sum() for a, b in itertools.pairwise(cut)])
        for side, cut in zip((w, o), cuts, strict=True)
    ]
    return -logsigmoid(beta * (sums[0] - sums[1])).sum()


@of_pairs
def ada_dpo(w: Both, o: Both, beta: float, rho: float, tau_min: float, tau_max: float, **_: Any) -> Tensor:
    """Newton's method to its end, five steps of which llm_dpo/dpo_trainer.py of the authors' code takes."""
    z = beta * (w.ratios.sum() - o.ratios.sum())
    tau, fixed = 1.0, float(z.detach())
    for _step in range(50):
        s = 1 / (1 + np.exp(-fixed / tau))
        slope = -np.log(2 * s) + (1 - s) * fixed / tau + rho
        curvature = max(fixed**2 / tau**3 * s * (1 - s), 1e-6)
        tau = float(np.clip(tau - slope / curvature, tau_min, tau_max))
    return -tau * logsigmoid(z / tau) + (rho - np.log(2)) * tau


@of_pairs
def asft(w: Both, o: Both, beta: float, alignment_weight: float, sft_weight: float, **_: Any) -> Tensor:
    means = [side.policy.tokens.mean() for side in (w, o)]
    odds = [mean - torch.log1p(-mean.exp()) for mean in means]
    return -sft_weight * means[0] + alignment_weight * (-logsigmoid(beta * odds[0]) - logsigmoid(-beta * odds[1]))


def sail_dp(step: Step) -> Tensor:
    """DDP of cdpo/cdpo_trainer.py, github.com/xudongwu-0/SAIL."""
    beta, share, rho = (step.settings[name] for name in ("beta", "share", "rho"))
    losses = []
    for (w, o), (draw, _) in zip(step.said(), step.drawn(), strict=True):
        u = beta * (w.ratios.sum() - o.ratios.sum())
        ddp = draw < share
        b = 1.0 if ddp and draw / share < 1 - torch.sigmoid(u).item() else 0.0
        u = (1 - 2 * b) * u
        losses.append(-logsigmoid(u) - (rho / 2) * ddp * logsigmoid(u) ** 2)
    return torch.stack(losses).mean()


def sampo(step: Step) -> Tensor:
    losses = []
    for (w, o), (_, numbers) in zip(step.said(), step.drawn(), strict=True):
        shared = min(len(w.ratios), len(o.ratios))
        parts = np.split(numbers, [len(w.ratios)])
        h = [side.ratios[np.argsort(own)[:shared]].sum() for side, own in zip((w, o), parts, strict=True)]
        losses.append(-logsigmoid(step.settings["beta"] * (h[0] - h[1])))
    return torch.stack(losses).mean()


def kto(step: Step) -> Tensor:
    """TRL's KTOTrainer, with the completions that the cache has behind each prompt."""
    beta, lambdas = step.settings["beta"], [step.settings[f"{side}_weight"] for side in ("desirable", "undesirable")]
    longest = max(len(prompt) + len(one) for prompt, *several in step.everything.values() for one in several)
    others = []
    for group in step.groups.group_id.astype(int):
        prompt, before = step.everything[group][0], step.everything[(group - 1) % GROUPS][1]
        others.append(step.online.both(prompt, before[: longest - len(prompt)]).ratios.sum())
    z = torch.stack(others).mean().detach().clamp(min=0)
    losses = []
    for w, o in step.said():
        losses.append(lambdas[0] * (1 - torch.sigmoid(beta * (w.ratios.sum() - z))))
        losses.append(lambdas[1] * (1 - torch.sigmoid(beta * (z - o.ratios.sum()))))
    return torch.stack(losses).mean()


@of_pairs
def dpo_constrained(w: Both, o: Both, beta: float, features: dict[str, Any], **_: Any) -> Tensor:
    """Distances over two hookpoints added, of the features that count alone."""
    held = []
    for side in (w, o):
        total = torch.zeros(())
        for layer in (0, 1):
            ours, theirs = side.policy.pooled[layer], side.reference.pooled[layer]
            top = theirs.topk(features["k"]).indices
            top = top[theirs[top] > 0]
            apart = ours[top] - theirs[top]
            total = total + (apart.abs() if features["distance"] == "l1" else apart.square()).sum() / features["k"]
        held.append(total)
    margin = w.ratios.sum() - o.ratios.sum() - features["alpha"] * (held[1] - held[0].detach())
    return -logsigmoid(beta * margin)


@of_pairs
def dpo_weighted(w: Both, o: Both, beta: float, features: dict[str, Any], **_: Any) -> Tensor:
    """The cosine of weighted features after one layer."""
    held = []
    for side in (w, o):
        ours, theirs = side.policy.pooled[1], side.reference.pooled[1]
        scale = torch.ones_like(theirs)
        scale[list(features["exclude"])] = 0
        for index, weight in features["weights"].items():
            scale[index] *= weight**0.5
        keep = torch.zeros_like(theirs)
        keep[theirs.topk(features["k"]).indices] = 1
        a, b = ours * scale * keep * (theirs > 0), theirs * scale * keep
        held.append(1 - (a @ b) / (a.norm() * b.norm()))
    margin = w.ratios.sum() - o.ratios.sum() - features["alpha"] * (held[1] - held[0].detach())
    return -logsigmoid(beta * margin)


def plackett_luce(step: Step) -> Tensor:
    losses = []
    for several in step.said():
        r = [step.settings["beta"] * one.ratios.sum() for one in several]
        losses.append(-sum(r[k] - torch.stack(r[k:]).logsumexp(0) for k in range(len(r))))
    return torch.stack(losses).mean()


def info_nca(step: Step) -> Tensor:
    losses = []
    for several, scores in zip(
        step.said(), np.split(step.groups.score, step.groups.completion_starts[1:-1]), strict=True
    ):
        r = torch.stack([step.settings["beta"] * one.ratios.sum() for one in several])
        wanted = torch.from_numpy(scores / step.settings["alpha"]).softmax(0)
        losses.append(-(wanted * r.log_softmax(0)).sum())
    return torch.stack(losses).mean()


LAYERS = ["model.layers.0", "model.layers.1"]
PAIRS: list[tuple[dict[str, Any], Loss]] = [
    ({"name": "tdpo1", "beta": 0.3}, tdpo1),
    ({"name": "tdpo2", "beta": 0.3, "alpha": 0.7}, tdpo2),
    ({"name": "ld_dpo", "beta": 0.5, "ld_alpha": 0.3}, ld_dpo),
    ({"name": "adpo", "beta": 0.5, "segments": 3}, adpo),
    ({"name": "adpo", "beta": 0.5, "segments": None, "window": 4}, adpo),
    ({"name": "ada_dpo", "beta": 3.0, "rho": 0.2, "tau_min": 0.5}, ada_dpo),
    ({"name": "asft", "beta": 0.7, "sft_weight": 0.5}, asft),
    ({"name": "sail_dp", "beta": 0.5, "rho": 0.4}, sail_dp),
    ({"name": "sampo", "beta": 0.5}, sampo),
    ({"name": "kto", "beta": 2.0, "undesirable_weight": 1.5}, kto),
    (
        {"name": "dpo", "features": {"alpha": 30.0, "k": 8, "hookpoints": LAYERS, "distance": "l2"}},
        dpo_constrained,
    ),
    (
        {
            "name": "dpo",
            "beta": 0.5,
            "features": {
                "alpha": 500.0, "k": 8, "hookpoints": LAYERS[1:], "distance": "cosine", "exclude": [3, 4, 5, 6, 7, 8],
                "weights": {20: 9.0, 21: 0.25, 30: 4.0},
            },
        },
        dpo_weighted,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), GROUPS, 4)


def options(world: TinyWorld) -> dict[str, Any]:
    """Everything that any of them asks for; of the reference's distributions, all."""
    vocabulary = json.loads((world.root / "model" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    entry = world.raw_recipe()["features"][0]
    return {
        "cache": {"top_logits": vocabulary, "mismatched": True},
        "features": [{**entry, "hookpoint": hookpoint} for hookpoint in LAYERS],
    }


def compared(world: TinyWorld, recipe: Recipe, loss: Loss, run: Path, least: float = 1e-3) -> None:
    built = build_caches(recipe, world.store)[0].cache
    align(recipe, find_cache(recipe, world.store), run)
    offline = [row["loss"] for row in read_metrics(run / METRICS_FILE)]
    online = online_losses(world, recipe, built, loss)
    assert len(offline) == len(online) == STEPS
    # The losses must move, or the comparison would not see a wrong gradient.
    assert max(abs(value - online[0]) for value in online) > least
    # Sums of about 100 nats are rounded to 1e-5 on either side, and beta times that stands in a loss.
    assert offline == pytest.approx(online, rel=5e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("objective", "loss"), PAIRS, ids=[f"{n}-{objective['name']}" for n, (objective, _) in enumerate(PAIRS)]
)
def test_offline_equals_online(world: TinyWorld, objective: dict[str, Any], loss: Loss, tmp_path: Path) -> None:
    recipe = world.recipe(objective=objective, training={**SGD, "num_train_epochs": 1}, **options(world))
    compared(world, recipe, loss, tmp_path)


def test_offline_equals_online_where_the_distance_has_a_kink_at_the_reference(world: TinyWorld, tmp_path: Path) -> None:
    """From another policy: at the reference itself the sign of an absolute difference is that of its rounding."""
    folder = tmp_path / "policy"
    tiny_model("llama", seed=4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.root / "model").save_pretrained(folder)
    objective = {"name": "dpo", "features": {"alpha": 30.0, "k": 8, "hookpoints": LAYERS, "distance": "l1"}}
    training = {**SGD, "num_train_epochs": 1}
    recipe = world.recipe(objective=objective, policy={"model": str(folder)}, training=training, **options(world))
    compared(world, recipe, dpo_constrained, tmp_path / "run")


@pytest.mark.parametrize(("name", "loss"), [("plackett_luce", plackett_luce), ("info_nca", info_nca)])
def test_offline_equals_online_on_lists(tmp_path: Path, name: str, loss: Loss) -> None:
    """Two to four completions each, in the order of their scores."""
    world = build_tiny_world(tmp_path / "world", GROUPS, 4)
    rng = np.random.default_rng(5)
    rows = []
    for row in range(GROUPS):
        n = 2 + row % 3
        texts = [" " + " ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(n)]
        scores = (np.argsort(rng.random(n)) + rng.random()).round(3).tolist()
        rows.append({"prompt": " ".join(rng.choice(WORDS, 5)), "completions": texts, "scores": scores})
    path = world.root / "pairs" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objective = {"name": name, "beta": 0.5}
    recipe = world.recipe(
        objective=objective, features=[], data={"eval_split": None}, training={**SGD, "num_train_epochs": 1}
    )
    compared(world, recipe, loss, tmp_path / "run")


def online_losses(world: TinyWorld, recipe: Recipe, cache: Cache, loss: Loss) -> list[float]:
    """What the loop says of every step of one epoch."""
    online = Online(world, recipe.policy.model)
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    segments = np.split(groups.input_ids, groups.splits[1:-1].astype(int))
    bounds = np.cumsum([0, *(groups.n_completions.astype(int) + 1)])
    everything = {
        int(group): segments[a:b] for group, a, b in zip(groups.group_id, bounds[:-1], bounds[1:], strict=True)
    }
    optimiser = torch.optim.SGD(online.policy.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (STEPS - step) / STEPS)
    losses = []
    for batch in epoch_batches(cache, recipe, 0):
        value = loss(Step(online, batch, 0, recipe.objective.model_dump(), everything))
        value.backward()
        torch.nn.utils.clip_grad_norm_(online.policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(value.item())
    return losses
