"""
The run folder: what one training result is, on disk.

    recipe.yaml     the resolved recipe          metrics.jsonl   one object per logged step
    run.json        cache key, manifest digest,  checkpoint-N/   as Trainer writes them
                    library versions, figures    and the policy as save_pretrained + tokenizer
    base/           the weights below an adapter that was trained on merged ones: adapter_config.json, in the run and
                    in its checkpoints, names them by their absolute path; in a run that was moved, correct it there
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from errors import RunError
from recipe import Recipe, dump_recipe, validate_recipe
from store import Cache

RECIPE_FILE, RUN_FILE, METRICS_FILE = "recipe.yaml", "run.json", "metrics.jsonl"
BASE_FOLDER = "base"
_VERSIONS = ("fpo", "torch", "transformers", "accelerate", "zarr", "numpy")


def open_run(folder: Path, recipe: Recipe, cache: Cache, pairs_per_step: int, resume: bool) -> Path | None:
    """
    Prepare the run folder: a new one, or with `resume` one that the same recipe and cache began, if there is one. A
    folder where a run was begun and nothing was trained counts as new.

    Returns the checkpoint to continue from, or None to begin. Raises RunError.
    """
    if not _holds_training(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / RECIPE_FILE, dump_recipe(recipe))
            write_run(folder, identity(cache, pairs_per_step))
        except OSError as error:
            raise RunError(f"{folder}: the run folder cannot be written ({error.strerror})") from None
        return None
    if not resume:
        raise RunError(f"{folder}: this run exists; continue it with --resume, or give another --output")
    known = read_run(folder)
    if known["manifest_digest"] != cache.digest:
        raise RunError(
            f"{folder}: this run began from another cache\n"
            f"  the run has {known['cache'][:12]}, manifest {known['manifest_digest'][:12]}\n"
            f"  the recipe asks for {cache.key[:12]}, manifest {cache.digest[:12]}"
        )
    if known["pairs_per_step"] != pairs_per_step:
        raise RunError(
            f"{folder}: this run takes {known['pairs_per_step']} pairs per step, now it would be {pairs_per_step}; "
            "keep processes x per_device_train_batch_size x gradient_accumulation_steps"
        )
    changed = _changed_fields(read_recipe(folder), recipe)
    if changed:
        name, before, now = changed[0]
        raise RunError(f"{folder}: this run began with {name}: {before}, the recipe says {now}; give another --output")
    return last_checkpoint(folder)


def _holds_training(folder: Path) -> bool:
    """Whether there is anything in the folder beyond what a start that failed before the first step leaves."""
    if not folder.is_dir():
        return folder.exists()
    begun = {name + end for name in (RECIPE_FILE, RUN_FILE, BASE_FOLDER) for end in ("", ".tmp")}
    return any(path.name not in begun for path in folder.iterdir())


def identity(cache: Cache, pairs_per_step: int) -> dict[str, Any]:
    """What run.json says from the beginning."""
    return {
        "cache": cache.key,
        "manifest_digest": cache.digest,
        "reference": cache.recipe["scorer"]["reference"],
        "pairs_per_step": pairs_per_step,
        "versions": {name: version(name) for name in _VERSIONS},
        "complete": False,
    }


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json; readers see the old or the new one, never a part."""
    _write(folder / RUN_FILE, json.dumps(facts, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """run.json. Raises RunError where the folder is no run."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder}: no run here ({RUN_FILE} is missing)") from None
    except ValueError as error:
        raise RunError(f"{folder / RUN_FILE}: not JSON ({error})") from None
    assert isinstance(facts, dict)
    return facts


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run."""
    path = folder / RECIPE_FILE
    return validate_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def last_checkpoint(folder: Path) -> Path | None:
    """
    The newest checkpoint that is whole; newer ones that a killed run left unfinished are removed.

    Trainer writes trainer_state.json last and we the metric sums after it, so a checkpoint with both is whole.
    """
    found = [
        (int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            for name in ("trainer_state.json", "metric_sums_0.json"):
                json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
            continue
        return path
    return None


def _changed_fields(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """Dotted name and both values of every field that differs."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: value}
        return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}".lstrip(".")).items()}

    old, new = flat(before.model_dump(mode="json"), ""), flat(now.model_dump(mode="json"), "")
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
