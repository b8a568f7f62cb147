"""What data.transform makes of groups: each rule against rows written here, and the whole from file to cache."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoTokenizer

from fpo.errors import DataError, RecipeError
from fpo.evaluation.breakdown import data_column
from fpo.recipe import Transform
from fpo.stage1_cache import build_caches
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.tokenise import TokenisedGroups, tokenise

GOAL = "w80 w{score} w81"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 4)


def tokens_of(world: TinyWorld, rows: list[dict[str, Any]], folder: Path, **transform: Any) -> TokenisedGroups:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    chat = template if isinstance(rows[0]["prompt"], list) else None
    wanted = Transform(goal=GOAL, **transform)
    return tokenise(read_groups(str(path), "train").dataset, tokenizer, 64, chat_template=chat, transform=wanted)


def words(world: TinyWorld, tokens: TokenisedGroups) -> list[list[str]]:
    """Of every group the texts of its parts, prompt first."""
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    bounds = tokens.splits.astype(int)
    parts = [tokenizer.decode(tokens.input_ids[a:b], skip_special_tokens=True) for a, b in pairwise(bounds)]
    groups, at = [], 0
    for n in tokens.n_completions.tolist():
        groups.append(parts[at : at + n + 1])
        at += n + 1
    return groups


def scored(prompt: str, *texts: str, scores: list[float]) -> dict[str, Any]:
    return {"prompt": prompt, "completions": [f" {text}" for text in texts], "scores": scores}


def test_pairs_of_the_best_and_the_worst(world: TinyWorld, tmp_path: Path) -> None:
    rows = [
        scored("w1", "w10", "w11", "w12", scores=[2, 9, 4]),
        scored("w2", "w20", scores=[3]),
        scored("w3", "w30", "w31", scores=[1, 1]),
    ]
    tokens = tokens_of(world, rows, tmp_path, pair="best_worst")
    assert words(world, tokens) == [["w1", "w11", "w10"], ["w3", "w30", "w31"]]
    assert tokens.score.tolist() == [9, 2, 1, 1]
    assert tokens.group_id.tolist() == [0, 2]
    assert tokens.drops.dropped["no_pair"].rows == [1]
    assert tokens.drops.unit == "pairs"


def test_pairs_of_the_best_and_any_other_are_drawn_by_seed_and_row(world: TinyWorld, tmp_path: Path) -> None:
    row = scored("w1", *(f"w{n}" for n in range(10, 16)), scores=[6, 5, 4, 3, 2, 1])

    def drawn(n: int, seed: int) -> list[str]:
        tokens = tokens_of(world, [row] * n, tmp_path, pair="best_random", seed=seed)
        return [group[2] for group in words(world, tokens)]

    assert drawn(60, 0) == drawn(60, 0) != drawn(60, 1)
    assert set(drawn(60, 0)) == {f"w{n}" for n in range(11, 16)}
    assert drawn(7, 0) == drawn(60, 0)[:7]


def test_ties_near_scores_and_duplicates_are_left_out_with_their_rows(world: TinyWorld, tmp_path: Path) -> None:
    def pair(prompt: str, chosen: float, rejected: float) -> dict[str, Any]:
        row = {"prompt": prompt, "chosen": " w10", "rejected": " w11"}
        return {**row, "score_chosen": chosen, "score_rejected": rejected}

    rows = [pair("w1", 3, 3), pair("w2", 3, 2.5), pair("w3", 3, 2), pair("w3", 3, 2), pair("w4", 1, 3)]
    tokens = tokens_of(world, rows, tmp_path, min_margin=1.0, dedup=True)
    assert tokens.group_id.tolist() == [2, 4]
    dropped = {name: found.rows for name, found in tokens.drops.dropped.items()}
    assert dropped == {"tie": [0], "near": [1], "duplicate": [3]}
    assert tokens_of(world, rows, tmp_path, min_margin=0.0).group_id.tolist() == [1, 2, 3, 4]


def test_a_goal_for_either_score_prefers_what_has_it(world: TinyWorld, tmp_path: Path) -> None:
    """As https://arxiv.org/abs/2410.08067 has it: (x with goal s_w: y_w over y_l), (x with goal s_l: y_l over y_w)."""
    rows = [
        {"prompt": "w1", "chosen": " w10", "rejected": " w11", "score_chosen": 9, "score_rejected": 4},
        {"prompt": "w2", "chosen": " w20", "rejected": " w21", "score_chosen": 7, "score_rejected": 7},
        {"prompt": "w3", "chosen": " w30", "rejected": " w31", "score_chosen": 2, "score_rejected": 3},
    ]
    tokens = tokens_of(world, rows, tmp_path, reward_goals="user")
    assert words(world, tokens) == [
        ["w80 w9 w81 w1", "w10", "w11"],
        ["w80 w2 w81 w3", "w30", "w31"],
        ["w80 w4 w81 w1", "w11", "w10"],
        ["w80 w3 w81 w3", "w31", "w30"],
    ]
    assert tokens.score.tolist() == [0, -25, 0, -1, 0, -25, 0, -1]
    assert tokens.group_id.tolist() == [0, 2, 3, 5]
    assert tokens.drops.dropped["tie"].rows == [1, 4]
    assert "score_against" not in tokens.drops.noted


