"""Rows of every layout to groups: recognised by their columns, sorted best first, refused by row and column."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from test_stage1_tokenise import AB, BOS, CHAT, EOS, A, B, C, letters, parts

from fpo.errors import DataError
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.read.columns import group_columns
from fpo.stage1_cache.tokenise import TokenisedGroups, tokenise

REAL = Path(__file__).parents[2] / "shared/data/pairs"
LISTED = {"prompt": "c", "completions": ["a", "b", "ab"]}
SCORED = {**LISTED, "scores": [1, 2, 3]}
PAIRED = {"prompt": "c", "chosen": "a", "rejected": "b"}
UNPAIRED = {"prompt": "c", "completion": "a", "label": True}


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def read(*rows: dict[str, Any], columns: dict[str, str | None] | None = None) -> Dataset:
    return group_columns(Dataset.from_list(list(rows)), "data.jsonl", columns)[0]


def groups(*rows: dict[str, Any], max_length: int | None = None, **columns: str | None) -> TokenisedGroups:
    return tokenise(read(*rows, columns=columns), letters(), max_length)


def refusal(*rows: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read(*rows)
    message = str(caught.value)
    assert message.startswith("data.jsonl")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("ratings", "order", "scores"),
    [
        ({"scores": [1, 3.5, 2]}, [[B, EOS], [AB, EOS], [A, EOS]], [3.5, 2, 1]),
        ({"ranks": [2, 3, 1]}, [[AB, EOS], [A, EOS], [B, EOS]], [-1, -2, -3]),
        ({"labels": [False, True, True]}, [[B, EOS], [AB, EOS], [A, EOS]], [1, 1, 0]),
        ({"scores": [5, 5, 5], "ranks": [3, 2, 1]}, [[A, EOS], [B, EOS], [AB, EOS]], [5, 5, 5]),
    ],
)
def test_a_list_is_sorted_best_first_and_equals_keep_their_order(ratings, order, scores):
    found = groups({**LISTED, **ratings})
    assert parts(found) == [[BOS, C], *order]
    assert (found.n_completions.tolist(), found.score.tolist(), found.weight.tolist()) == ([3], scores, [1])
    assert found.lengths_of_prompts.tolist() == [2]
    assert found.lengths_of_completions.tolist() == [2, 2, 2]
    assert found.score_mask is None


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_a_list_of_any_length_is_a_group_and_duplicates_stay(k):
    same = {"prompt": "c", "completions": ["a"] * k, "scores": [0] * k}
    found = groups(same, {**LISTED, "scores": [3, 2, 1]})
    assert found.n_completions.tolist() == [k, 3]
    assert parts(found) == [[BOS, C], *[[A, EOS]] * k, [BOS, C], [A, EOS], [B, EOS], [AB, EOS]]
    assert ("alike" in found.drops.noted) == (k > 1)
    assert found.drops.lines()[0] == f"2 of 2 groups kept with {k + 3} completions"
    assert found.lengths_of_completions.tolist() == [2] * (k + 3)


def test_ultrafeedback_as_it_was_made_is_read_by_its_overall_scores():
    def rated(response: str, score: float) -> dict[str, Any]:
        return {"response": response, "overall_score": score, "fine-grained_score": 9 - score, "model": "m"}

    row = {"source": "s", "instruction": "c", "models": ["m"], "completions": [rated("a", 2.0), rated("b", 7.5)]}
    found = groups(row)
    assert parts(found) == [[BOS, C], [B, EOS], [A, EOS]]
    assert found.score.tolist() == [7.5, 2.0]


def test_rewardbench_2_is_a_group_of_all_with_the_chosen_ones_first():
    best = {
        "id": "1",
        "prompt": "c",
        "chosen": ["a"],
        "rejected": ["b", "ab", "b"],
        "num_correct": 1,
        "models": ["m"] * 4,
    }
    ties = {**best, "chosen": ["a", "ab"], "rejected": ["b"], "num_correct": 2}
    found = groups(best, ties)
    assert found.n_completions.tolist() == [4, 3]
    assert parts(found)[:5] == [[BOS, C], [A, EOS], [B, EOS], [AB, EOS], [B, EOS]]
    assert found.score.tolist() == [1, 0, 0, 0, 1, 1, 0]


def test_unpaired_rows_are_groups_of_one():
    rows = [{"prompt": "c", "completion": text, "label": label} for text, label in (("a", True), ("b", False))]
    found = groups(*rows)
    assert parts(found) == [[BOS, C], [A, EOS], [BOS, C], [B, EOS]]
    assert (found.n_completions.tolist(), found.score.tolist()) == ([1, 1], [1, 0])
    assert found.drops.lines() == ["2 of 2 completions kept"]


def test_lists_of_messages_and_of_text_read_as_messages_are_the_same():
    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    messages = {
        "prompt": said("user", "c"),
        "completions": [said("assistant", text) for text in LISTED["completions"]],
        "scores": [1, 2, 3],
    }
    found = [
        tokenise(read(messages), letters(), None, chat_template=CHAT),
        tokenise(read({**LISTED, "scores": [1, 2, 3]}), letters(), None, chat_template=CHAT, as_messages=True),
    ]
    assert parts(found[0]) == parts(found[1])
    assert len(parts(found[0])) == 4
    with pytest.raises(DataError, match=r"data\.as_messages: the data holds messages already"):
        tokenise(read(messages), letters(), None, chat_template=CHAT, as_messages=True)


@pytest.mark.parametrize(
    ("numbers", "scores", "weight"),
    [
        ({}, [math.nan, math.nan], 1),
        ({"score_chosen": 4, "score_rejected": 1.5}, [4, 1.5], 1),
        ({"margin": 2.5, "weight": 0.25}, [2.5, 0], 0.25),
        ({"score_chosen": 4, "score_rejected": 1.5, "margin": 9}, [4, 1.5], 1),
        ({"score_chosen": 4}, [math.nan, math.nan], 1),
    ],
)
def test_numbers_beside_a_pair_are_its_scores_and_weight(numbers, scores, weight):
    found = groups({"prompt": "c", "chosen": "a", "rejected": "b", **numbers})
    np.testing.assert_array_equal(found.score, np.float32(scores))
    assert found.weight.tolist() == [weight]
    assert parts(found) == [[BOS, C], [A, EOS], [B, EOS]]


def test_a_pair_whose_scores_contradict_it_keeps_its_order_and_is_noted():
    found = groups({"prompt": "c", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2})
    assert parts(found) == [[BOS, C], [A, EOS], [B, EOS]]
    assert found.drops.noted["score_against"].rows == [0]


def test_columns_are_named_in_the_recipe_and_decide_the_layout():
    """As in a dataset of pairs that also holds all candidates with a reward model's scores."""
    row = {"prompt": "c", "chosen": "a", "rejected": "b", "all": ["b", "ab", "a"], "rm": [1, 2, 3]}
    assert groups(row).n_completions.tolist() == [2]
    found = groups(row, completions="all", scores="rm")
    assert parts(found) == [[BOS, C], [A, EOS], [AB, EOS], [B, EOS]]


