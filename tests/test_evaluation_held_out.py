"""What stands behind held-out means: pairs against a plain loop, intervals, subsets, displacement, own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import CacheMissing, RecipeError
from fpo.evaluation.correlation import pearson, ranks, spearman
from fpo.evaluation.estimates import clustered_mean
from fpo.evaluation.evaluate import Speaking, evaluate
from fpo.evaluation.held_out import PairNotes, Pairs, report
from fpo.evaluation.own_samples import token_statistics
from fpo.evaluation.sampling import Sampling
from fpo.recipe import Filter
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.displacement import GRAM, Ches, ches, without_worst
from fpo.stage2_align.units import units_of
from fpo.store import Cache

BETA = 0.5
N_TEST = 24
SUBSETS = ("alpacaeval-easy", "hep-python")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Held-out rows say which of two subsets they are of, as RewardBench's do."""
    world = build_tiny_world(tmp_path_factory.mktemp("held-out"), 16, N_TEST)
    path = world.root / "pairs" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "subset": SUBSETS[place % 3 == 0]}) for place, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_caches(recipe_of(world), world.store)
    return world


@pytest.fixture(scope="module")
def run(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    align(recipe_of(world), find_cache(recipe_of(world), world.store), folder)
    return folder


def recipe_of(world: TinyWorld, **sections: Any) -> Any:
    training = {"learning_rate": 3e-3, "max_steps": 6, "save_strategy": "no"}
    own = {"features": [], "objective": {"name": "dpo", "beta": BETA}, "cache": {"hidden_gram": True}}
    return world.recipe(**{**own, "training": training, **sections})


def held_out(world: TinyWorld) -> Cache:
    return find_cache(recipe_of(world), world.store, held_out=True)


def noted(world: TinyWorld, run: Path) -> tuple[dict[str, float], Pairs]:
    cache = held_out(world)
    notes = PairNotes(cache, "best_rest")
    return evaluate_run(recipe_of(world), cache, run, note=notes.note), notes.pairs()


def completions_of(cache: Cache) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    """By group: prompt and completion ids of each of its two completions."""
    found = {}
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        parts = np.split(groups.input_ids.astype(np.int64), groups.splits[1:-1].astype(int))
        for row, group in enumerate(groups.group_id.tolist()):
            prompt, *completions = parts[3 * row : 3 * row + 3]
            found[group] = [(prompt, completion) for completion in completions]
    return found


@torch.no_grad()
def plain_logps(folder: Path, prompt: np.ndarray, completion: np.ndarray) -> float:
    """Transformers' own forward over one sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(np.concatenate([prompt, completion]))
    logps = model(ids[None]).logits[0].double().log_softmax(-1)
    return float(sum(logps[place - 1, ids[place]] for place in range(len(prompt), len(ids))))


def test_pairs_are_those_of_a_plain_loop_and_their_means_are_the_metrics(world: TinyWorld, run: Path) -> None:
    """Rewards are beta times the logratios, the loss -log sigmoid of their difference."""
    metrics, pairs = noted(world, run)
    assert pairs.group.tolist() == list(range(N_TEST))
    for row, both in list(completions_of(held_out(world)).items())[::5]:
        logratios = [plain_logps(run, *one) - plain_logps(world.root / "model", *one) for one in both]
        assert pairs.logratios[row] == pytest.approx(logratios, abs=1e-4)
        assert pairs.rewards[row] == pytest.approx([BETA * ratio for ratio in logratios], abs=1e-4)
        loss = np.log1p(np.exp(-BETA * (logratios[0] - logratios[1])))
        assert pairs.loss[row] == pytest.approx(loss, abs=1e-4)
        assert pairs.tokens[row].tolist() == [len(completion) for _, completion in both]
    said = report(pairs)
    for name, mean in said["intervals"].items():
        assert mean["value"] == pytest.approx(metrics[name], abs=1e-6), name
        assert mean["low"] < mean["value"] < mean["high"], name


def test_ches_is_that_of_summed_hidden_states(world: TinyWorld) -> None:
    """The positions from the prompt's last token to the one before the completion's last, after the final norm."""
    model = AutoModelForCausalLM.from_pretrained(world.root / "model")
    cache = held_out(world)
    cache.read_columns([GRAM])
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        found = ches(groups, units_of(groups, "best_rest"))
        texts = completions_of(cache)
        for row, group in enumerate(groups.group_id.tolist()):
            sums, sizes = [], []
            for prompt, completion in texts[group]:
                ids = torch.from_numpy(np.concatenate([prompt, completion]))
                with torch.no_grad():
                    states = model.model(ids[None]).last_hidden_state[0].double()
                sums.append(states[len(prompt) - 1 : -1].sum(0))
                sizes.append(len(completion))
            chosen, rejected = sums
            assert found.raw[row] == pytest.approx(float(chosen @ rejected - chosen @ chosen), rel=1e-4)
            chosen, rejected = chosen / sizes[0], rejected / sizes[1]
            assert found.normalised[row] == pytest.approx(float(chosen @ rejected - chosen @ chosen), rel=1e-4)


@pytest.mark.parametrize("by", ["ches", "length_normalised_ches"])
def test_a_filter_leaves_out_the_worst_share_and_nothing_else(world: TinyWorld, by: str) -> None:
    """A quarter of 24: the 6 groups of the largest scores, and reading everything again has all."""
    cache = held_out(world)
    cache.read_columns([GRAM])
    scores, ids = [], []
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        found = ches(groups, units_of(groups, "best_rest"))
        scores.append(found.raw if by == "ches" else found.normalised)
        ids.append(groups.group_id)
    worst = np.concatenate(ids)[np.argsort(np.concatenate(scores))[-6:]]
    filtered = without_worst(cache, "best_rest", Filter.model_validate({"drop": 0.25, "by": by}))
    cache.keep(filtered.kept)
    kept = np.concatenate([cache.shard(sid).group_id for sid in range(len(cache.shard_groups))])
    assert sorted(kept.tolist()) == sorted(set(range(N_TEST)) - set(worst.tolist()))
    assert (filtered.n_dropped, cache.n_groups, cache.n_completions) == (6, 18, 36)
    cache.keep(None)
    assert (cache.n_groups, cache.n_completions) == (24, 48)


def test_a_filter_trains_on_the_rest_and_changes_no_key(world: TinyWorld, tmp_path: Path) -> None:
    data = {**world.raw_recipe()["data"], "filter": {"drop": 0.25}}
    recipe = recipe_of(world, data=data, training={"num_train_epochs": 1, "save_strategy": "no"})
    cache = find_cache(recipe, world.store)
    assert cache.key == find_cache(recipe_of(world), world.store).key
    # 12 of 16 pairs are 3 steps of 4.
    assert align(recipe, cache, tmp_path / "run").steps == 3
    # The next run of a sweep, on the same cache, has all of them.
    every = recipe_of(world, training={"num_train_epochs": 1, "save_strategy": "no"})
    assert align(every, cache, tmp_path / "all").steps == 4


def test_a_filter_without_its_column_says_how_to_add_it(tmp_path: Path) -> None:
    """The recipe must ask for the column; then the cache that lacks it says what adds it."""
    world = build_tiny_world(tmp_path, 8, 2)
    with pytest.raises(RecipeError, match=r"hidden_gram.*set it to true"):
        recipe_of(world, cache={}, data={"filter": {"drop": 0.5}})
    plain = recipe_of(world, cache={})
    build_caches(plain, world.store)
    with pytest.raises(CacheMissing, match=r"no column of hidden gram .* add it with: fpo cache"):
        without_worst(find_cache(plain, world.store), "best_rest", Filter(drop=0.5))


def hand_made(margins: list[float], group: list[int], **changes: Any) -> Pairs:
    """Pairs whose rejected reward is 0."""
    n = len(margins)
    share = 1 / np.bincount(group)[group]
    rewards = np.stack([np.array(margins), np.zeros(n)], axis=1)
    own = {"logratios": rewards, "tokens": np.full((n, 2), 4), "prompt": np.array(group, np.uint64), **changes}
    ids = np.array(group, np.uint64)
    return Pairs(group=ids, share=share, loss=np.ones(n), rewards=rewards, ches=own.pop("ches", None), **own)


def test_a_group_of_four_is_right_where_chosen_beats_all_three() -> None:
    """RewardBench 2: two of the three groups are right; by pairs it is (1 + 2/3 + 1) / 3 of them."""
    margins = [1, 2, 3, 1, -1, 2, 3, 3, 3]
    said = report(hand_made(margins, [0, 0, 0, 1, 1, 1, 2, 2, 2]), ["Ties", "Math", "Ties"])
    assert said["all_right"]["value"] == pytest.approx(2 / 3)
    assert said["intervals"]["eval_rewards/accuracies"]["value"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    subsets = {row["subset"]: row for row in said["subsets"]}
    assert (subsets["Ties"]["n"], subsets["Ties"]["all_right"]["value"]) == (2, 1)
    assert (subsets["Math"]["n"], subsets["Math"]["all_right"]["value"]) == (1, 0)
    assert subsets["Math"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_pairs_that_lose_on_both_sides_are_counted_and_named() -> None:
    """Both fall in rows 0 and 3; chosen falls in row 1, too, and loses most in row 3."""
    logratios = np.array([[-2, -4], [-1, 1], [1, -1], [-3, -2]], np.float64)
    found = report(hand_made([1.0] * 4, [0, 1, 2, 3], logratios=logratios))["displacement"]
    assert (found["both_fall"]["value"], found["chosen_falls"]["value"]) == (0.5, 0.75)
    assert found["chosen_where_both_fall"]["value"] == -2.5
    assert found["rejected_where_both_fall"]["value"] == -3
    assert [pair["row"] for pair in found["worst"]] == [3, 0, 1]


def test_ches_is_held_against_what_chosen_gains_by_rank() -> None:
    """Scores that rise as gains fall have the rank correlation -1."""
    gains = np.linspace(1, -2, 12)
    score = Ches(np.exp(np.arange(12.0)), np.arange(12.0))
    pairs = hand_made([1.0] * 12, list(range(12)), logratios=np.stack([gains, gains], axis=1), ches=score)
    found = report(pairs)["displacement"]
    assert found["ches"]["value"] == pytest.approx(-1)
    assert found["length_normalised_ches"]["value"] == pytest.approx(-1)


def test_length_bias_of_rewards_that_are_lengths() -> None:
    """The margin is the difference of the lengths: a correlation of 1, right just where chosen is longer."""
    tokens = np.stack([np.arange(12) + 1, np.full(12, 6)], axis=1)
    found = report(hand_made((tokens[:, 0] - tokens[:, 1]).tolist(), list(range(12)), tokens=tokens))["length"]
    assert found["margin_against_length"]["value"] == pytest.approx(1)
    parts = {name: (found[name]["n"], found[name]["accuracy"]["value"]) for name in ("chosen_shorter", "chosen_longer")}
    assert parts == {"chosen_shorter": (5, 0), "chosen_longer": (6, 1)}
    assert found["as_long"]["n"] == 1


def test_intervals_of_a_clustered_mean_hold_the_truth_as_often_as_they_say() -> None:
    """
    40 clusters of 5 that share half their variance. Of 300 intervals 285 hold 0 on average, less than 272 once in
    1600 times; of those that take all 200 for independent far fewer do.
    """
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    held, naive = 0, 0
    for _ in range(300):
        values = rng.normal(size=40)[clusters] + rng.normal(size=200)
        mean, alone = clustered_mean(values, clusters), clustered_mean(values, np.arange(200))
        held += mean.low < 0 < mean.high
        naive += alone.low < 0 < alone.high
    assert held >= 272
    assert naive < 260


def test_correlations_by_hand() -> None:
    """
    Of 1 2 2 4 the ranks are 1 2.5 2.5 4. With r = 0.5 of 28, Fisher's z is atanh(0.5) = 0.5493 +- 1.96 / 5, so
    tanh(0.1573) = 0.1560 to tanh(0.9413) = 0.7358.
    """
    assert ranks(np.array([1.0, 4, 2, 2])).tolist() == [1, 4, 2.5, 2.5]
    x, other = np.tile([1.0, -1, 1, -1], 7), np.tile([1.0, 1, -1, -1], 7)
    found = pearson(x, 0.5 * x + np.sqrt(0.75) * other)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.1560, 0.7358), abs=1e-4)
    rising = np.arange(28.0)
    assert spearman(rising, np.exp(rising)).value == pytest.approx(1)


def test_entropies_are_those_of_the_whole_softmax(world: TinyWorld) -> None:
    """94 tokens are less than the paper's 100, so both entropies are one; of a flat model both are log 94."""
    model: Any = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    prompt, completion = [1, 10, 11, 12], [20, 21, 22]
    found = token_statistics(model, prompt, completion)
    with torch.no_grad():
        probs = model(torch.tensor([prompt + completion])).logits[0, 3:6].double().softmax(-1)
    entropy = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logps.double(), probs[range(3), completion].log(), atol=1e-5, rtol=0)
    kept = probs.topk(min(100, probs.shape[1])).values
    kept = kept / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(found.top_entropy.double(), -(kept * kept.log()).sum(-1), atol=1e-5, rtol=0)


