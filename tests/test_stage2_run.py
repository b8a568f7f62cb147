"""A run folder: where one begins, who may go on with it, what it may change, and what its checkpoints are worth."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_weights, cut
from tiny_world import TinyWorld, build_tiny_world

from fpo.errors import RecipeError, RunError
from fpo.recipe import Recipe, dump_recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run, evaluated_recipe, evaluated_store
from fpo.stage2_align.arguments import FREE_ARGUMENTS, resolved, training_arguments
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.checkpoints import SEAL_FILE, last_checkpoint, rotate
from fpo.stage2_align.run import METRICS_FILE, RUN_FILE, locked, read_run, write_run

ENDLESS = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    build_caches(world.recipe(), world.store)
    return world


def run(world: TinyWorld, recipe: Recipe, folder: Path, *, resume: bool = False) -> list[dict[str, float]]:
    """Metrics of a run of this recipe."""
    align(recipe, find_cache(recipe, world.store), folder, resume)
    return read_metrics(folder / METRICS_FILE)


def stopped_at(world: TinyWorld, recipe: Recipe, folder: Path, step: int) -> None:
    """A run as one that was killed after the checkpoint at `step` leaves it."""
    run(world, recipe, folder)
    cut(folder, step)


def test_a_folder_with_other_files_begins_a_run_with_and_without_resume(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    for name, resume in (("plain", False), ("resume", True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "slurm-1.log").write_text("started")
        assert len(run(world, recipe, folder, resume=resume)) == 1


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "checkpoint-3", "model.safetensors"])
def test_a_folder_whose_files_a_run_would_write_over_is_refused(world: TinyWorld, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    recipe = world.recipe(training={"max_steps": 1})
    with pytest.raises(RunError, match=f"it holds {name}, which a run would write over"):
        run(world, recipe, tmp_path, resume=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_as_the_run_folder_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file, not a folder; give another --output"):
        run(world, world.recipe(), tmp_path / "file")


def test_a_run_belongs_to_one_process_at_a_time(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    with (
        locked(tmp_path),
        pytest.raises(RunError, match=rf"another process trains this run \(process {os.getpid()} on"),
    ):
        run(world, recipe, tmp_path, resume=True)
    assert len(run(world, recipe, tmp_path, resume=True)) == 1


def test_a_resumed_run_keeps_its_pairs_per_step(world: TinyWorld, tmp_path: Path) -> None:
    stopped_at(world, world.recipe(training={"max_steps": 8}), tmp_path, 7)
    wider = world.recipe(training={"max_steps": 8, "gradient_accumulation_steps": 2})
    with pytest.raises(RunError, match="takes 4 pairs per step, now it would be 8"):
        run(world, wider, tmp_path, resume=True)


def test_a_resumed_run_may_change_what_moves_no_weight(world: TinyWorld, tmp_path: Path) -> None:
    """Pairs per forward, logging, saving, the store and the data's place; the losses stay what they were."""
    recipe = world.recipe(training={"max_steps": 10})
    straight = run(world, recipe, tmp_path / "straight")
    stopped_at(world, recipe, tmp_path / "run", 7)
    moved = tmp_path / "moved"
    shutil.copytree(world.root / "pairs", moved / "pairs")
    shutil.copytree(world.store, moved / "store")
    free = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3, "save_steps": 9}
    more = {"save_total_limit": 2, "report_to": "none", "run_name": "again", "activation_checkpointing": True}
    again = world.recipe(
        training={"max_steps": 10, **free, **more},
        data={"source": str(moved / "pairs")},
        cache={"store": str(moved / "store")},
    )
    align(again, find_cache(again, moved / "store"), tmp_path / "run", resume=True)
    rows = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE)}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert rows[9] == pytest.approx(sum(row["loss"] for row in straight[7:9]) / 2, rel=1e-5)
    assert (tmp_path / "run" / "checkpoint-9").is_dir()
    assert read_run(tmp_path / "run")["store"] == str(moved / "store")