def test_a_group_goes_on_without_a_completion_as_if_it_had_never_had_it():
    """
    The prompt renders c b, the empty completion only c, which is all that the three share; the other two share c b.
    """
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}b{% endif %}"

    def row(*texts: str) -> Dataset:
        row = {"prompt": "c", "completions": list(texts), "scores": [9 - n for n in range(len(texts))]}
        return read(row)

    kept = [
        tokenise(row(*texts), letters(), None, chat_template=template, as_messages=True)
        for texts in (("", "ba", "bb"), ("ba", "bb"))
    ]
    assert parts(kept[0]) == parts(kept[1]) == [[C, B], [A], [B]]
    assert kept[0].score.tolist() == [8, 7]
    assert kept[0].drops.left_out["empty_completion"].rows == [0]
    assert kept[0].drops.lines()[:2] == [
        "1 of 1 groups kept with 2 completions",
        "  left out 1: a completion has no token of its own (row 0)",
    ]


def test_a_group_with_nothing_left_and_an_empty_list_are_dropped():
    rows = [{**LISTED, "scores": [1, 2, 3]}, {"prompt": "c", "completions": [], "scores": []}]
    found = groups(*rows)
    assert found.drops.dropped["no_completion"].rows == [1]
    silent = {"prompt": "", "completions": ["", "", "a"], "scores": [1, 2, 3]}
    bare = tokenise(read(rows[0], silent), letters(bos=False), None)
    assert bare.n_completions.tolist() == [3, 1]
    assert (bare.drops.left_out["no_scored_token"].count, bare.group_id.tolist()) == (2, [0, 1])


