"""Evaluation in training: the numbers of `fpo evaluate`, nothing else changed, the best kept, and all of it resumed."""

from __future__ import annotations

import importlib
import math
import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from run_processes import run_two_processes
from safetensors.torch import load_file
from tiny_runs import assert_same_weights, cut
from tiny_world import TinyWorld, build_tiny_world

from fpo.commands.caches import recipe_cache
from fpo.errors import CacheMissing, RecipeError, RunError, RunInterrupted
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import AlignReport, align, evaluate_run
from fpo.stage2_align.arguments import training_arguments
from fpo.stage2_align.callbacks import is_evaluation, read_metrics
from fpo.stage2_align.checkpoints import SEAL_FILE, rotate
from fpo.stage2_align.held_out import held_out_stream
from fpo.stage2_align.measure import counted_groups
from fpo.stage2_align.run import METRICS_FILE, read_run

# The package exports a function of the module's name.
aligning = importlib.import_module("fpo.stage2_align.align")

# Four steps an epoch; of 7 held-out pairs the last batch has 1.
DPO: dict[str, Any] = {"features": [], "objective": {"name": "dpo", "beta": 0.5}}
TRAINING = {"learning_rate": 1e-3, "max_steps": 8, "save_strategy": "no", "per_device_eval_batch_size": 3}
STEPS = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {**STEPS, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
# Every evaluation gives what the first gave.
NO_GAIN = {**BEST, "learning_rate": 0.0, "max_steps": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 7)
    build_caches(world.recipe(**DPO), world.store)
    return world


def recipe_of(world: TinyWorld, **training: Any) -> Recipe:
    return world.recipe(**DPO, training={**TRAINING, **training})


def run(world: TinyWorld, recipe: Recipe, folder: Path, *, resume: bool = False) -> AlignReport:
    held_out = find_cache(recipe, world.store, held_out=True) if "eval_strategy" in recipe.training else None
    return align(recipe, find_cache(recipe, world.store), folder, resume, held_out)


def rows(folder: Path, *, evaluations: bool) -> list[dict[str, float]]:
    return [row for row in read_metrics(folder / METRICS_FILE) if is_evaluation(row) == evaluations]


def evaluated(folder: Path) -> list[tuple[float, float]]:
    """Step and loss of every evaluation."""
    return [(row["step"], row["eval_loss"]) for row in rows(folder, evaluations=True)]


def test_an_evaluation_in_training_is_what_fpo_evaluate_says_and_changes_nothing(
    world: TinyWorld, tmp_path: Path
) -> None:
    """At the start, where policy = reference, DPO's loss is log 2; losses and weights are those of a run without."""
    recipe = recipe_of(world, **STEPS, eval_on_start=True, save_strategy="steps", save_steps=4, logging_steps=3)
    run(world, recipe, tmp_path / "with")
    held_out = find_cache(recipe, world.store, held_out=True)
    found = {int(row.pop("step")): row for row in rows(tmp_path / "with", evaluations=True)}
    assert [(step, row.pop("epoch")) for step, row in found.items()] == [(0, 0), (2, 0.5), (4, 1), (6, 1.5), (8, 2)]
    assert found[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[4] == evaluate_run(recipe, held_out, tmp_path / "with", checkpoint=4)
    assert found[8] == evaluate_run(recipe, held_out, tmp_path / "with")
    assert found[4]["eval_loss"] != found[8]["eval_loss"]

    run(world, recipe_of(world, logging_steps=3), tmp_path / "without")
    assert rows(tmp_path / "with", evaluations=False) == rows(tmp_path / "without", evaluations=False)
    assert_same_weights(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize(
    "training",
    [{**STEPS, "save_steps": 3}, {"eval_strategy": "epoch", "save_steps": 4}],
    ids=["between-two-evaluations", "at-an-epochs-end"],
)
def test_a_resumed_run_has_the_evaluations_of_one_never_interrupted(
    world: TinyWorld, tmp_path: Path, training: dict[str, Any]
) -> None:
    """No row twice and none missing, also where evaluation and checkpoint belong to an epoch's last step."""
    recipe = recipe_of(world, **training, save_strategy="steps", eval_on_start=True)
    run(world, recipe, tmp_path)
    straight = read_metrics(tmp_path / METRICS_FILE)
    assert len(evaluated(tmp_path)) == (5 if "eval_steps" in training else 3)
    cut(tmp_path, training["save_steps"])
    run(world, recipe, tmp_path, resume=True)
    assert read_metrics(tmp_path / METRICS_FILE) == straight


def test_any_number_of_processes_counts_every_held_out_group_once(world: TinyWorld) -> None:
    """Of 7 pairs two or three processes repeat some; a repeat counts nothing."""
    recipe = recipe_of(world, **STEPS)
    cache = find_cache(recipe, world.store, held_out=True)
    for ranks in (1, 2, 3):
        streams = [held_out_stream(recipe, cache, rank, ranks) for rank in range(ranks)]
        counted: dict[float, float] = {}
        for batch in (batch for stream in streams for batch in stream if batch is not None):
            for pair, count in zip(batch["ref_logps"][::2].tolist(), counted_groups(batch).tolist(), strict=True):
                counted[pair] = counted.get(pair, 0.0) + count
        assert list(counted.values()) == [1.0] * 7, ranks


@pytest.mark.long
def test_two_processes_evaluate_as_one_does(world: TinyWorld, tmp_path: Path) -> None:
    alone = {**STEPS, "max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd"}
    run(world, recipe_of(world, **alone), tmp_path / "one")
    shared = {**TRAINING, **alone, "per_device_train_batch_size": 2}
    run_two_processes(world.recipe_file(**DPO, training=shared), world.store, tmp_path / "two")
    [one], [two] = (rows(tmp_path / name, evaluations=True) for name in ("one", "two"))
    # Log-probs of about 100 nats are rounded to 1e-5, and rewards are their differences.
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert abs(one["eval_loss"] - math.log(2)) > 1e-5


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "adapter"])
def test_the_best_policy_is_the_one_that_is_saved(
    world: TinyWorld, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """Under a learning rate that makes the held-out loss rise; one checkpoint is kept beside the newest."""
    if lora is not None:
        pytest.importorskip("peft")
    training = {**TRAINING, **BEST, "save_total_limit": 1, "learning_rate": 3e-2}
    recipe = world.recipe(**DPO, policy={"lora": lora}, training=training)
    report = run(world, recipe, tmp_path)
    losses = dict(evaluated(tmp_path))
    best = min(losses, key=losses.__getitem__)
    assert best < 8
    assert report.best == {"step": best, "metric": "eval_loss", "value": losses[best]}
    assert read_run(tmp_path)["best"] == report.best
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best:.0f}", "checkpoint-8"}
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path)
    assert metrics["eval_loss"] == losses[best]
    assert run(world, recipe, tmp_path, resume=True).best == report.best


