"""Rows that any program reads: what the cache holds, in the order of the dataset; for distillation by completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_world import TinyWorld, build_tiny_world

from fpo.errors import CacheConflict, CacheError
from fpo.stage1_cache import build_caches
from fpo.store import Cache, Features, Groups, TopLogits, export_rows, open_cache

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Pairs, one of them with an empty prompt, whose completions' first tokens are not scored."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 20, 4)
    path = world.root / "pairs" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[3]["prompt"], rows[5]["score_chosen"] = "", None
    for row in rows:
        row |= {"score_chosen": 2.5, "score_rejected": 1.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return world


@pytest.fixture(scope="module")
def cache(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    options = {"top_logits": 3, "prompt_features": True, "hidden_gram": True, "shard_pairs": 8}
    reports = build_caches(world.recipe(cache=options), tmp_path_factory.mktemp("store"))
    return open_cache(reports[0].cache.folder.root.parent, reports[0].cache.key)


def in_order(cache: Cache) -> Groups:
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    return groups.take(np.argsort(groups.group_id))


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list(pq.read_table(path).to_pylist())


@pytest.mark.parametrize("block_tokens", [2**24, 100])
@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_a_row_holds_all_that_is_known_of_its_group(cache: Cache, to: str, block_tokens: int, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{to}"
    report = export_rows(cache, path, to, block_tokens=block_tokens)
    rows = rows_of(path)
    groups = in_order(cache)
    assert (report.n_groups, report.n_bytes) == (len(rows), path.stat().st_size)
    parts = [part.tolist() for part in np.split(groups.input_ids, groups.splits[1:-1].astype(int))]
    logps = np.split(groups.token_logps, groups.scored_splits[1:-1])
    features, prompts, top = groups.columns
    assert isinstance(features, Features)
    assert isinstance(top, TopLogits)
    bare = 0
    for at, row in enumerate(rows):
        assert row["group_id"] == groups.group_id[at]
        assert [row["prompt_ids"], *row["completion_ids"]] == parts[3 * at : 3 * at + 3]
        for place in range(2):
            completion, said = 2 * at + place, row["token_logps"][place]
            assert len(said) == len(row["completion_ids"][place])
            first = len(said) - len(logps[completion])
            bare += first
            assert said[:first] == [None] * first
            np.testing.assert_array_equal(np.array(said[first:], np.float32), logps[completion])
            own = slice(int(features.splits[completion]), int(features.splits[completion + 1]))
            assert row["features/model.layers.1/indices"][place] == features.indices[own].tolist()
            np.testing.assert_array_equal(
                np.array(row["features/model.layers.1/acts"][place], np.float32), features.acts[own]
            )
            own = slice(int(top.splits[completion]), int(top.splits[completion + 1]))
            np.testing.assert_array_equal(np.array(row["top_logits/logps"][place], np.float32), top.logps[own])
        np.testing.assert_array_equal(np.array(row["ref_logps"], np.float32), groups.ref_logps[2 * at : 2 * at + 2])
        assert (row["score"], row["weight"]) == ([2.5, 1.0], 1.0)
        own = slice(int(prompts.splits[at]), int(prompts.splits[at + 1]))
        assert row["prompt_features/model.layers.1/indices"] == prompts.indices[own].tolist()
    if to == "parquet":
        about = json.loads(pq.read_schema(path).metadata[b"fpo"])
        assert (about["key"], about["manifest"]) == (cache.key, cache.digest)
        assert about["columns"]["top_logits"]["m"] == 3


def test_for_distillation_a_row_is_a_completion_with_its_likeliest_tokens(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    export_rows(cache, path, "distill", block_tokens=100)
    rows, groups = rows_of(path), in_order(cache)
    top = groups.columns[2]
    assert isinstance(top, TopLogits)
    assert len(rows) == 2 * len(groups)
    parts = np.split(groups.input_ids, groups.splits[1:-1].astype(int))
    for completion, row in enumerate(rows):
        group, place = divmod(completion, 2)
        prompt, said = parts[3 * group].tolist(), parts[3 * group + 1 + place].tolist()
        own = slice(int(top.splits[completion]), int(top.splits[completion + 1]))
        before = len(prompt) + len(said) - (own.stop - own.start)
        assert row["input_ids"] == prompt + said
        assert row["labels"] == [-100] * before + (prompt + said)[before:]
        assert row["target_token_ids"][before:] == top.indices[own].tolist()
        np.testing.assert_array_equal(np.array(row["target_logprobs"][before:], np.float32), top.logps[own])
        assert row["target_mask"] == [[0] * 3] * before + [[1] * 3] * (own.stop - own.start)
        assert all(value == -np.inf for position in row["target_logprobs"][:before] for value in position)


def test_lists_and_masks_are_rows_too(world: TinyWorld, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "w60"}],
            "completions": [[turn("w1"), user("w61"), turn("w2")]] * n,
            "ranks": list(range(n)),
        }
        for n in (1, 3)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "source": str(source),
        "split": "train",
        "eval_split": None,
        "score": "assistant",
        "chat_template": "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}",
    }
    recipe = world.recipe(features=[], objective={"name": "dpo"}, data=data)
    cache = build_caches(recipe, tmp_path / "store")[0].cache
    export_rows(cache, tmp_path / "out.jsonl", "jsonl")
    found = rows_of(tmp_path / "out.jsonl")
    assert [len(row["completion_ids"]) for row in found] == [1, 3]
    assert [row["counts"] for row in found] == [[[True, False, True]], [[True, False, True]] * 3]


def turn(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_file_that_is_there_is_not_touched_and_nothing_is_left_behind(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("mine")
    with pytest.raises(CacheConflict, match="is there already"):
        export_rows(cache, path, "jsonl")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_without_top_logits_there_is_nothing_to_distil_from(world: TinyWorld, tmp_path: Path) -> None:
    cache = build_caches(world.recipe(features=[], objective={"name": "dpo"}), tmp_path / "store")[0].cache
    with pytest.raises(CacheError, match="has no top logits to distil from; add them with fpo cache RECIPE --set"):
        export_rows(cache, tmp_path / "out.parquet", "distill")
    assert not (tmp_path / "out.parquet").exists()