@pytest.mark.parametrize(
    ("said_by", "system", "expected"),
    [
        ("system", False, "system w80 w60 w81 user w1"),
        ("system", True, "system w80 w60 w81 w5 user w1"),
        ("user", True, "system w5 user w80 w60 w81 w1"),
    ],
)
def test_where_a_goal_is_said(world: TinyWorld, said_by: str, system: bool, expected: str, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [*([{"role": "system", "content": "w5"}] if system else []), {"role": "user", "content": "w1"}],
            "chosen": [{"role": "assistant", "content": "w10"}],
            "rejected": [{"role": "assistant", "content": "w11"}],
            "score_chosen": 60,
            "score_rejected": 50,
        }
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    seen: list[str] = []

    def render(messages: list[dict[str, str]], **_: Any) -> str:
        seen.append(" ".join(f"{message['role']} {' '.join(message['content'].split())}" for message in messages))
        return seen[-1]

    tokenizer.apply_chat_template = render
    wanted = Transform(goal="w80 w{score} w81", reward_goals=said_by)
    tokenise(read_groups(str(path), "train").dataset, tokenizer, 64, chat_template="{{ messages }}", transform=wanted)
    assert seen[0] == expected
    assert seen[1] == f"{expected} assistant w10"
    assert seen[3] == expected.replace("w60", "w50")
    assert seen[4] == f"{expected.replace('w60', 'w50')} assistant w11"


UNSCORED = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}


@pytest.mark.parametrize(
    ("row", "transform", "message"),
    [
        (UNSCORED, {"min_margin": 1.0}, "row 0: data.transform goes by scores"),
        (UNSCORED, {"reward_goals": "user"}, "the data gives none"),
        (scored("w1", "w2", "w3", "w4", scores=[3, 2, 1]), {"reward_goals": "user"}, "pairs, and this group has 3"),
        (scored("w1", "w2", scores=[3]), {"pair": "best_worst"}, "no pair is left to score"),
    ],
)
def test_what_a_transform_cannot_do_is_refused(
    world: TinyWorld, row: dict[str, Any], transform: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        tokens_of(world, [row], tmp_path, **transform)


def test_a_goal_without_its_score_is_refused(world: TinyWorld) -> None:
    with pytest.raises(RecipeError, match=r"data.transform.goal: \{score\} must stand in it, once"):
        world.recipe(data={"transform": {"reward_goals": "user", "goal": "be good"}})


def test_a_transformed_split_is_another_cache_and_its_rows_keep_their_names(world: TinyWorld, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"w{n}",
            "chosen": " w40",
            "rejected": " w50",
            "score_chosen": 9,
            "score_rejected": n,
            "topic": str(n),
        }
        for n in range(8)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"source": str(source), "split": "train", "eval_split": None}
    plain, augmented = (
        world.recipe(features=[], objective={"name": "dpo"}, data={**data, **more})
        for more in ({}, {"transform": {"reward_goals": "user", "goal": "w80 w{score}"}})
    )
    caches = [build_caches(recipe, tmp_path / "store")[0].cache for recipe in (plain, augmented)]
    assert [cache.n_groups for cache in caches] == [8, 16]
    assert caches[0].key != caches[1].key
    names = data_column(augmented, caches[1], "topic")
    shards = [caches[1].shard(sid) for sid in range(len(caches[1].shard_groups))]
    ids = np.sort(np.concatenate([shard.group_id for shard in shards]))
    assert [names[row] for row in ids.tolist()] == [str(n) for n in range(8)] * 2
