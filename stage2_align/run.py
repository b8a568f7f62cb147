"""
The run folder: what one training result is, on disk. A run is where run.json is; other files may lie beside it.

    recipe.yaml     the resolved recipe          metrics.jsonl   one object per logged step and per evaluation
    run.json        keys and manifest digests,   checkpoint-N/   as Trainer writes them, sealed (see checkpoints)
                    library versions, figures    evaluation.json held-out metrics; evaluation-N.json of checkpoint N
    .lock           held while it trains         samples/        what the policy wrote after step N
                                                 and the policy as save_pretrained + tokenizer
    base/           the weights below an adapter that was trained on merged ones: adapter_config.json, in the run and
                    in its checkpoints, names them by their absolute path; in a run that was moved, correct it there
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fpo.errors import RunError
from fpo.recipe import Recipe, dump_recipe, validate_recipe
from fpo.stage2_align.arguments import free_arguments, rate_depends_on_length, resolved, total_steps
from fpo.stage2_align.checkpoints import last_checkpoint
from fpo.store import Cache, column_name, is_url

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

RECIPE_FILE, RUN_FILE, METRICS_FILE, LOCK_FILE = "recipe.yaml", "run.json", "metrics.jsonl", ".lock"
BASE_FOLDER, SAMPLES_FOLDER = "base", "samples"
# Of run.json; a finished run adds what it found.
_FACTS = {"cache", "manifest_digest", "store", "reference", "columns", "held_out", "pairs_per_step", "complete"}
_VERSIONS = ("fpo", "torch", "transformers", "accelerate", "zarr", "numpy")
# What a run writes, by pattern: in a folder that is no run, these are somebody else's.
_OURS = (
    *(RECIPE_FILE, METRICS_FILE, SAMPLES_FOLDER, "checkpoint-*"),
    *("config.json", "adapter_config.json", "*.safetensors"),
)


class OpenedRun(NamedTuple):
    """A run folder, ready."""

    checkpoint: Path | None
    """Where to continue; None begins."""
    finished: bool
    """Whether all its steps were taken already."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    The run folder, made where it is not there, and to this process alone: two that train one run would write its
    metrics twice. A killed process holds no lock; where the file system has none, nothing is protected.

    Raises RunError where another process has it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"{folder}: a file, not a folder; give another --output") from None
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be written ({error.strerror})") from None
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise RunError(
            f"{folder}: another process trains this run{f' ({holder})' if holder else ''}; wait for it or end it"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def open_run(
    folder: Path, recipe: Recipe, cache: Cache, pairs_per_step: int, resume: bool, held_out: Cache | None = None
) -> OpenedRun:
    """
    Prepare a locked run folder: a new run, or with `resume` one that was begun by the same experiment, if there is
    one. A run where nothing was trained yet counts as new.

    Raises RunError.
    """
    facts = identity(cache, pairs_per_step, held_out)
    begun = (folder / RUN_FILE).is_file()
    if not begun:
        _check_free(folder)
    if begun and resume and _has_trained(folder):
        return _reopen(folder, recipe, cache, facts)
    if begun and _has_trained(folder):
        raise RunError(f"{folder}: this run exists; continue it with --resume, or give another --output")
    # run.json goes first: from then on recipe.yaml is ours to replace.
    _record(folder, recipe, {**facts, "complete": False})
    return OpenedRun(None, finished=False)


def _check_free(folder: Path) -> None:
    """RunError where a run would write over somebody's files."""
    found = next((path for pattern in _OURS for path in sorted(folder.glob(pattern))), None)
    if found is not None:
        raise RunError(
            f"{folder}: no run ({RUN_FILE} is missing), but it holds {found.name}, which a run would write over; "
            "give another --output"
        )


def _has_trained(folder: Path) -> bool:
    """Whether a step was logged or saved, or all were taken."""
    metrics = folder / METRICS_FILE
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or any(folder.glob("checkpoint-*")) or bool(read_run(folder)["complete"])


def _reopen(folder: Path, recipe: Recipe, cache: Cache, now: dict[str, Any]) -> OpenedRun:
    """
    A run that is to go on: by the same experiment, maybe for longer. Raises RunError.

    now  what run.json would say of a run that began now
    """
    known, before = read_run(folder), read_recipe(folder)
    pairs_per_step = now["pairs_per_step"]
    if known["manifest_digest"] != cache.digest:
        raise RunError(
            f"{folder}: this run began from another cache\n"
            f"  the run has {_cache_line(known)}\n"
            f"  the recipe asks for {_cache_line(now)}"
        )
    if known["columns"] != columns_of(cache):
        raise RunError(
            f"{folder}: this run began with other columns of cache {cache.key[:12]}\n"
            f"  the run has {_columns_line(known['columns'])}\n"
            f"  the recipe asks for {_columns_line(columns_of(cache))}"
        )
    if known["held_out"] and now["held_out"] and known["held_out"] != now["held_out"]:
        raise RunError(
            f"{folder}: this run began with other held-out groups; keep data.eval_split, or give another --output\n"
            f"  the run has {_cache_line(known['held_out'])}\n"
            f"  the recipe asks for {_cache_line(now['held_out'])}"
        )
    if known["pairs_per_step"] != pairs_per_step:
        raise RunError(
            f"{folder}: this run takes {known['pairs_per_step']} pairs per step, now it would be {pairs_per_step}; "
            "keep processes x per_device_train_batch_size x gradient_accumulation_steps"
        )
    changed = changed_fields(before, recipe)
    if changed:
        name, old, new = changed[0]
        raise RunError(f"{folder}: this run began with {name}: {old}, the recipe says {new}; give another --output")
    length, wanted = (total_steps(r.training, cache.n_groups, pairs_per_step) for r in (before, recipe))
    if length != wanted and rate_depends_on_length(before.training):
        schedule = resolved(before.training)["lr_scheduler_type"]
        raise RunError(
            f"{folder}: this run began with {length} steps, the recipe says {wanted}: under the schedule "
            f"{schedule!s} the steps already taken would have had other learning rates; give another --output "
            "(a run is of any length under lr_scheduler_type: constant, or constant_with_warmup in whole steps)"
        )
    checkpoint = last_checkpoint(folder)
    done = known["steps"] if known["complete"] else int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if wanted < done:
        raise RunError(f"{folder}: this run has taken {done} steps already, the recipe says {wanted}")
    finished = bool(known["complete"]) and (wanted == done or known["stopped_early"])
    if not finished:
        held_out = now["held_out"] or known["held_out"]
        _record(folder, recipe, {**known, "store": now["store"], "held_out": held_out, "complete": False})
    return OpenedRun(checkpoint, finished)


def changed_fields(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """
    Dotted name and both values of what a resumed run may not change: objective, policy, and all training arguments
    but those that move no weights, and which groups are left out. The reference, the pairs and the features are held by
    the digests of the cache and of its column.
    """

    def held(recipe: Recipe) -> dict[str, Any]:
        sections = recipe.model_dump(mode="json", include={"objective": True, "policy": True, "data": {"filter"}})
        free = free_arguments(recipe.training)
        arguments = {n: v for n, v in resolved(recipe.training).items() if n not in free}
        return by_name({**sections, "training": arguments})

    old, new = held(before), held(now)
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def by_name(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, item in value.items() for k, v in by_name(item, f"{name}.{key}".lstrip(".")).items()}


def identity(cache: Cache, pairs_per_step: int, held_out: Cache | None) -> dict[str, Any]:
    """What run.json says from the beginning."""
    return {
        "cache": cache.key,
        "manifest_digest": cache.digest,
        "store": store_of(cache),
        "reference": cache.recipe["scorer"]["reference"],
        "columns": columns_of(cache),
        "held_out": None if held_out is None else {"cache": held_out.key, "manifest_digest": held_out.digest},
        "pairs_per_step": pairs_per_step,
        "versions": {name: version(name) for name in _VERSIONS},
    }


def columns_of(cache: Cache) -> list[dict[str, Any]]:
    """What is read beside the base: each column's key and manifest digest, and the spec that is asked of it."""
    return [
        {"key": column.sealed.key, "manifest_digest": column.sealed.digest, "spec": column.wanted}
        for column in cache.columns
    ]


def _cache_line(named: dict[str, str]) -> str:
    return f"{named['cache'][:12]}, manifest {named['manifest_digest'][:12]}"


def _columns_line(columns: list[dict[str, Any]]) -> str:
    said = [
        f"{column_name(column['spec'])}: column {column['key'][:12]}, manifest {column['manifest_digest'][:12]}"
        for column in columns
    ]
    return "; ".join(said) or "none"


def store_of(cache: Cache) -> str:
    """The store that a cache was opened in, as `--store` takes it."""
    place = cache.folder.where("").rstrip("/")
    return place.rpartition("/")[0] if is_url(place) else str(Path(place).absolute().parent)


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json; readers see the old or the new one, never a part."""
    write_whole(folder / RUN_FILE, json.dumps(facts, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """run.json. Raises RunError where the folder is no run."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder}: no run here ({RUN_FILE} is missing)") from None
    except OSError as error:
        raise RunError(f"{folder / RUN_FILE}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RunError(f"{folder / RUN_FILE}: not JSON ({error})") from None
    missing = _FACTS - set(facts)
    if missing:
        raise RunError(f"{folder / RUN_FILE}: has no {min(missing)}; another version of fpo wrote it")
    assert isinstance(facts, dict)
    return facts


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run."""
    path = folder / RECIPE_FILE
    try:
        return validate_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file; readers see the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _record(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    try:
        write_run(folder, facts)
        write_whole(folder / RECIPE_FILE, dump_recipe(recipe))
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be written ({error.strerror})") from None
