"""Judging: rewards as the model gives them one by one, win rates with intervals that hold, by length too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation_generate import TEMPLATE, lines
from tiny_models import LLAMA_LIKE
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import DataError, ModelError
from fpo.evaluation.estimates import clustered_mean
from fpo.evaluation.formats import file_of
from fpo.evaluation.generate import Generation
from fpo.evaluation.judge import Judged, RewardModel, read_generations, win_rates
from fpo.evaluation.prompts import Prompt


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    tokenizer.chat_template = TEMPLATE
    for labels in (1, 2):
        torch.manual_seed(labels)
        model = LlamaForSequenceClassification(LlamaConfig(**LLAMA_LIKE, num_labels=labels))
        model.save_pretrained(world.root / f"judge-{labels}")
        tokenizer.save_pretrained(world.root / f"judge-{labels}")
    return world


def generated(count: int, seed: int, samples: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, 1])
    rows = []
    for number in range(count):
        for sample in range(samples):
            words = " ".join(f"w{n}" for n in rng.integers(0, 60, rng.integers(1, 9)))
            tokens = [len(words.split())]
            rows.append(
                {"prompt": f"w{number}", "row": number, "sample": sample, "completions": [words], "tokens": tokens}
            )
    return rows


def test_the_mean_of_clusters_is_that_of_their_sums() -> None:
    """
    Twenty clusters of a 1 and a 3, one of a lone 5: mean 85 / 41. Sums of deviations: (4 - 2 mean) / 41 twenty times,
    (5 - mean) / 41 once; se^2 = 21 / 20 of their squares. t of 20 degrees of freedom is 2.086.
    """
    values, clusters = np.array([1.0, 3.0] * 20 + [5.0]), np.append(np.repeat(np.arange(20), 2), 99)
    mean = 85 / 41
    error = (21 / 20 * (20 * (4 - 2 * mean) ** 2 + (5 - mean) ** 2)) ** 0.5 / 41
    found = clustered_mean(values, clusters)
    assert found == pytest.approx((mean, mean - 2.086 * error, mean + 2.086 * error), rel=2e-3)
    alone = clustered_mean(values, np.arange(41))
    assert alone.high - mean == pytest.approx(2.021 * values.std(ddof=1) / 41**0.5, rel=2e-3)
    few = clustered_mean(values[:18], clusters[:18])
    assert few.value == 2.0
    assert np.isnan(few.low)
    assert np.isnan(clustered_mean(values[:0], values[:0]).value)


def test_intervals_cover_the_truth_where_observations_share_a_prompt() -> None:
    """400 draws of 40 prompts with 1 to 6 answers, half of whose variance is the prompt's: 95 % within 5 se, 1.1 %."""
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(400):
        clusters = np.repeat(np.arange(40), rng.integers(1, 7, 40))
        values = rng.normal(size=40)[clusters] + rng.normal(size=len(clusters)) + 0.3
        found, alone = clustered_mean(values, clusters), clustered_mean(values, np.arange(len(values)))
        covered += found.low <= 0.3 <= found.high
        naive += alone.low <= 0.3 <= alone.high
    assert covered / 400 >= 0.95 - 0.055
    assert naive / 400 < 0.85


@pytest.mark.parametrize("as_text", [False, True])
def test_a_reward_is_what_the_model_says_of_the_conversation_alone(world: TinyWorld, as_text: bool) -> None:
    """In batches of 4, longest first, against each by itself; two turns have both completions in them."""
    rows = generated(10, 0)
    if not as_text:
        rows[3] = {**rows[3], "prompt": None, "turns": ["w1 w2", "w3"], "completions": ["w4", "w5 w6"]}
    judge = RewardModel.of(str(world.root / "judge-1"), "float32", 4)
    found = judge.rewards(rows, as_text=as_text)
    for row, reward in zip(rows, found, strict=True):
        if as_text:
            text, special = row["prompt"] + row["completions"][0], True
        else:
            turns = row.get("turns") or [row["prompt"]]
            text = "".join(f"u {turn} a {said} " for turn, said in zip(turns, row["completions"], strict=True))
            special = False
        ids = judge.tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert reward == pytest.approx(float(judge.model(input_ids=ids).logits[0, 0]), abs=1e-5)
    assert found.std() > 1e-3