def test_a_resumed_run_may_not_change_what_moves_weights(world: TinyWorld, tmp_path: Path) -> None:
    stopped_at(world, world.recipe(training={"max_steps": 8}), tmp_path, 7)
    for section, values, message in (
        ("objective", {"beta": 3.0}, r"objective\.beta: 2\.0, the recipe says 3\.0"),
        ("training", {"seed": 3}, r"training\.seed: 42, the recipe says 3"),
        ("training", {"learning_rate": 2e-4}, r"training\.learning_rate: 0\.0001, the recipe says 0\.0002"),
        ("training", {"weight_decay": 0.1}, r"training\.weight_decay: 0\.0, the recipe says 0\.1"),
        ("policy", {"lora": {"r": 4}}, r"policy\.lora: None, the recipe says None|policy\.lora"),
    ):
        sections: dict[str, Any] = {"training": {"max_steps": 8}}
        sections[section] = {**sections.get(section, {}), **values}
        with pytest.raises(RunError, match=message):
            run(world, world.recipe(**sections), tmp_path, resume=True)


def test_what_the_recipe_leaves_to_the_default_may_be_spelled_out(world: TinyWorld, tmp_path: Path) -> None:
    stopped_at(world, world.recipe(training={"max_steps": 8}), tmp_path, 7)
    spelled = world.recipe(training={"max_steps": 8, "adam_beta1": 0.9, "lr_scheduler_type": "linear"})
    assert len(run(world, spelled, tmp_path, resume=True)) == 8


def test_every_argument_that_is_not_listed_as_free_is_held() -> None:
    """A list of those that move weights would let a new one through."""
    arguments = resolved({}).keys()
    assert arguments >= FREE_ARGUMENTS
    assert {"learning_rate", "seed", "bf16", "tf32", "optim", "max_grad_norm", "fsdp"} <= arguments - FREE_ARGUMENTS


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_longer_run_is_the_one_that_was_longer_from_the_beginning(
    world: TinyWorld, tmp_path: Path, logging_steps: int
) -> None:
    """8 steps, then 14: the row that the shorter run wrote as its last word is not in the longer one's file."""
    training = {**ENDLESS, "logging_steps": logging_steps}
    short, long = (world.recipe(training={**training, "max_steps": steps}) for steps in (8, 14))
    straight = run(world, long, tmp_path / "straight")
    run(world, short, tmp_path / "run")
    assert run(world, long, tmp_path / "run", resume=True) == straight
    assert_same_weights(tmp_path / "run", tmp_path / "straight")
    facts = read_run(tmp_path / "run")
    assert (facts["complete"], facts["steps"]) == (True, 14)
    with pytest.raises(RunError, match="has taken 14 steps already, the recipe says 8"):
        run(world, short, tmp_path / "run", resume=True)


def test_a_schedule_that_depends_on_the_length_refuses_another_length(world: TinyWorld, tmp_path: Path) -> None:
    run(world, world.recipe(training={"max_steps": 3}), tmp_path)
    with pytest.raises(RunError, match="began with 3 steps, the recipe says 4: under the schedule linear the steps"):
        run(world, world.recipe(training={"max_steps": 4}), tmp_path, resume=True)
    warm = {**ENDLESS, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}
    run(world, world.recipe(training={**warm, "max_steps": 3}), tmp_path / "warm")
    with pytest.raises(RunError, match="under the schedule constant_with_warmup"):
        run(world, world.recipe(training={**warm, "max_steps": 4}), tmp_path / "warm", resume=True)


def test_a_run_killed_after_its_last_step_takes_no_other_when_it_goes_on(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={**ENDLESS, "max_steps": 9})
    straight = run(world, recipe, tmp_path / "straight")
    stopped_at(world, recipe, tmp_path / "run", 9)
    assert run(world, recipe, tmp_path / "run", resume=True) == straight
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={**ENDLESS, "max_steps": 9})
    straight = run(world, recipe, tmp_path / "straight")
    stopped_at(world, recipe, tmp_path / "run", 9)
    (tmp_path / "run" / "checkpoint-9" / SEAL_FILE).unlink()
    (tmp_path / "run" / ".removed-checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-7"
    assert not (tmp_path / "run" / "checkpoint-9").exists()
    assert not (tmp_path / "run" / ".removed-checkpoint-3").exists()
    assert run(world, recipe, tmp_path / "run", resume=True) == straight


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 9})
    stopped_at(world, recipe, tmp_path, 9)
    optimizer = tmp_path / "checkpoint-9" / "optimizer.pt"
    size = optimizer.stat().st_size
    os.truncate(optimizer, 100)
    message = rf"checkpoint-9: optimizer\.pt has 100 bytes \({size:,} were written\); remove this folder to continue"
    with pytest.raises(RunError, match=message + " from checkpoint-7"):
        run(world, recipe, tmp_path, resume=True)
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert len(run(world, recipe, tmp_path, resume=True)) == 9


