"""A sweep: a run for each value from one cache, each as it is alone, and a table that says what became of them."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import TinyWorld, build_tiny_world

from fpo import cli
from fpo.recipe import load_recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import StopAtStepEnd, read_metrics
from fpo.stage2_align.run import METRICS_FILE, read_run

pytestmark = pytest.mark.long

SHORT = {"max_steps": 3, "num_train_epochs": 1, "save_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 4)
    build_caches(world.recipe(), world.store)
    return world


class Shell:
    """`fpo` in this process, in a folder of its own."""

    def __init__(self, world: TinyWorld, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.world, self.capsys, self.folder = world, capsys, folder
        self.recipe = world.recipe_file(training=SHORT)

    def __call__(self, command: str, *options: str, expect: int = 0) -> tuple[str, str]:
        arguments = ["fpo", command, str(self.recipe), "--store", str(self.world.store), *options]
        with mock.patch.object(sys, "argv", arguments):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as end:
                code = end.code or 0
        out, err = self.capsys.readouterr()
        assert code == expect, out + err
        return out, err

    def sweep(self, *settings: str, flags: tuple[str, ...] = (), expect: int = 0) -> tuple[str, str]:
        chosen = [word for setting in settings for word in ("--set", setting)]
        return self("align", *chosen, "--output", str(self.folder), *flags, expect=expect)


@pytest.fixture
def fpo(world: TinyWorld, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    return Shell(world, capsys, tmp_path / "sweep")


def assert_same_run(one: Path, other: Path) -> None:
    """Every logged number and every weight, bit by bit."""
    assert read_metrics(one / METRICS_FILE) == read_metrics(other / METRICS_FILE)
    (ours,), (theirs,) = (sorted(run.glob("*model.safetensors")) for run in (one, other))
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        (["objective.alpha=0,3"], "objective.alpha=3"),
        (["objective={name: simpo},{name: dpo}", "training.seed=2"], "objective=name-dpo"),
        (["policy.lora=null,{r: 4}"], "policy.lora=r-4"),
        (["training.bf16=true,false", "policy.same_arithmetic=false", "objective={name: dpo}"], "training.bf16=false"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_of_a_sweep_is_the_run_that_its_settings_give_alone(fpo: Shell, settings: list[str], last: str) -> None:
    """Of the last run, before which there is most that could move a bit of it."""
    fpo.sweep(*settings)
    recipe = load_recipe(fpo.folder / last / "recipe.yaml")
    align(recipe, find_cache(recipe, fpo.world.store), fpo.folder / "alone")
    assert_same_run(fpo.folder / last, fpo.folder / "alone")


def test_a_sweep_ends_with_a_table_of_its_runs(fpo: Shell) -> None:
    out, err = fpo.sweep("objective={name: dpo},{name: sft}", "training.learning_rate=5e-4")
    lines = out.splitlines()
    assert lines[0] == f"runs        {fpo.folder}"
    assert lines[1].startswith("cache       ")
    assert out.count("cache       ") == 1
    assert err.count("opening the cache ...") == 1
    assert "run 2 of 2: objective={name: sft}\n" in err
    header, *rows = lines[3:]
    names = ["objective", "first loss", "last loss", "rewards/accuracies", "rewards/margins", "time"]
    assert re.split(r"  +", header) == names
    assert [row[: row.index("}") + 1] for row in rows] == ["{name: dpo}", "{name: sft}"]
    first, *_, last = read_metrics(fpo.folder / "objective=name-dpo" / METRICS_FILE)
    shown = [f"{value:.4g}" for value in (first["loss"], last["loss"])]
    shown += [f"{last[name]:.4g}" for name in ("rewards/accuracies", "rewards/margins")]
    assert rows[0].split()[2:6] == shown
    # Numbers end where their heading does.
    ends = [header.index(name) + len(name) for name in names[1:]]
    assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows for end in ends)


def test_the_same_command_again_skips_what_is_finished(fpo: Shell) -> None:
    fpo.sweep("objective.alpha=0.5,3")
    done = fpo.folder / "objective.alpha=0.5"
    before = (done / "model.safetensors").stat().st_mtime_ns
    out, _ = fpo.sweep("objective.alpha=0.5,1.0,3", flags=("--json",))
    states = [(run["run"], run["set"], run["state"]) for run in json.loads(out)]
    assert states == [
        (str(fpo.folder / "objective.alpha=0.5"), {"objective.alpha": 0.5}, "finished before"),
        (str(fpo.folder / "objective.alpha=1"), {"objective.alpha": 1.0}, "trained"),
        (str(fpo.folder / "objective.alpha=3"), {"objective.alpha": 3}, "finished before"),
    ]
    assert (done / "model.safetensors").stat().st_mtime_ns == before
    out, _ = fpo.sweep("objective.alpha=0.5,1")
    assert out.count("finished before") == 2


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(fpo: Shell) -> None:
    """The folder says what the sweep varies; the rest is held against the run, as by --resume."""
    fpo.sweep("objective.alpha=0.5,3")
    out, _ = fpo.sweep("objective.alpha=0.5,3", "objective.beta=7", expect=1)
    assert out.count("failed: this run began with objective.beta: 2.0, the recipe says 7.0") == 2


def test_a_run_that_fails_is_told_and_stops_no_other(fpo: Shell) -> None:
    """No model outlives its run, also where an error's traceback held it."""
    out, err = fpo.sweep("training.learning_rate=1e9,1e-4", expect=1)
    failed, trained = out.splitlines()[-2:]
    assert re.match(
        r" *1e9 +- +- +- +- +-  failed: .* is not a number from step \d on; training\.learning_rate", failed
    )
    assert re.match(r" *1e-4 +0\.69", trained)
    assert read_run(fpo.folder / "training.learning_rate=0.0001")["complete"]
    assert not read_run(fpo.folder / "training.learning_rate=1e9")["complete"]
    assert err.endswith("error: 1 of 2 runs failed: training.learning_rate=1e9\n")
    out, _ = fpo.sweep("training.learning_rate=1e9,1e-4", flags=("--json",), expect=1)
    failed, trained = json.loads(out)
    assert (failed["state"], trained["state"]) == ("failed", "finished before")
    assert "is not a number" in failed["error"]


