"""Signals, kills and other numbers of processes: a run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import TinyWorld, build_tiny_world

from fpo.interrupts import StopRequest, interruptible
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.checkpoints import last_checkpoint
from fpo.stage2_align.run import METRICS_FILE, read_run

pytestmark = pytest.mark.long

TRAINING = {"optim": "sgd", "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    build_caches(world.recipe(), world.store)
    return world


def start(world: TinyWorld, recipe: Path, run: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """fpo align in a process of its own; stderr can be read."""
    command = [sys.executable, "-m", "fpo", "align", recipe, "--store", world.store, "--output", run, *flags]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def start_ranks(world: TinyWorld, recipe: Path, run: Path, port: int, *flags: str) -> list[subprocess.Popen[str]]:
    """Two gloo processes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(world, recipe, run, *flags, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in (0, 1)]


def until_step(stream: IO[str] | None, step: int) -> str:
    """Read progress lines up to this step's."""
    assert stream is not None
    seen = ""
    for line in stream:
        seen += line
        if line.startswith(f"align: step {step}/"):
            return seen
    raise AssertionError(f"the run ended before step {step}:\n{seen}")


def rows(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / METRICS_FILE)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Ctrl-C as a terminal's process hears it; one that a shell put into the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(
    world: TinyWorld, tmp_path: Path, signum: signal.Signals
) -> None:
    training = {"max_steps": 150, "save_steps": 149}
    file = world.recipe_file(training=training)
    process = start(world, file, tmp_path / "run")
    until_step(process.stderr, 12)
    process.send_signal(signum)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    [line] = [line for line in rest.splitlines() if line.startswith("interrupted")]
    assert line.startswith("interrupted after step ")
    assert line.endswith(f"fpo align {file} --store {world.store} --output {tmp_path / 'run'} --resume")
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert line.startswith(f"interrupted after step {checkpoint.name.split('-')[1]} of 150; continue with: ")
    assert not read_run(tmp_path / "run")["complete"]
    assert not (tmp_path / "run" / "model.safetensors").exists()

    if signum == signal.SIGINT:
        recipe = world.recipe(training=training)
        cache = find_cache(recipe, world.store)
        align(recipe, cache, tmp_path / "run", resume=True)
        align(recipe, cache, tmp_path / "straight")
        assert rows(tmp_path / "run") == rows(tmp_path / "straight")
        assert_same_weights(tmp_path / "run", tmp_path / "straight")


def test_two_processes_stop_after_the_same_step_when_one_of_them_hears_of_it(world: TinyWorld, tmp_path: Path) -> None:
    file = world.recipe_file(training={**TRAINING, "max_steps": 400, "save_steps": 399})
    ranks = start_ranks(world, file, tmp_path / "run", 29541)
    until_step(ranks[0].stderr, 10)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], said
    assert "interrupted after step" in said[0]
    assert "interrupted" not in said[1]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_sharding_that_would_not_happen_is_refused_by_every_process(world: TinyWorld, tmp_path: Path) -> None:
    """accelerate leaves FSDP off on CPUs, without a word."""
    file = world.recipe_file(training={**TRAINING, "max_steps": 2, "fsdp": "full_shard", "use_cpu": True})
    ranks = start_ranks(world, file, tmp_path / "run", 29543)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert all("training.fsdp: this start would shard nothing" in text for text in said)


def test_the_same_signal_once_more_ends_at_once_and_another_kind_is_no_second_wish() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_work_that_may_end_anywhere_ends_with_one_line(
    signum: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, interruptible("continue with: fpo cache mine.yaml"):
        os.kill(os.getpid(), signum)
    assert ended.value.code == code
    assert capsys.readouterr().err == "interrupted; continue with: fpo cache mine.yaml\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_stage_1_interrupted_says_how_to_go_on(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", 400, 2)
    file = world.recipe_file(cache={"shard_pairs": 2})
    command = [sys.executable, "-m", "fpo", "cache", file, "--store", world.store]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(world.store.glob("*/records/000003.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    hint = f"finished shards are kept; continue with: fpo cache {file} --store {world.store}"
    assert err.splitlines()[-1] == f"interrupted; {hint}"


def cut(run: Path, step: int) -> None:
    """The run as one that was killed after the checkpoint at `step` leaves it."""
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (run / "run.json").write_text(json.dumps({**read_run(run), "complete": False}))


def finish_ranks(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-2000:]


def test_a_run_goes_on_with_another_number_of_processes(world: TinyWorld, tmp_path: Path) -> None:
    """
    8 pairs a step, by one process or by two; checkpoints at 7 and 14, between two logs. From 7 on by the other number
    of processes: the losses of the run that never stopped, also in the row whose sums were begun by the others.
    """
    one = {**TRAINING, "per_device_train_batch_size": 8, "num_train_epochs": 3}
    two = {**TRAINING, "per_device_train_batch_size": 4, "num_train_epochs": 3}
    recipe = world.recipe(training=one)
    align(recipe, find_cache(recipe, world.store), tmp_path / "straight")
    expected = losses(tmp_path / "straight")
    assert len(expected) == 3

    shutil.copytree(tmp_path / "straight", tmp_path / "one-then-two")
    cut(tmp_path / "one-then-two", 7)
    file = world.recipe_file(training=two)
    finish_ranks(start_ranks(world, file, tmp_path / "one-then-two", 29542, "--resume"))
    assert losses(tmp_path / "one-then-two") == pytest.approx(expected, rel=1e-5)

    finish_ranks(start_ranks(world, file, tmp_path / "two", 29543))
    by_two = rows(tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "two-then-one")
    cut(tmp_path / "two-then-one", 7)
    align(recipe, find_cache(recipe, world.store), tmp_path / "two-then-one", resume=True)
    assert losses(tmp_path / "two-then-one") == pytest.approx(expected, rel=1e-5)

    cut(tmp_path / "two", 7)
    finish_ranks(start_ranks(world, file, tmp_path / "two", 29544, "--resume"))
    assert rows(tmp_path / "two") == by_two


def test_a_kill_at_any_moment_of_a_rotation_leaves_a_whole_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    """checkpoint-2 takes the place of checkpoint-1; what is found afterwards is one of them, with every file."""
    file = world.recipe_file(training={"max_steps": 1, "save_total_limit": 1})
    command = [sys.executable, Path(__file__).with_name("run_killed_rotation.py"), file, world.store, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    points = int(done.stdout.splitlines()[-1])
    assert points > 25
    found = []
    for n in range(1, points + 1):
        checkpoint = last_checkpoint(tmp_path / f"{n}")
        assert checkpoint is not None, n
        found.append(checkpoint.name)
        assert (
            load_file(checkpoint / "model.safetensors").keys()
            == load_file(tmp_path / "begun/checkpoint-1/model.safetensors").keys()
        )
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert found == sorted(found)
    assert {"checkpoint-1", "checkpoint-2"} == set(found)
