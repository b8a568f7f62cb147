"""Log-probs of another engine: from rows with token ids to caches of their own, which train like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_stage1_build import whole
from tiny_world import TinyWorld, add_conversations, build_tiny_world
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import CacheMissing, DataError, ParityError, RecipeError
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache, import_caches, recompute
from fpo.stage2_align import align
from fpo.store import Cache, export_rows, open_cache, verify

pytestmark = pytest.mark.usefixtures("private_memory")

pytest.importorskip("pyarrow.parquet")
ENGINE = {"scored_by": "vllm 0.11.2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 20, 6)


def plain(world: TinyWorld, **sections: Any) -> Recipe:
    return world.recipe(features=[], objective={"name": "dpo"}, **sections)


def theirs(world: TinyWorld, **sections: Any) -> Recipe:
    """The same groups, scored by another engine."""
    return plain(world, reference={"model": str(world.root / "model"), **ENGINE}, **sections)


def exported(caches: list[Cache], folder: Path, to: str) -> list[Path]:
    files = [folder / f"{number}.{to}" for number in range(len(caches))]
    for cache, path in zip(caches, files, strict=True):
        export_rows(cache, path, to)
    return files


def edited(path: Path, change: Any) -> Path:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_what_is_exported_comes_back_to_the_bit_under_another_key(world: TinyWorld, to: str, tmp_path: Path) -> None:
    ours = [report.cache for report in build_caches(plain(world), tmp_path / "ours")]
    files = exported(ours, tmp_path, to)
    found = [report.cache for report in import_caches(theirs(world), files, tmp_path / "store")]
    for one, other in zip(ours, found, strict=True):
        assert one.key != other.key
        assert other.recipe["scorer"]["reference"]["scored_by"] == "vllm 0.11.2"
        mine, own = whole(one), whole(other)
        for name in ("group_id", "input_ids", "splits", "token_logps", "ref_logps", "score", "weight"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(own, name), err_msg=name)
        assert not verify(tmp_path / "store", other.key).problems
    again = import_caches(theirs(world), files, tmp_path / "store")
    assert [report.cache.digest for report in again] == [cache.digest for cache in found]


def test_a_mask_of_tokens_that_count_comes_along(world: TinyWorld, tmp_path: Path) -> None:
    data = {**add_conversations(world, 6, 2), "eval_split": None}
    ours = build_caches(plain(world, data=data), tmp_path / "ours")[0].cache
    [file] = exported([ours], tmp_path, "jsonl")
    found = import_caches(theirs(world, data=data), [file], tmp_path / "store")[0].cache
    mine, own = whole(ours), whole(found)
    assert own.score_mask is not None
    np.testing.assert_array_equal(mine.score_mask, own.score_mask)
    np.testing.assert_array_equal(mine.ref_logps, own.ref_logps)


def test_other_log_probs_train_a_policy_and_are_held_against_ours(world: TinyWorld, tmp_path: Path) -> None:
    """An engine that rounds otherwise: told by --recompute, and what training reads."""
    ours = build_caches(plain(world), tmp_path / "ours")
    train, held_out = exported([report.cache for report in ours], tmp_path, "jsonl")
    noise = np.random.default_rng(0)

    def round_otherwise(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["token_logps"] = [[p - 1e-3 * noise.integers(0, 2) for p in one] for one in row["token_logps"]]

    recipe, store = theirs(world, policy={"same_arithmetic": False}), tmp_path / "store"
    import_caches(recipe, [edited(train, round_otherwise), held_out], store)
    cache = find_cache(recipe, store)
    apart = whole(ours[0].cache).token_logps - whole(cache).token_logps
    assert set(apart.round(4).tolist()) == {0, np.float32(1e-3)}
    assert recompute(recipe, open_cache(store, cache.key), 8, 0).worst == pytest.approx(1e-3, rel=0.01)
    with pytest.raises(ParityError, match="log-probs"):
        align(recipe, find_cache(recipe, store), tmp_path / "offset")
    import_caches(
        theirs(world), exported([report.cache for report in ours], tmp_path / "as they are", "jsonl"), tmp_path / "same"
    )
    assert align(theirs(world), find_cache(theirs(world), tmp_path / "same"), tmp_path / "run").parity < 1e-6


def test_features_stand_beside_an_imported_base(world: TinyWorld, tmp_path: Path) -> None:
    ours = [report.cache for report in build_caches(plain(world), tmp_path / "ours")]
    store = tmp_path / "store"
    import_caches(theirs(world), exported(ours, tmp_path, "parquet"), store)
    recipe = world.recipe(reference={"model": str(world.root / "model"), **ENGINE})
    reports = build_caches(recipe, store)
    assert [report.base_built for report in reports] == [False, False]
    assert align(recipe, find_cache(recipe, store), tmp_path / "run").parity == pytest.approx(0, abs=1e-5)


def test_a_grown_dataset_needs_the_new_rows_alone(world: TinyWorld, tmp_path: Path) -> None:
    """What an earlier import holds of them is copied; the file must still hold all, since nobody says what is new."""
    data, whole_data = {"split": "train[:50%]", "eval_split": None}, {"eval_split": None}
    store = tmp_path / "store"
    half, both = (build_caches(plain(world, data=one), tmp_path / "ours")[0].cache for one in (data, whole_data))
    import_caches(theirs(world, data=data), exported([half], tmp_path, "jsonl"), store)
    grown = import_caches(theirs(world, data=whole_data), exported([both], tmp_path, "parquet"), store)
    assert (grown[0].reused, grown[0].scored) == (20, 20)


def test_without_the_engine_in_the_recipe_nothing_is_imported(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"reference.scored_by: say which engine computed the log-probs"):
        import_caches(plain(world), [tmp_path / "none.jsonl"], tmp_path / "store")


def test_fpo_cache_computes_nothing_in_another_engines_name(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(CacheMissing, match=r"vllm 0.11.2's; bring them with: fpo store import FILE --recipe RECIPE"):
        build_caches(theirs(world), tmp_path / "store")
    with pytest.raises(RecipeError, match=r"vllm 0.11.2 computed this cache, so fpo cannot compute it again"):
        build_caches(theirs(world), tmp_path / "store", rebuild=True)


def drop_row(rows: list[dict[str, Any]]) -> None:
    del rows[4]


def other_token(rows: list[dict[str, Any]]) -> None:
    rows[4]["completion_ids"][1][0] += 1


def shorter(rows: list[dict[str, Any]]) -> None:
    rows[4]["token_logps"][0].pop()


def positive(rows: list[dict[str, Any]]) -> None:
    rows[4]["token_logps"][0][0] = 0.5


def null(rows: list[dict[str, Any]]) -> None:
    rows[4]["token_logps"][0][0] = None


def sums(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["ref_chosen_logps"], row["ref_rejected_logps"] = row.pop("ref_logps")


def nameless(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        del row["prompt_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_row,
            r"no log-probs of 2 of the 40 completions that the recipe asks for, the first of row 4 of split train",
        ),
        (other_token, r"no log-probs of 1 of the 40 completions that the recipe asks for, the first of row 4"),
        (shorter, r"row 4: \d+ tokens and \d+ values for them"),
        (positive, r"row 4: token_logps must be log-probabilities, finite and not above 0"),
        (null, r"row 4: a null for a token that something precedes"),
        (sums, r"row 0: it holds sums of log-probs alone, and a cache holds every token's"),
        (nameless, r"row 0: no column 'prompt_ids'; needed are prompt_ids, completion_ids, token_logps"),
        (list.clear, r"no rows"),
    ],
)
def test_a_file_that_is_not_the_recipes_is_refused_and_nothing_is_written(
    world: TinyWorld, change: Any, message: str, tmp_path: Path
) -> None:
    data = {"eval_split": None}
    ours = build_caches(plain(world, data=data), tmp_path / "ours")[0].cache
    [file] = exported([ours], tmp_path, "jsonl")
    with pytest.raises(DataError, match=message):
        import_caches(theirs(world, data=data), [edited(file, change)], tmp_path / "store")
    assert not list((tmp_path / "store").glob("*/recipe.json"))


def test_the_commands_carry_a_cache_from_one_store_to_another_engines_recipe(world: TinyWorld, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False).stdout

    store, file = str(tmp_path / "store"), str(tmp_path / "rows.parquet")
    data = {"eval_split": None}
    key = build_caches(plain(world, data=data), tmp_path / "store")[0].cache.key
    assert "exported 20 groups" in run("store", "export", key, file, "--to", "parquet", "--store", store)
    recipe = str(world.recipe_file(features=[], objective={"name": "dpo"}, data=data))
    said = run("store", "import", file, "--recipe", recipe, "--store", store, "--set", "reference.scored_by=sglang 0.5")
    assert "40 completions, scored by sglang 0.5" in said
    assert "fpo align" in said
    told = run("store", "diff", key, said.split("key         ")[1][:12], "--store", store)
    assert "scored_by" in told
    assert "scored by sglang 0.5" in run("store", "ls", "--store", store)