def test_a_resumed_run_remembers_the_best_also_in_another_place(world: TinyWorld, tmp_path: Path) -> None:
    """The loss falls, so where greater is better the first evaluation is the best one."""
    recipe = recipe_of(world, **BEST, greater_is_better=True)
    straight = run(world, recipe, tmp_path / "straight")
    assert straight.best is not None
    assert straight.best["step"] == 2
    moved = tmp_path / "moved"
    (tmp_path / "straight").rename(moved)
    weights = load_file(moved / "model.safetensors")
    cut(moved, 6)
    assert run(world, recipe, moved, resume=True).best == straight.best
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(moved / "model.safetensors").items())
    cut(moved, 6)
    shutil.rmtree(moved / "checkpoint-2")
    with pytest.raises(RunError, match=r"checkpoint-2: no such checkpoint; there are 4, 6"):
        run(world, recipe, moved, resume=True)


def test_a_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def left(keep: int, best: str | None) -> list[int]:
        run = tmp_path / f"{keep}-{best}"
        for step in (1, 2, 3, 4, 5):
            (run / f"checkpoint-{step}").mkdir(parents=True)
            (run / f"checkpoint-{step}" / SEAL_FILE).write_text("")
        rotate(run, keep, best)
        return sorted(int(path.name.split("-")[1]) for path in run.iterdir())

    assert left(2, None) == [4, 5]
    assert left(1, "checkpoint-2") == [2, 5]
    assert left(2, "checkpoint-2") == [2, 5]
    assert left(3, "checkpoint-2") == [2, 4, 5]
    assert left(1, "checkpoint-5") == [5]


