"""Several sources in one split, and prompts that are held out: what each side holds, its numbers, names and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_stage1_build import whole
from tiny_world import TinyWorld, build_tiny_world
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import DataError, RecipeError
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache, look_at_data
from fpo.stage1_cache.identity import cache_identities
from fpo.stage1_cache.tokenise import TokenisedGroups
from fpo.stage2_align import align

pytestmark = pytest.mark.usefixtures("private_memory")

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 40, 10)


def pair(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": " w10", "rejected": " w11", **more}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def in_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    """Where a message lacks a field that another one has, this is null; JSON lines leave it out."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def recipe_of(world: TinyWorld, **data: Any) -> Recipe:
    return world.recipe(features=[], objective={"name": "dpo"}, data={"eval_split": None, **data})


def both(world: TinyWorld, **data: Any) -> list[TokenisedGroups]:
    return [identity.tokens for identity in cache_identities(recipe_of(world, **data))]


def prompts(tokens: TokenisedGroups) -> list[bytes]:
    starts = tokens.splits.astype(int)
    return [tokens.input_ids[starts[3 * at] : starts[3 * at + 1]].tobytes() for at in range(len(tokens))]


def test_sources_stand_behind_each_other_with_their_weights(world: TinyWorld, tmp_path: Path) -> None:
    one = written(tmp_path / "one.jsonl", [pair(f"w{n}", weight=3.0) for n in range(3)])
    two = written(tmp_path / "two.jsonl", [pair(f"w{n}", chosen=None if n == 1 else " w12") for n in range(20, 22)])
    [alone] = both(world, source=one, split="train")
    sources = [{"source": one, "weight": 2.0}, two, {"source": one, "split": "train[1:]", "origin": "again"}]
    [tokens] = both(world, source=sources, split="train", on_bad_row="drop")
    assert tokens.group_id.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tokens.weight.tolist() == [6, 6, 6, 1, 1, 3, 3]
    assert prompts(tokens)[:3] == prompts(alone)
    assert prompts(tokens)[5:] == prompts(alone)[1:]
    [identity] = cache_identities(recipe_of(world, source=sources, split="train"))
    assert identity.column("origin") == ["one.jsonl"] * 3 + ["two.jsonl"] * 2 + ["again"] * 2
    assert identity.split == "train, train[1:]"


def test_text_and_messages_pairs_and_lists_stand_together(world: TinyWorld, tmp_path: Path) -> None:
    text = written(tmp_path / "text.jsonl", [pair("w1")])
    spoken = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w10"}]
    said = {"prompt": spoken[0], "chosen": spoken[1], "rejected": [{"role": "assistant", "content": "w11"}]}
    messages = written(tmp_path / "messages.jsonl", [said])
    lists = written(
        tmp_path / "lists.jsonl", [{"prompt": "w2", "completions": [" w3", " w4", " w5"], "ranks": [2, 1, 3]}]
    )
    [tokens] = both(world, source=[text, messages, lists], split="train", chat_template=TEMPLATE)
    assert tokens.n_completions.tolist() == [2, 2, 3]
    assert tokens.drops.unit == "groups"
    for source, part in ((text, [0, 3]), (messages, [3, 6]), (lists, [6, 10])):
        [alone] = both(world, source=source, split="train", chat_template=TEMPLATE)
        start, end = (int(tokens.splits[at]) for at in part)
        np.testing.assert_array_equal(tokens.input_ids[start:end], alone.input_ids)