def test_win_rates_are_those_of_a_hand_count() -> None:
    """
    rewards  3 > 1, 2 = 2, 0 < 5, 4 > 1: wins 1, 0.5, 0, 1, 0.625 in the mean; lengths 5 against 5 (alike), 3 against 9
    (shorter), 9 against 3 (longer), 20 against 19 (alike): alike (1 + 1) / 2, shorter 0.5, longer 0.
    """
    rows = [{"row": n, "sample": 0} for n in range(4)]
    first, second = (
        Judged(name, [{**row, "tokens": [size]} for row, size in zip(rows, sizes, strict=True)], np.array(rewards))
        for name, sizes, rewards in (
            ("one", (5, 3, 9, 20), (3.0, 2.0, 0.0, 4.0)),
            ("two", (5, 9, 3, 19), (1.0, 2.0, 5.0, 1.0)),
        )
    )
    found = {rate.where: (rate.n, rate.rate.value) for rate in win_rates(first, second)}
    assert found == {"all": (4, 0.625), "shorter": (1, 0.5), "alike in length": (2, 1.0), "longer": (1, 0.0)}
    backwards = {rate.where: rate.rate.value for rate in win_rates(second, first)}
    assert backwards == {"all": 0.375, "shorter": 1.0, "alike in length": 0.0, "longer": 0.5}
    with pytest.raises(DataError, match="answer other prompts"):
        win_rates(first, Judged("short", second.rows[:3], second.rewards[:3]))


def test_the_command_compares_two_files(world: TinyWorld, tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{seed}.jsonl", generated(6, seed, samples=2)) for seed in (1, 2)]
    given = ["judge", *map(str, files), "--reward-model", str(world.root / "judge-1"), "--text"]
    output = tmp_path / "rewards.jsonl"
    done = CliRunner().invoke(app, [*given, "--json", "--output", str(output)])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rewards = np.array([row["reward"] for row in rows])
    assert [model["reward"]["value"] for model in said["models"]] == pytest.approx(
        [rewards[:12].mean(), rewards[12:].mean()]
    )
    assert said["wins"][0]["win_rate"]["value"] == pytest.approx((rewards[:12] > rewards[12:]).mean())
    table = CliRunner().invoke(app, given)
    assert "win rate" in table.stdout
    assert "1 against 2" in table.stdout
    same = CliRunner().invoke(app, ["judge", *[str(files[0])] * 2, *given[3:]])
    assert f"{files[0]} against {files[0]}" in same.stdout


def test_a_line_separator_that_a_model_wrote_parts_no_row(tmp_path: Path) -> None:
    """U+2028 and U+0085 are ends of lines to str.splitlines, and not to JSON."""
    said = "one\u2028two\u0085three"
    row = Generation(0, 0, [said], [3], [True])
    file = tmp_path / "rows.jsonl"
    file.write_text(file_of("jsonl", [Prompt(("w1",), {"prompt": "w1"})], [row], "mine", 0.0, len), encoding="utf-8")
    (found,) = read_generations(file)
    assert found["completions"] == [said]


def test_what_is_no_judge_or_nothing_to_judge_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    speaking = LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, num_labels=1))
    speaking.save_pretrained(world.root / "speaking")
    AutoTokenizer.from_pretrained(world.root / "model").save_pretrained(world.root / "speaking")
    for name, message in (("judge-2", "2 labels; a reward model has one"), ("speaking", "lack score.weight")):
        with pytest.raises(ModelError, match=message):
            RewardModel.of(str(world.root / name), "float32", 4)
    empty = lines(tmp_path / "pairs.jsonl", [{"prompt": "w1", "chosen": "w2"}])
    for file in (empty, tmp_path / "nowhere.jsonl"):
        with pytest.raises(DataError, match="judge what fpo generate --format jsonl wrote"):
            read_generations(file)