def test_a_run_without_a_gain_stops_early_and_a_resumed_one_counts_on(world: TinyWorld, tmp_path: Path) -> None:
    """The best at step 2, then patience for the evaluations at 4 and 6; resumed at 4, and at 6, it is the same run."""
    recipe = recipe_of(world, **NO_GAIN, early_stopping_patience=2)
    assert run(world, recipe, tmp_path).steps == 6
    assert evaluated(tmp_path) == [(step, pytest.approx(math.log(2), abs=1e-6)) for step in (2, 4, 6)]
    straight = read_metrics(tmp_path / METRICS_FILE)
    facts = read_run(tmp_path)
    assert (facts["complete"], facts["steps"], facts["best"]["step"]) == (True, 6, 2)
    for killed_after in (4, 6):
        cut(tmp_path, killed_after)
        assert run(world, recipe, tmp_path, resume=True).steps == 6
        assert read_metrics(tmp_path / METRICS_FILE) == straight
        # Time and tokens are those of each start.
        own = {name: facts[name] for name in ("parity", "seconds", "cost")}
        assert {**read_run(tmp_path), **own} == facts
    finished = run(world, recipe, tmp_path, resume=True)
    assert (finished.steps, finished.pairs) == (6, 0)


def test_a_threshold_asks_for_more_than_a_small_gain(world: TinyWorld, tmp_path: Path) -> None:
    """The held-out loss falls at every step, by far less than 10."""
    training = {**BEST, "learning_rate": 1e-5, "early_stopping_patience": 1}
    run(world, recipe_of(world, **training), tmp_path / "any")
    losses = [loss for _, loss in evaluated(tmp_path / "any")]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
    assert run(world, recipe_of(world, **training, early_stopping_threshold=10.0), tmp_path / "ten").steps == 4


class StopAtTwo:
    """A signal that is heard when the second step ends."""

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> StopAtTwo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    @property
    def signum(self) -> int:
        self.asked += 1
        return signal.SIGTERM if self.asked == 2 else 0