def test_text_becomes_messages_beside_messages_and_a_question_has_one_side(world: TinyWorld, tmp_path: Path) -> None:
    text = written(tmp_path / "text.jsonl", [pair(f"w{n}", chosen="w10", rejected="w11") for n in range(40)])
    sides = {side: [{"role": "assistant", "content": word}] for side, word in (("chosen", "w10"), ("rejected", "w11"))}
    spoken = [{"prompt": [{"role": "user", "content": f"w{n}"}], **sides} for n in range(40)]
    messages = written(tmp_path / "messages.jsonl", spoken)
    data = {"split": "train", "chat_template": TEMPLATE, "as_messages": True, "held_out": 0.3}
    for tokens in both(world, source=[text, messages], **data):
        halves = np.split(tokens.input_ids, [len(tokens.input_ids) // 2])
        np.testing.assert_array_equal(halves[0], halves[1])
        assert (tokens.group_id + 40 == np.roll(tokens.group_id, len(tokens) // 2))[: len(tokens) // 2].all()


def test_a_source_that_is_wrong_is_named_with_its_own_row(world: TinyWorld, tmp_path: Path) -> None:
    good = written(tmp_path / "good.jsonl", [pair("w1")] * 3)
    bad = written(tmp_path / "bad.jsonl", [pair("w1"), pair("w2", rejected=None)])
    with pytest.raises(DataError, match=r"bad.jsonl, row 1, column 'rejected': missing or null"):
        both(world, source=[good, bad], split="train")
    scored = [pair("w1", score_chosen=2, score_rejected=1)]
    mixed = [written(tmp_path / "scored.jsonl", scored), good]
    with pytest.raises(DataError, match=r"good.jsonl: row 0: data.transform goes by scores"):
        both(world, source=mixed, split="train", transform={"min_margin": 0.5})


def test_duplicates_are_found_across_sources(world: TinyWorld, tmp_path: Path) -> None:
    one = written(tmp_path / "one.jsonl", [pair("w1"), pair("w2")])
    two = written(tmp_path / "two.jsonl", [pair("w3"), pair("w2"), pair("w1")])
    [tokens] = both(world, source=[one, two], split="train", transform={"dedup": True})
    assert tokens.group_id.tolist() == [0, 1, 2]
    assert tokens.drops.dropped["duplicate"].rows == [3, 4]


def test_duplicates_are_found_where_one_source_has_more_fields_in_its_messages(
    world: TinyWorld, tmp_path: Path
) -> None:
    def said(prompt: str, **more: str) -> dict[str, Any]:
        asked = [{"role": "user", "content": prompt, **more}]
        return {
            "prompt": asked,
            **{side: [{"role": "assistant", "content": f"w1{n}"}] for n, side in enumerate(("chosen", "rejected"))},
        }

    one = written(tmp_path / "one.jsonl", [said("w1"), said("w2")])
    two = in_parquet(tmp_path / "two.parquet", [said("w3", name="w9"), said("w2")])
    [tokens] = both(world, source=[one, two], split="train", chat_template=TEMPLATE, transform={"dedup": True})
    assert tokens.drops.dropped["duplicate"].rows == [3]


def test_all_rows_of_a_prompt_are_on_one_side_in_whatever_source(world: TinyWorld, tmp_path: Path) -> None:
    rows = [pair(f"w{n % 60}", chosen=f" w{n % 7}", rejected=f" w{60 + n % 11}") for n in range(300)]
    one, two = written(tmp_path / "one.jsonl", rows[:200]), written(tmp_path / "two.jsonl", rows[200:])
    train, held_out = both(world, source=[one, two], split="train", held_out=0.3)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert sorted([*train.group_id, *held_out.group_id]) == list(range(300))
    assert (train.drops.read, held_out.drops.read) == (len(train), len(held_out))
    grown = written(tmp_path / "grown.jsonl", [*rows, *(pair(f"w{n}") for n in range(60, 90))])
    _, later = both(world, source=grown, split="train", held_out=0.3)
    assert set(prompts(held_out)) <= set(prompts(later))
    _, fewer = both(world, source=grown, split="train", held_out=0.1)
    assert set(prompts(fewer)) < set(prompts(later))


def test_about_the_asked_share_is_held_out(world: TinyWorld, tmp_path: Path) -> None:
    rows = [pair(f"w{a} w{b}") for a in range(60) for b in range(60)]
    source = written(tmp_path / "rows.jsonl", rows)
    train, held_out = both(world, source=source, split="train", held_out=0.2)
    assert len(train) + len(held_out) == 3600
    # Four standard deviations of 3,600 draws.
    assert abs(len(held_out) / 3600 - 0.2) < 4 * (0.2 * 0.8 / 3600) ** 0.5


def test_messages_are_on_the_side_of_the_same_messages_whatever_arrow_adds(world: TinyWorld, tmp_path: Path) -> None:
    """A tool call in one row gives every message of the file that field, as null."""
    template = "{% for m in messages %}{{ m.role + ' ' + (m.content or '') + ' ' }}{% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{n}"}],
            "chosen": [{"role": "assistant", "content": "w60"}],
            "rejected": [{"role": "assistant", "content": "w61"}],
        }
        for n in range(40)
    ]
    called = {**rows[0], "prompt": [{"role": "user", "content": "w50", "name": "w51"}]}
    plain = written(tmp_path / "plain.jsonl", rows)
    nulls = in_parquet(tmp_path / "nulls.parquet", [*rows, called])
    sides = [
        both(world, source=source, split="train", held_out=0.3, chat_template=template) for source in (plain, nulls)
    ]
    assert set(prompts(sides[0][1])) <= set(prompts(sides[1][1]))
    assert not set(prompts(sides[0][0])) & set(prompts(sides[1][1]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": ["a.jsonl", "b/a.jsonl"]}, "data.source: a.jsonl is the name of two; give them an origin each"),
        (
            {"source": ["a.jsonl"], "columns": {"prompt": "q"}},
            "data.columns: it is one source's; write it into its entry",
        ),
        ({"source": []}, "data.source: the list is empty"),
        ({"source": [{"sorce": "a.jsonl"}]}, r"data.source\[0\].sorce: no such field; nearest is source"),
        ({"source": [{"source": "a", "weight": 0}]}, r"data.source\[0\].weight: must be greater than 0, not 0"),
        ({"eval_split": "test", "held_out": 0.1}, "data.held_out: there is an eval_split already"),
        ({"held_out": 1.5}, "data.held_out: must be less than 1, not 1.5"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused(world: TinyWorld, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(world, **data)


def test_only_sources_with_a_split_of_that_side_are_held_out(world: TinyWorld, tmp_path: Path) -> None:
    folder = str(world.root / "pairs")
    extra = written(tmp_path / "extra.jsonl", [pair("w1")])
    sources = [{"source": folder, "eval_split": "test"}, extra]
    train, held_out = cache_identities(recipe_of(world, source=sources, split="train"))
    assert (len(train.tokens), len(held_out.tokens)) == (41, 10)
    assert held_out.split == "test"


def test_from_two_sources_to_a_policy_and_its_evaluation_by_origin(world: TinyWorld, tmp_path: Path) -> None:
    extra = written(tmp_path / "extra.jsonl", [pair(f"w{n}", chosen=f" w{n + 1}") for n in range(30)])
    data = {
        "source": [{"source": str(world.root / "pairs"), "origin": "ours"}, {"source": extra, "weight": 2.0}],
        "split": "train",
        "eval_split": None,
        "held_out": 0.25,
    }
    recipe = world.recipe(data=data)
    path = world.recipe_file(data=data)
    store = tmp_path / "store"
    train, held_out = (report.cache for report in build_caches(recipe, store))
    assert train.n_groups + held_out.n_groups == 70
    assert set(whole(train).weight.tolist()) == {1, 2}
    assert [report.drops.kept for report in look_at_data(recipe)] == [train.n_groups, held_out.n_groups]
    align(recipe, find_cache(recipe, store), tmp_path / "run")
    arguments = ["evaluate", str(tmp_path / "run"), "--store", str(store), "--by", "origin", "--json"]
    said = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert {part["subset"] for part in said["subsets"]} == {"ours", "extra.jsonl"}
    listed = CliRunner().invoke(app, ["store", "ls", "--store", str(store)], catch_exceptions=False).stdout
    assert "extra.jsonl" in listed
    assert CliRunner().invoke(app, ["data", str(path)], catch_exceptions=False).exit_code == 0


@pytest.mark.skipif(not PAIRS.is_dir(), reason="needs the real pairs")
def test_real_files_of_three_layouts_in_one_cache(world: TinyWorld) -> None:
    names = ("hh_harmless_test.str.jsonl", "lf_dpo_en_demo.messages.jsonl", "orca_dpo_val.implicit.jsonl")
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    data = {"source": [str(PAIRS / name) for name in names], "split": "train", "chat_template": template}
    tokenizer = str(PAIRS.parent / "models" / "stories260K")
    train, held_out = both(world, **data, held_out=0.1, max_length=512, tokenizer=tokenizer)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert train.drops.read + held_out.drops.read == sum(len((PAIRS / name).read_text().splitlines()) for name in names)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