def test_ctrl_c_stops_a_sweep_and_the_same_command_goes_on(
    fpo: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the first run's second step; what was trained is not trained again, and no number is another."""
    fpo.sweep("objective.alpha=1,2")
    fpo.folder.rename(tmp_path / "straight")
    step_end, seen = StopAtStepEnd.on_step_end, []

    def interrupted(self: StopAtStepEnd, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seen.append(state.global_step)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        step_end(self, args, state, control, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(StopAtStepEnd, "on_step_end", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        out, err = fpo.sweep("objective.alpha=1,2", expect=130)
        signal.signal(signal.SIGINT, before)
    assert out == ""
    command = f"fpo align {fpo.recipe} --store {fpo.world.store} --set objective.alpha=1,2 --output {fpo.folder}"
    assert err.splitlines()[-1] == f"interrupted after step 2 of 3; continue with: {command}"
    assert [path.name for path in fpo.folder.iterdir()] == ["objective.alpha=1"]
    _, err = fpo.sweep("objective.alpha=1,2")
    assert "align: step 2/3" not in err.split("run 2 of 2")[0]
    for run in fpo.folder.iterdir():
        assert_same_run(run, tmp_path / "straight" / run.name)


def test_a_column_that_a_later_run_reads_is_missed_before_the_first_is_trained(fpo: Shell) -> None:
    features = [f"[{{sae: {fpo.world.root / 'sae'}, hookpoint: model.layers.{n}, top_k: 16}}]" for n in (1, 0)]
    _, err = fpo.sweep(f"features={','.join(features)}", expect=1)
    assert "has no column of features at model.layers.0, top 16" in err
    assert f"add it with: fpo cache {fpo.recipe} --store {fpo.world.store} --set 'features={features[1]}'" in err
    assert not fpo.folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.tf32=true,false"], "training.tf32: it is set once in a process, a sweep has True and False; start"),
        (["objective.alpha=1,2", "training.report_to=swanlab"], "training.report_to: "),
        (["training.optim=sgd,adamw_8bit"], "training.optim: adamw"),
        (["data.split=train,test"], "--set data.split: a sweep trains from one cache, and train, test need several"),
    ],
)
def test_what_one_process_cannot_sweep_is_refused_before_anything_is_trained(
    fpo: Shell, settings: list[str], message: str
) -> None:
    _, err = fpo.sweep(*settings, expect=1)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not fpo.folder.exists()


def test_several_processes_and_the_folder_of_a_run_are_refused(fpo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    fpo.sweep("objective.alpha=1")
    _, err = fpo.sweep("objective.alpha=1,2", expect=1)
    assert "a run lies there, and a sweep's folder holds runs; give another --output" in err
    (fpo.folder / "run.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, err = fpo.sweep("objective.alpha=1,2", expect=1)
    assert err.splitlines()[-1].startswith("error: --set: a sweep trains in one process, this start has 2, which")


def test_other_commands_refuse_several_values_in_one_line(fpo: Shell) -> None:
    for command in ("cache", "align"):
        out, err = fpo(command, "--set", "objective.alpha=1,", expect=1)
        assert (out, err.count("\n")) == ("", 1)
    out, err = fpo("cache", "--set", "objective.alpha=1,2", expect=1)
    assert out == ""
    assert "error: --set objective.alpha=1,2: several values are a sweep, which fpo align alone trains" in err


def test_a_loggers_run_ends_with_ours(fpo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb keeps a process' run open: the next would be logged into it. Told also where a run failed."""
    ended: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: ended.append(len(ended))))
    fpo.sweep("training.learning_rate=1e9,1e-4", expect=1)
    assert ended == [0, 1]
