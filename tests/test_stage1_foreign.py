"""Layouts of other tools: each has the tokens of the same conversation in TRL's layout, or is refused by row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoTokenizer

from fpo.errors import DataError
from fpo.stage1_cache import build_caches, look_at_data
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.tokenise import ARRAYS, Part, TokenisedGroups, tokenise

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{% if m.tool_calls %} calls {{ m.tool_calls[0].function.name }}{% endif %} {% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "w70", "parameters": {}}}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 4)


def tokens_of(
    world: TinyWorld, path: Path, bad: frozenset[int] | None = None, *, as_messages: bool = False
) -> TokenisedGroups:
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    part = Part(read_groups(str(path), "train").dataset, bad)
    return tokenise([part], tokenizer, 64, chat_template=TEMPLATE, as_messages=as_messages)


def written(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def from_to(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


PLAIN = {"prompt": [said("user", "w1")], "chosen": [said("assistant", "w10")], "rejected": [said("assistant", "w11")]}
ASKED = {**PLAIN, "prompt": [said("system", "w5"), said("user", "w1")]}
LONG = {**PLAIN, "prompt": [said("user", "w2"), said("assistant", "w3"), said("user", "w1")]}
TOLD = {**LONG, "prompt": [said("system", "w5"), *LONG["prompt"]]}

FROM = {"chosen": from_to("gpt", "w10"), "rejected": from_to("gpt", "w11")}

SAME = [
    (
        "ShareGPT, LLaMA-Factory's ranking",
        {
            "conversations": [from_to("human", "w2"), from_to("gpt", "w3"), from_to("human", "w1")],
            "chosen": from_to("gpt", "w10"),
            "rejected": from_to("gpt", "w11"),
        },
        LONG,
    ),
    (
        "ShareGPT with a system column and tools as text",
        {
            "conversations": [from_to("human", "w1")],
            "chosen": from_to("gpt", "w10"),
            "rejected": from_to("gpt", "w11"),
            "system": "w5",
            "tools": json.dumps(TOOLS),
        },
        {**ASKED, "tools": TOOLS},
    ),
    (
        "ShareGPT that says its system prompt itself",
        {
            "conversations": [from_to("system", "w5"), from_to("human", "w1")],
            "chosen": from_to("gpt", "w10"),
            "rejected": from_to("gpt", "w11"),
            "system": "w5",
        },
        ASKED,
    ),
    (
        "ShareGPT with a call of a tool",
        {
            "conversations": [
                from_to("human", "w2"),
                from_to("function_call", json.dumps({"name": "w70", "arguments": {}})),
                from_to("observation", "w4"),
            ],
            "chosen": from_to("gpt", "w10"),
            "rejected": from_to("gpt", "w11"),
        },
        {
            **PLAIN,
            "prompt": [
                said("user", "w2"),
                {
                    **said("assistant", ""),
                    "tool_calls": [{"type": "function", "function": {"name": "w70", "arguments": {}}}],
                },
                said("tool", "w4"),
            ],
        },
    ),
    (
        "axolotl's chat_template",
        {"messages": LONG["prompt"], "chosen": said("assistant", "w10"), "rejected": said("assistant", "w11")},
        LONG,
    ),
    (
        "OpenAI",
        {
            "input": {"messages": ASKED["prompt"], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": ASKED["chosen"],
            "non_preferred_output": ASKED["rejected"],
        },
        {**ASKED, "tools": TOOLS},
    ),
    (
        "LLaMA-Factory's alpaca",
        {
            "instruction": "w6",
            "input": "w7",
            "chosen": "w10",
            "rejected": "w11",
            "system": "w5",
            "history": [["w2", "w3"]],
        },
        {
            **PLAIN,
            "prompt": [said("system", "w5"), said("user", "w2"), said("assistant", "w3"), said("user", "w6\nw7")],
        },
    ),
    ("alpaca, ranked", {"instruction": "w1", "input": "", "output": ["w10", "w11"]}, PLAIN),
    ("argilla", {"instruction": "w1", "chosen_response": "w10", "rejected_response": "w11", "system": "w5"}, ASKED),
    ("argilla, prompt", {"prompt": "w1", "chosen_response": "w10", "rejected_response": "w11"}, PLAIN),
    ("axolotl's chatml.intel", {"system": "w5", "question": "w1", "chosen": "w10", "rejected": "w11"}, ASKED),
    ("axolotl's chatml.icr", {"system": "w5", "input": "w1", "chosen": "w10", "rejected": "w11"}, ASKED),
    ("axolotl's chatml.prompt_pairs", {"system": "w5", "prompt": "w1", "chosen": "w10", "rejected": "w11"}, ASKED),
    (
        "axolotl's chatml.ultra",
        {
            "system": "w5",
            "prompt": "w1",
            "chosen": [*PLAIN["prompt"], *PLAIN["chosen"]],
            "rejected": [*PLAIN["prompt"], *PLAIN["rejected"]],
        },
        ASKED,
    ),
    ("a system column beside messages", {**LONG, "system": "w5"}, TOLD),
    (
        "a prompt beside ShareGPT's answers",
        {"prompt": "w1", "chosen": from_to("gpt", "w10"), "rejected": from_to("gpt", "w11")},
        PLAIN,
    ),
    (
        "messages before ShareGPT's answers",
        {**LONG, "chosen": from_to("gpt", "w10"), "rejected": [from_to("gpt", "w11")]},
        LONG,
    ),
    ("a question beside messages", {"question": "w1", "chosen": PLAIN["chosen"], "rejected": PLAIN["rejected"]}, PLAIN),
    (
        "ShareGPT, whole conversations",
        {
            side: [from_to("human", "w2"), from_to("gpt", "w3"), from_to("human", "w1"), from_to("gpt", said_last)]
            for side, said_last in (("chosen", "w10"), ("rejected", "w11"))
        },
        LONG,
    ),
    (
        "OpenAI, content in parts",
        {
            "input": {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]}
                ]
            },
            "preferred_output": PLAIN["chosen"],
            "non_preferred_output": PLAIN["rejected"],
        },
        PLAIN,
    ),
    (
        "argilla's dpo-mix-7k",
        {
            "dataset": "capybara",
            "chosen": [*LONG["prompt"], *LONG["chosen"]],
            "rejected": [*LONG["prompt"], *LONG["rejected"]],
            "chosen_rating": 5.0,
            "rejected_rating": 4.0,
        },
        LONG,
    ),
]


@pytest.mark.parametrize(("row", "same"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_the_tokens_are_those_of_the_same_conversation(
    world: TinyWorld, row: dict[str, Any], same: dict[str, Any], tmp_path: Path
) -> None:
    found, expected = (
        tokens_of(world, written(tmp_path / name, one)) for name, one in (("foreign", row), ("trl", same))
    )
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.drops.unit == "pairs"


def test_scores_and_weights_come_along(world: TinyWorld, tmp_path: Path) -> None:
    row = {"instruction": "w1", "chosen_response": "w10", "rejected_response": "w11"}
    path = written(tmp_path, {**row, "score_chosen": 4, "score_rejected": 5, "weight": 2.0, "chosen_avg_rating": 4.2})
    tokens = tokens_of(world, path)
    assert (tokens.score.tolist(), tokens.weight.tolist()) == ([4, 5], [2])
    assert tokens.drops.noted["score_against"].rows == [0]
    _, columns, _ = read_groups(str(path), "train")
    assert columns == ("instruction", ("chosen_avg_rating",))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [from_to("human", "w1"), from_to("gpt", "w10")], "kto_tag": True},
        {"instruction": "w1", "input": "", "output": "w10", "kto_tag": True},
    ],
)
def test_llama_factorys_kto_is_a_completion_with_a_label(world: TinyWorld, row: dict[str, Any], tmp_path: Path) -> None:
    found = tokens_of(world, written(tmp_path / "foreign", row, {**row, "kto_tag": False}))
    ours = {"prompt": PLAIN["prompt"], "completion": PLAIN["chosen"], "label": True}
    expected = tokens_of(world, written(tmp_path / "trl", ours, {**ours, "label": False}))
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    assert found.score.tolist() == expected.score.tolist() == [1, 0]
    assert found.drops.unit == "completions"


@pytest.mark.parametrize("explicit", [True, False])
def test_a_transcript_becomes_messages_where_the_recipe_asks_for_it(
    world: TinyWorld, explicit: bool, tmp_path: Path
) -> None:
    """As text TRL's rules hold: the prompt ends where the characters differ, here inside the answers' first word."""
    prompt = "\n\nHuman: w2\n\nAssistant: w3\n\nHuman: w1\n\nAssistant:"
    row = {"chosen": f"{prompt} w10", "rejected": f"{prompt} w11"}
    if explicit:
        row = {"prompt": prompt, "chosen": " w10", "rejected": " w11"}
    path = written(tmp_path / "foreign", row)
    found = tokens_of(world, path, as_messages=True)
    expected = tokens_of(world, written(tmp_path / "trl", LONG))
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.splits, expected.splits)
    assert len(tokens_of(world, path).input_ids) != len(found.input_ids)


def test_a_transcript_that_ends_otherwise_is_refused_by_row_or_left_out(world: TinyWorld, tmp_path: Path) -> None:
    good = {"chosen": "\n\nHuman: w1\n\nAssistant: w10", "rejected": "\n\nHuman: w1\n\nAssistant: w11"}
    path = written(tmp_path, good, {**good, "rejected": "\n\nHuman: w1\n\nAssistant: w11\n\nHuman: w2"})
    with pytest.raises(DataError, match=r"row 1, column 'rejected': no transcript that begins with Human"):
        tokens_of(world, path, as_messages=True)
    assert tokens_of(world, path, as_messages=True, bad=frozenset()).drops.dropped["bad_row"].rows == [1]


SHAREGPT = SAME[0][1]
OPENAI = next(row for name, row, _ in SAME if name == "OpenAI")
ALPACA = next(row for name, row, _ in SAME if name == "LLaMA-Factory's alpaca")


@pytest.mark.parametrize(
    ("good", "wrong", "message"),
    [
        (SHAREGPT, {"chosen": from_to("oracle", "w1")}, r"column 'chosen': a message from 'oracle'"),
        (SHAREGPT, {"conversations": None}, r"column 'conversations': null, neither text nor messages"),
        (
            SHAREGPT,
            {"conversations": [from_to("human", "w1"), from_to("function_call", "w70()")]},
            r"column 'conversations': a function_call that is no JSON",
        ),
        (OPENAI, {"input": None}, r"column 'input': null, not an object with a list of messages"),
        (OPENAI, {"preferred_output": None}, r"column 'preferred_output': null, neither text nor messages"),
        (ALPACA, {"history": [["w2"]]}, r"column 'history': a list, not a question and its answer"),
        (SHAREGPT, {"chosen": from_to("function_call", "{}")}, r"column 'chosen': a function_call without a name"),
        (
            SHAREGPT,
            {"conversations": [from_to("human", "w1"), from_to("gpt", "w2")]},
            r"column 'conversations': it ends with the assistant's turn",
        ),
        (
            {**SHAREGPT, "system": ""},
            {"system": "w5", "conversations": [from_to("system", "w6"), from_to("human", "w1")]},
            r"column 'system': not what the messages have as their own system prompt",
        ),
        (ALPACA, {"instruction": None}, r"column 'instruction': missing or null"),
        (ALPACA, {"rejected": None}, r"column 'rejected': null, neither text nor messages"),
    ],
)
def test_a_row_that_is_otherwise_is_refused_by_row_and_column(
    good: dict[str, Any], wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, good, {**good, **wrong})
    with pytest.raises(DataError, match=f"rows.jsonl, row 1, {message}"):
        read_groups(str(path), "train")
    assert read_groups(str(path), "train", drop_bad=True).bad == {1}


def test_the_recipes_own_columns_go_before_another_tools_layout(world: TinyWorld, tmp_path: Path) -> None:
    row = {"system": "w5", "question": "w3", "chosen": " w10", "rejected": " w11"}
    columns: dict[str, str | None] = {"prompt": "question", "system": None}
    dataset = read_groups(str(written(tmp_path, row)), "train", columns=columns).dataset
    assert dataset.to_list() == [{"prompt": "w3", "chosen": " w10", "rejected": " w11"}]
    with pytest.raises(DataError, match="does not hold the text of 'question', which would be lost"):
        read_groups(str(written(tmp_path, row)), "train", columns={"system": None})


def test_a_prompt_that_says_its_system_itself_stays_text(tmp_path: Path) -> None:
    row = {"system": "w5", "prompt": "w5 w1", "chosen": " w10", "rejected": " w11"}
    found = read_groups(str(written(tmp_path, row)), "train")
    assert found.dataset.to_list() == [{name: value for name, value in row.items() if name != "system"}]


def test_two_columns_that_may_be_the_prompt_are_refused(tmp_path: Path) -> None:
    row = {"instruction": "w1", "question": "w2", "chosen": "w10", "rejected": "w11"}
    with pytest.raises(DataError, match=r"made of column 'instruction', does not hold the text of column 'question'"):
        read_groups(str(written(tmp_path, row)), "train")


def test_a_cache_of_another_tools_file_is_that_of_the_same_conversations(world: TinyWorld, tmp_path: Path) -> None:
    keys = []
    for name, row in (("foreign", ALPACA), ("trl", next(same for one, _, same in SAME if one.endswith("alpaca")))):
        data = {"source": str(written(tmp_path / name, row)), "eval_split": None, "chat_template": TEMPLATE}
        recipe = world.recipe(features=[], objective={"name": "dpo"}, data=data)
        assert look_at_data(recipe)[0].drops.kept == 1
        keys.append(build_caches(recipe, tmp_path / "store")[0].cache.key)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("kind", ["stream", "file", "json.gz", "csv.gz", "parquet"])
def test_files_of_every_kind_hold_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n}", "chosen": " w10", "rejected": " w11"} for n in range(5)]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"rows.{kind}"
    if kind in ("stream", "file"):
        path = tmp_path / "rows.arrow"
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with opened(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, path)
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    else:
        lines = ["prompt,chosen,rejected", *(",".join(row.values()) for row in rows)]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_groups(str(path), "train").dataset.to_list() == rows