def test_completions_of_a_list_are_cut_at_max_length():
    found = groups({"prompt": "c", "completions": ["aca", "b"], "scores": [2, 1]}, max_length=4)
    assert parts(found) == [[BOS, C], [A, C], [B, EOS]]
    assert found.drops.noted["truncated"].rows == [0]


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (PAIRED | {"weight": 1}, PAIRED | {"weight": 0}, "row 1, column 'weight': 0.0, not above 0"),
        (PAIRED | {"weight": 1}, PAIRED | {"weight": None}, "column 'weight': null, not a number; mend or "
         "remove the row, or leave the column out with data.columns: {weight: null}"),
        (PAIRED | {"margin": 1}, PAIRED | {"margin": 1e39}, "row 1, column 'margin': 1e+39, not a finite number"),
        (PAIRED | {"margin": 1}, PAIRED | {"margin": float("nan")}, "row 1, column 'margin': nan, not a finite number"),
        (SCORED, {**LISTED, "scores": [1, 2]}, "row 1, column 'scores': 2 values for 3 completions"),
        (SCORED, {**LISTED, "scores": [1, None, 2]}, "row 1, column 'scores[1]': null, not a number"),
        (SCORED, {**LISTED, "scores": None}, "row 1, column 'scores': null, not a list"),
        (SCORED, SCORED | {"completions": ["a", None, "b"]}, "row 1, column 'completions[1]': missing or null"),
        (SCORED, SCORED | {"prompt": None}, "row 1, column 'prompt': missing or null"),
        ({**LISTED, "labels": [True] * 3}, {**LISTED, "labels": [True, None, True]}, "'labels[1]': null, not true"),
        (UNPAIRED, UNPAIRED | {"label": None}, "row 1, column 'label': null, not true or false"),
        (UNPAIRED, UNPAIRED | {"completion": None}, "row 1, column 'completion': missing or null"),
        ({"prompt": "c", "chosen": ["a"], "rejected": ["b"]}, {"prompt": "c", "chosen": ["a"], "rejected": None},
         "row 1, column 'rejected': null, not a list"),
        ({"prompt": "c", "completions": [{"response": "a", "overall_score": 1.0}]},
         {"prompt": "c", "completions": [{"response": "a", "overall_score": None}]},
         "row 1, column 'completions[0].overall_score': null, not a number"),
        ({"prompt": "c", "completions": [{"response": "a", "overall_score": 1.0}]},
         {"prompt": "c", "completions": [{"response": None, "overall_score": 1.0}]},
         "row 1, column 'completions[0]': an object without a response"),
    ],
)  # fmt: skip
def test_what_a_column_cannot_hold_is_refused_by_row_and_column(good, bad, said):
    assert said in refusal(good, bad)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (LISTED, "nothing says which of its completions are better; its columns are prompt, completions; name"),
        ({"prompt": "c", "completion": "a"}, "no column 'label'; its columns are prompt, completion; name yours in the "
         "recipe: data.columns: {prompt: ..., completion: ..., label: ...} (the nearest layout is completion and"),
        ({"completions": ["a"], "scores": [1]}, "no column 'prompt'; its columns are completions, scores"),
        ({"completion": "a", "label": True}, "no column 'prompt'; its columns are completion, label"),
        ({"chosen": ["a"], "rejected": ["b"]}, "no column 'prompt'; its columns are chosen, rejected"),
        ({"text": "a"}, "no column 'chosen'; its columns are text; name yours in the recipe: data.columns: "
         "{prompt: ..., chosen: ..., rejected: ...} (the nearest layout is chosen and rejected)"),
    ],
)  # fmt: skip
def test_columns_of_no_layout_are_refused_with_the_nearest(row, said):
    assert said in refusal(row)


def test_real_pairs_turned_into_lists_have_the_same_tokens():
    path = REAL / "llms_from_scratch.str.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    pairs = read_groups(str(path), "train[:200]").dataset
    lists = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "ranks": [2, 1]} for row in pairs
    ]
    found = [tokenise(rows, letters(), None) for rows in (pairs, read(*lists))]
    for name in ("group_id", "n_completions", "input_ids", "splits"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
