"""The same command started several times on one store: the work is shared, whoever is killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import TinyWorld, build_tiny_world

from fpo.stage1_cache.fill import own_place
from fpo.store import verify

N = 160
ROOT = Path(__file__).parents[1]
BUILD = """
import json, sys
from pathlib import Path
from fpo.recipe import load_recipe
from fpo.stage1_cache import build_caches
recipe = load_recipe(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
report = build_caches(recipe, Path(sys.argv[2]), batch_tokens=48)[0]
print(json.dumps([report.built_shards, report.shards_by_others, report.scored, report.cache.digest]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), N, 2)


def start(world: TinyWorld, store: Path, count: int) -> list[subprocess.Popen[str]]:
    """So many processes, all of them begun before the first scores; none is told of the others."""
    recipe = world.recipe_file(cache={"shard_pairs": 8})
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**alone, "XDG_CACHE_HOME": str(world.root / "xdg"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(recipe), str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def results(processes: list[subprocess.Popen[str]]) -> list[list[int | str]]:
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found.append(json.loads(out))
    return found


@pytest.mark.long
def test_two_plain_starts_score_every_completion_once(world: TinyWorld, tmp_path: Path) -> None:
    found = results(start(world, tmp_path, 2))
    assert sum(int(scored) for _, _, scored, _ in found) == 2 * N
    assert all(int(scored) > 0 for _, _, scored, _ in found)
    assert [int(built) + int(others) for built, others, _, _ in found] == [N // 8] * 2
    assert len({digest for _, _, _, digest in found}) == 1


@pytest.mark.campaign
def test_the_others_finish_what_a_killed_one_had_claimed(world: TinyWorld, tmp_path: Path) -> None:
    processes = start(world, tmp_path, 3)
    while len(list(tmp_path.glob("*/records/*.json"))) < 5:
        assert processes[0].poll() is None
    processes[0].kill()
    found = results(processes[1:])
    processes[0].communicate()
    # What the killed one had committed is not scored again; what it was at work on is.
    assert 2 * N - 2 * 8 * 16 < sum(int(scored) for _, _, scored, _ in found) <= 2 * N
    key = next(path.name for path in tmp_path.iterdir() if len(list(path.glob("records/*"))) == N // 8)
    assert verify(tmp_path, key).ok


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "10"}, (6, 10)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            (5, 6),
        ),
    ],
)
def test_torchrun_and_slurm_say_where_to_begin(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: tuple[int, int]
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_place() == place
