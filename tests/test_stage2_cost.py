"""What a run says that it cost, and what a reference in memory would have added to it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_world import TinyWorld, build_tiny_world

from fpo.commands.reports import cost_lines
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import AlignReport, Cost, align
from fpo.stage2_align.cost import peak_resident
from fpo.stage2_align.run import read_run

ONCE = {"num_train_epochs": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 4)
    build_caches(world.recipe(), world.store)
    return world


@pytest.fixture(scope="module")
def n_weights(world: TinyWorld) -> int:
    """Of the model in the world."""
    return sum(tensor.numel() for tensor in load_file(world.root / "model" / "model.safetensors").values())


def trained(world: TinyWorld, run: Path, **sections: Any) -> AlignReport:
    recipe = world.recipe(**{**sections, "training": {**ONCE, **sections.get("training", {})}})
    return align(recipe, find_cache(recipe, world.store), run)


def cost(world: TinyWorld, run: Path, **sections: Any) -> Cost:
    found = trained(world, run, **sections).cost
    assert found is not None
    return found


def test_a_reference_would_add_its_weights_and_a_third_of_the_products(
    world: TinyWorld, n_weights: int, tmp_path: Path
) -> None:
    """
    Weights in float32 are 4 bytes each. A forward of N weights and T tokens takes 2 N T operations, forward and
    backward 6 N T. Of an epoch, T is every token of the cache once.
    """
    report = trained(world, tmp_path)
    cache = find_cache(world.recipe(), world.store)
    assert report.cost is not None
    assert report.cost.reference_bytes == 4 * n_weights
    assert report.cost.reference_share == pytest.approx(2 / 6)
    assert report.cost.tokens == sum(shard.n_tokens for shard in cache.manifest.shards)
    facts = read_run(tmp_path)
    assert (Cost(**facts["cost"]), facts["seconds"]) == (report.cost, report.seconds)
    again = align(world.recipe(training=ONCE), cache, tmp_path, resume=True)
    assert (again.cost, again.seconds) == (report.cost, report.seconds)


def test_the_peak_is_what_the_process_held(world: TinyWorld, tmp_path: Path) -> None:
    """Not what its parent held: a process that holds little is started by one that holds much."""
    before = peak_resident()
    found = cost(world, tmp_path, objective={"name": "sft"})
    after = peak_resident()
    assert before is not None
    assert after is not None
    ballast = bytearray(after)
    ballast[::4096] = b"x" * len(ballast[::4096])
    program = "from fpo.stage2_align.cost import peak_resident; print(peak_resident())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(ballast)
    assert found.peak_of == "resident set"
    assert found.peak_bytes is not None
    assert before <= found.peak_bytes <= after


def test_a_forward_that_is_computed_twice_makes_the_references_a_quarter(world: TinyWorld, tmp_path: Path) -> None:
    """Activation checkpointing: 8 N T beside the reference's 2 N T."""
    found = cost(world, tmp_path, training={"activation_checkpointing": True})
    assert found.reference_share == pytest.approx(2 / 8)


def test_beside_an_adapter_a_reference_adds_no_weights_and_nearly_half(
    world: TinyWorld, n_weights: int, tmp_path: Path
) -> None:
    """
    The adapter of rank 2 on the 32 x 32 q_proj of three layers has 3 x 2 x (32 + 32) weights; of the base's N none is
    trained, so with n = N + 384 training takes 2 n T + 2 n T + 2 384 T.
    """
    pytest.importorskip("peft")
    found = cost(world, tmp_path, policy={"lora": {"r": 2, "target_modules": ["q_proj"]}})
    assert found.reference_bytes == 0
    n = n_weights + 384
    assert found.reference_share == pytest.approx(2 * n / (4 * n + 2 * 384))


def test_a_reference_that_is_another_model_is_counted_from_its_files(
    world: TinyWorld, n_weights: int, tmp_path: Path
) -> None:
    """As soon as its folder is not here, nothing is said of it: counting fetches nothing."""
    shutil.copytree(world.root / "model", tmp_path / "policy")
    sections = {"policy": {"model": str(tmp_path / "policy")}, "objective": {"name": "dpo"}}
    found = cost(world, tmp_path / "run", **sections)
    assert found.reference_bytes == 4 * n_weights
    assert found.reference_share == pytest.approx(1 / 3)


def test_an_objective_without_a_reference_has_nothing_to_save(world: TinyWorld, tmp_path: Path) -> None:
    found = cost(world, tmp_path, objective={"name": "simpo"})
    assert (found.needs_reference, found.reference_bytes, found.reference_share) == (False, None, None)


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        (
            Cost(12_345, 3 * 2**20, "resident set", True, 2**20, 1 / 3),
            [
                "memory      3.0 MiB at the peak (resident set); a reference in memory would add 1.0 MiB of weights",
                "compute     12,345 tokens forward and backward; a reference would add a forward of them, +33 % of the "
                "matrix products",
            ],
        ),
        (
            Cost(9, 2**30, "device", True, 0, 0.5),
            [
                "memory      1.0 GiB at the peak (device); a reference in memory would add nothing: it is the policy "
                "with its adapter off",
                "compute     9 tokens forward and backward; a reference would add a forward of them, +50 % of the "
                "matrix products",
            ],
        ),
        (
            Cost(9, None, "resident set", False, None, None),
            [
                "memory      not told by this system",
                "compute     9 tokens forward and backward; the objective needs no reference",
            ],
        ),
        (
            Cost(9, 2**20, "device", True, None, None),
            ["memory      1.0 MiB at the peak (device)", "compute     9 tokens forward and backward"],
        ),
    ],
    ids=["whole", "adapter", "no reference", "not here"],
)
def test_the_report_says_what_is_known_and_no_more(found: Cost, lines: list[str]) -> None:
    assert cost_lines(found) == lines