def test_old_checkpoints_go_and_the_newest_stays(world: TinyWorld, tmp_path: Path) -> None:
    run(world, world.recipe(training={"save_total_limit": 1, "save_steps": 4}), tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-20"]
    rotate(tmp_path, None)
    assert (tmp_path / "checkpoint-20" / SEAL_FILE).is_file()


def test_saved_files_are_as_readable_as_the_umask_lets_files_be(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    before = os.umask(0o027)
    try:
        run(world, recipe, tmp_path / "run")
    finally:
        os.umask(before)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_loggers_are_told_the_objective_and_the_saved_model_is_not(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    cache = find_cache(recipe, world.store)
    config = json.loads(training_arguments(recipe, tmp_path, cache).to_json_string())
    assert config["objective"] == {
        "name": "fpo", "pairs": "best_rest", "beta": 2.0, "alpha": 3.0, "k": 8, "feature_set": "reference",
        "hookpoints": None, "distance": "l2", "include": None, "exclude": [], "weights": {},
    }  # fmt: skip
    assert (config["cache_key"], config["learning_rate"]) == (cache.key, 1e-4)
    run(world, recipe, tmp_path / "run")
    assert "objective" not in (tmp_path / "run" / "config.json").read_text()
    arguments = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert arguments.to_dict()["objective"]["beta"] == 2.0


def test_a_run_is_evaluated_by_its_own_recipe_from_the_store_it_was_trained_from(
    world: TinyWorld, tmp_path: Path
) -> None:
    recipe = world.recipe(training={"max_steps": 8})
    run(world, recipe, tmp_path / "run")
    own = evaluated_recipe(tmp_path / "run")
    assert own == recipe
    assert evaluated_store(tmp_path / "run", None) == str(world.store)
    cache = find_cache(own, world.store, held_out=True)
    metrics = evaluate_run(own, cache, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == metrics
    before = evaluate_run(own, cache, tmp_path / "run", checkpoint=7)
    assert json.loads((tmp_path / "run" / "evaluation-7.json").read_text()) == before
    assert before["eval_loss"] != metrics["eval_loss"]
    assert evaluate_run(own, cache, tmp_path / "run", checkpoint=8) == metrics
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == metrics
    with pytest.raises(RunError, match=r"checkpoint-3: no such checkpoint; there are 7, 8"):
        evaluate_run(own, cache, tmp_path / "run", checkpoint=3)
    write_run(tmp_path / "run", {**read_run(tmp_path / "run"), "complete": False})
    with pytest.raises(RunError, match="or evaluate a checkpoint of it with --checkpoint N"):
        evaluate_run(own, cache, tmp_path / "run")
    assert evaluate_run(own, cache, tmp_path / "run", checkpoint=7) == before


def test_an_evaluation_may_change_the_pairs_and_never_the_objective(world: TinyWorld, tmp_path: Path) -> None:
    run(world, world.recipe(training={"max_steps": 1}), tmp_path)
    assert evaluated_recipe(tmp_path, ["data.eval_split=train"]).data.eval_split == "train"
    assert evaluated_recipe(tmp_path, ["training.per_device_eval_batch_size=2"]).training
    for override in ("objective.beta=5", "objective={name: dpo}", "policy.lora={r: 4}", "training.bf16=true"):
        with pytest.raises(RecipeError, match="a run is evaluated as it was trained"):
            evaluated_recipe(tmp_path, [override])
    with pytest.raises(RunError, match="no run here"):
        evaluated_recipe(tmp_path / "nothing")
    write_run(tmp_path, {**read_run(tmp_path), "store": "/no/longer"})
    with pytest.raises(RunError, match="the store of this run, /no/longer, is no longer there; say where it is with"):
        evaluated_store(tmp_path, None)
    assert evaluated_store(tmp_path, "s3://team/fpo") == "s3://team/fpo"


def test_an_evaluation_with_another_sae_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    run(world, recipe, tmp_path)
    facts = read_run(tmp_path)
    [column] = facts["columns"]
    write_run(tmp_path, {**facts, "columns": [{**column, "spec": {**column["spec"], "top_k": 3}}]})
    with pytest.raises(RunError, match="trained against another SAE, hookpoint, top_k or other top logits"):
        evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path)


def test_a_run_goes_on_from_the_column_of_features_that_it_began_with(world: TinyWorld, tmp_path: Path) -> None:
    """The cache's own key and digest are the same: a smaller top_k, and the same column with other bytes, are not."""
    recipe = world.recipe(training={"max_steps": 8})
    stopped_at(world, recipe, tmp_path, 7)
    fewer = [{**world.raw_recipe()["features"][0], "top_k": 8}]
    other = world.recipe(features=fewer, training={"max_steps": 8})
    with pytest.raises(RunError, match=r"began with other columns of cache (?s:.)*top 16: (?s:.)*asks for .*top 8: "):
        run(world, other, tmp_path, resume=True)
    facts = read_run(tmp_path)
    write_run(tmp_path, {**facts, "columns": [{**facts["columns"][0], "manifest_digest": "0" * 64}]})
    with pytest.raises(RunError, match=r"column (\w+), manifest 0{12}\n  the recipe asks for .*column \1, manifest"):
        run(world, recipe, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rate": 1e9, "logging_steps": 1}, r"not a number from step \d+ on; training\.learning_rate 1e\+09"),
        ({"learning_rate": 1e9, "logging_steps": 5}, r"not a number from step \d+ on, noticed at step 5; training"),
        ({"learning_rate": 1e9, "logging_steps": 20}, r"not a number from step \d+ on, noticed at step 7; training"),
    ],
)
def test_a_run_that_is_not_a_number_any_more_stops_and_saves_nothing(
    world: TinyWorld, tmp_path: Path, training: dict[str, float], message: str
) -> None:
    """Logged every 1, 5 or 20 steps, saved every 7: noticed at the first of either."""
    recipe = world.recipe(training={**training, "max_grad_norm": 0})
    with pytest.raises(RunError, match=message):
        run(world, recipe, tmp_path)
    assert not read_run(tmp_path)["complete"]
    assert not (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()


def test_broken_weights_are_not_saved_over_good_ones(world: TinyWorld, tmp_path: Path) -> None:
    """The last update alone breaks them: no loss has seen them yet."""
    recipe = world.recipe(training={"max_steps": 1, "learning_rate": 1e39, "lr_scheduler_type": "constant"})
    with pytest.raises(RunError, match=r"a weight is not a number from step 1 on"):
        run(world, recipe, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


FILES_OF_AT_MOST = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
FILES_OF_AT_MOST += "sys.argv = ['fpo', *sys.argv[2:]]; from fpo import cli; cli.main()"


@pytest.mark.long
@pytest.mark.parametrize(
    ("limit", "what"),
    [
        (20_000, "checkpoint-7"),
        pytest.param(100, "run.json", marks=pytest.mark.campaign),
        pytest.param(3_000, "metrics.jsonl", marks=pytest.mark.campaign),
        pytest.param(200_000, "checkpoint-7", marks=pytest.mark.campaign),
    ],
)
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    world: TinyWorld, tmp_path: Path, limit: int, what: str
) -> None:
    """No file may grow beyond `limit` bytes: run.json, metrics.jsonl, the weights or the optimizer's state fail."""
    command = [sys.executable, "-c", FILES_OF_AT_MOST, str(limit), "align", world.recipe_file(), "--store", world.store]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--output", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line
    if what != "run.json":
        assert what in line
        assert not list(tmp_path.glob("checkpoint-*"))


def test_the_recipe_of_a_run_reads_back(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    run(world, recipe, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == dump_recipe(recipe)
    (tmp_path / RUN_FILE).write_text('{"cache": "x"}')
    with pytest.raises(RunError, match="has no columns; another version of fpo wrote it"):
        read_run(tmp_path)