def test_a_signal_saves_what_is_not_the_best_and_the_run_goes_on_from_there(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_strategy: best` writes a checkpoint at step 1; that of step 2, which is no better, is the signal's."""
    best = {**NO_GAIN, "eval_steps": 1, "max_steps": 3, "save_strategy": "best", "save_total_limit": 1}
    recipe = recipe_of(world, **best)
    with monkeypatch.context() as patched:
        patched.setattr(aligning, "StopRequest", StopAtTwo)
        with pytest.raises(RunInterrupted, match="interrupted after step 2 of 3"):
            run(world, recipe, tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    report = run(world, recipe, tmp_path, resume=True)
    assert report.best is not None
    assert (report.steps, report.best["step"]) == (3, 1)
    assert [step for step, _ in evaluated(tmp_path)] == [1, 2, 3]


def test_a_learning_rate_that_goes_by_evaluations_falls_and_is_resumed(world: TinyWorld, tmp_path: Path) -> None:
    """No evaluation gains 10 nats on the first, at step 2: without patience the rate falls to a tenth each time."""
    asked = {"patience": 0, "threshold": 10.0, "threshold_mode": "abs"}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": asked}
    recipe = recipe_of(world, **STEPS, **plateau, learning_rate=1e-3, save_strategy="steps", save_steps=4)
    run(world, recipe, tmp_path)
    straight = read_metrics(tmp_path / METRICS_FILE)
    rates = [row["learning_rate"] for row in rows(tmp_path, evaluations=False)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    cut(tmp_path, 4)
    run(world, recipe, tmp_path, resume=True)
    assert read_metrics(tmp_path / METRICS_FILE) == straight


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {**BEST, "save_steps": 4},
            "evaluation every 2 steps and a checkpoint every 4, .* set save_strategy: best, or sav",
        ),
        (
            {**BEST, "eval_strategy": "epoch"},
            r"evaluations by epoch and checkpoints by steps do not meet; set save_str",
        ),
        ({**BEST, "save_strategy": "no"}, r"load_best_model_at_end: evaluations by steps and checkpoints by no do not"),
        (
            {**STEPS, "save_strategy": "best"},
            r"training\.save_strategy: best by which metric\? Set metric_for_best_mod",
        ),
        (
            {**STEPS, "early_stopping_patience": 1},
            r"training\.early_stopping_patience: .* load_best_model_at_end: true",
        ),
        ({**BEST, "early_stopping_threshold": 0.1}, r"nothing stops early without early_stopping_patience"),
        (
            {**STEPS, "lr_scheduler_type": "greedy", "metric_for_best_model": "rewards/margins"},
            r"training\.lr_scheduler_kwargs: mode min takes a better rewards/margins for a worse one; set {mode: max}",
        ),
        ({**STEPS, "lr_scheduler_type": "greedy", "warmup_steps": 2}, r"training\.warmup_steps: .* greedy has none"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_evaluations_that_could_not_decide_are_refused_before_anything_loads(
    world: TinyWorld, tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        training_arguments(recipe_of(world, **training), tmp_path)


def test_a_metric_that_no_evaluation_gives_is_named_at_the_first_step(world: TinyWorld, tmp_path: Path) -> None:
    recipe = recipe_of(world, **BEST, metric_for_best_model="eval_rewards/accuracy")
    with pytest.raises(RecipeError, match="no evaluation gives 'rewards/accuracy'; nearest is rewards/accuracies"):
        run(world, recipe, tmp_path)
    assert evaluated(tmp_path) == []


def test_a_first_evaluation_after_the_end_could_choose_nothing(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the first evaluation comes after 9 steps, the run has 8"):
        run(world, recipe_of(world, **BEST, eval_delay=9), tmp_path)


def test_a_missing_held_out_cache_says_how_to_build_it(world: TinyWorld, tmp_path: Path) -> None:
    """As the cache of the pairs that are trained on."""
    build_caches(world.recipe(**DPO, data={"eval_split": None}), tmp_path / "store")
    recipe, file = recipe_of(world, **STEPS), world.recipe_file(**DPO)
    recipe_cache(recipe, file, str(tmp_path / "store"), None)
    with pytest.raises(CacheMissing, match=rf"build it with: fpo cache {file} --store {tmp_path / 'store'}"):
        recipe_cache(recipe, file, str(tmp_path / "store"), None, held_out=True)


def test_when_a_run_is_evaluated_may_change_where_nothing_goes_by_it(world: TinyWorld, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    run(world, recipe_of(world, **saving), tmp_path / "free")
    cut(tmp_path / "free", 4)
    run(world, recipe_of(world, **saving, **STEPS), tmp_path / "free", resume=True)
    assert [step for step, _ in evaluated(tmp_path / "free")] == [6, 8]
    cut(tmp_path / "free", 4)
    other = world.recipe(**DPO, training={**TRAINING, **saving, **STEPS}, data={"eval_split": "train"})
    build_caches(other, world.store)
    with pytest.raises(RunError, match=r"began with other held-out groups; keep data\.eval_split, or"):
        run(world, other, tmp_path / "free", resume=True)

    run(world, recipe_of(world, **BEST), tmp_path / "held")
    cut(tmp_path / "held", 4)
    with pytest.raises(RunError, match=r"began with training\.eval_steps: 2, the recipe says 1"):
        run(world, recipe_of(world, **{**BEST, "eval_steps": 1, "save_steps": 1}), tmp_path / "held", resume=True)