def test_what_is_evaluated_stays_in_the_run_and_is_said(world: TinyWorld, run: Path) -> None:
    """Means under the names that they always had; subsets by a column of the data; KL of the policy's own samples."""
    speaking = Speaking(12, Sampling(8, temperature=1.0))
    found = evaluate(recipe_of(world), held_out(world), run, by="subset", speaking=speaking)
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8")) == found
    assert found["eval_loss"] == evaluate_run(recipe_of(world), held_out(world), run)["eval_loss"]
    assert {row["subset"]: row["n"] for row in found["subsets"]} == {SUBSETS[1]: 8, SUBSETS[0]: 16}
    spoken = found["own_samples"]
    assert spoken["samples"] == 12
    assert spoken["kl_k3"]["value"] > 0
    told = CliRunner().invoke(app, ["evaluate", str(run), "--by", "subset"])
    assert told.exit_code == 0
    assert "both are less likely than they were" in told.stdout
    assert "hep-python" in told.stdout


def test_an_untouched_policy_is_as_far_from_the_reference_as_it_should_be(world: TinyWorld, tmp_path: Path) -> None:
    """It is the reference: nothing falls, and no estimate of the KL is other than 0."""
    still = recipe_of(world, training={"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"})
    align(still, find_cache(still, world.store), tmp_path / "still")
    speaking = Speaking(8, Sampling(6, temperature=1.0))
    found = evaluate(still, held_out(world), tmp_path / "still", speaking=speaking)
    assert found["own_samples"]["kl"]["value"] == 0
    assert found["own_samples"]["kl_k3"]["value"] == 0
    assert found["own_samples"]["entropy"] == found["own_samples"]["reference_entropy"]
    assert abs(found["displacement"]["chosen"]["value"]) < 1e-5
