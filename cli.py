"""
The commands. Each parses, dispatches and prints; torch is imported only by those that compute.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 expected failure with one clear line,
2 usage.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli_store import AsJson, StoreOption, size, store_app, store_root
from errors import CacheIncomplete, CacheMissing, FpoError
from recipe import Recipe, load_recipe
from store import Cache, Nearest

app = typer.Typer(
    help="Offline preference optimisation with sparse features: run the reference once, cache it, train from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")

RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set objective.alpha=1.", metavar="FIELD=VALUE"),
]


@app.command("cache")
def cache_command(
    recipe: RecipePath,
    store: StoreOption = None,
    overrides: Overrides = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per forward pass; changes speed and memory, never the cache.")
    ] = 8192,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Read every byte of complete caches and compute damaged shards again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stage 1: build the recipe's caches, or finish them, or say that they are there already."""
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from stage1_cache import build_caches

    reports = build_caches(
        loaded, store_root(store or loaded.cache.store), batch_tokens, _say_why if is_first_rank() else None, rebuild
    )
    if not is_first_rank():
        return
    if as_json:
        print(json.dumps([_cache_facts(report) for report in reports], indent=2))
        return
    for report in reports:
        _print_cache(report)
        for problem in report.reuse_problems:
            print(f"not copied from: {problem}", file=sys.stderr)
    print(f"next: {_command('align', recipe, store, overrides)}")


@app.command("align")
def align_command(
    recipe: RecipePath,
    store: StoreOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Run folder; else runs/<recipe>-<objective>.", metavar="RUN"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output, if it was begun.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Stage 2: train the recipe's policy from its cache. The reference is never run."""
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from stage2_align import align

    cache = _find(loaded, recipe, store, overrides)
    report = align(loaded, cache, output or Path("runs") / f"{recipe.stem}-{loaded.objective.name}", resume)
    leave_process_group()
    if not is_first_rank():
        return
    rate = report.pairs / report.seconds if report.seconds else 0.0
    if as_json:
        facts = {
            "run": str(report.run),
            "steps": report.steps,
            "pairs_per_second": rate,
            "parity": report.parity,
        }
        print(json.dumps({**facts, "last": report.last}, indent=2))
        return
    print(f"run         {report.run}")
    print(f"cache       {cache.key[:12]} (manifest {cache.digest[:12]}), {cache.n_pairs:,} pairs")
    if report.parity is not None:
        print(f"parity      {report.parity:.2g} nats per token between the policy and the cached reference")
    print(f"trained     {report.steps:,} steps, {rate:.1f} pairs/s, {report.seconds:.0f} s")
    for name in sorted(name for name in report.last if "/" in name or name == "loss"):
        print(f"  {name:<28}{report.last[name]:.6g}")


@app.command("evaluate")
def evaluate_command(
    recipe: RecipePath,
    run: Annotated[Path, typer.Argument(help="Run folder of a finished fpo align.", metavar="RUN")],
    store: StoreOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Held-out metrics of a run, from the cache of the held-out pairs."""
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from stage2_align import evaluate_run

    cache = _find(loaded, recipe, store, overrides, held_out=True)
    metrics = evaluate_run(loaded, cache, run)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    print(f"{cache.n_pairs:,} held-out pairs ({loaded.data.eval_split}), cache {cache.key[:12]}")
    for name, value in metrics.items():
        print(f"  {name:<33}{value:.6g}")


def quiet_libraries() -> None:
    """Loading bars and chatter of the libraries off: one progress bar at a time is ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    """Run the command line; an expected failure is one clear message and exit code 1."""
    try:
        app()
    except FpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _say_why(split: str, near: Nearest | None) -> None:
    """On a miss: the cache that comes closest, and what keeps it from being this one."""
    if near is not None:
        print(f"{split}: not cached yet; nearest is {near.key[:12]}, which differs in", file=sys.stderr)
        for line in near.lines():
            print(f"  {line}", file=sys.stderr)


def leave_process_group() -> None:
    """Under torchrun, end the communication in order: threads of gloo that outlive Python abort the process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def is_first_rank() -> bool:
    """Under torchrun, one process speaks."""
    return os.environ.get("RANK", "0") == "0"


def _command(name: str, recipe: Path, store: str | None, overrides: list[str] | None) -> str:
    """A command line for the same recipe, store and overrides."""
    options = ["--store", store] if store else []
    for override in overrides or []:
        options += ["--set", override]
    return shlex.join(["fpo", name, str(recipe), *options])


def _find(
    recipe: Recipe, path: Path, store: str | None, overrides: list[str] | None, *, held_out: bool = False
) -> Cache:
    """The recipe's cache; where it is missing, how to build it."""
    from stage1_cache import find_cache

    try:
        return find_cache(recipe, store_root(store or recipe.cache.store), held_out=held_out)
    except (CacheMissing, CacheIncomplete) as error:
        raise type(error)(f"{error}\n  build it with: {_command('cache', path, store, overrides)}") from None


def _cache_facts(report: Any) -> dict[str, Any]:
    cache = report.cache
    return {
        "split": report.split,
        "key": cache.key,
        "manifest_digest": cache.digest,
        "path": cache.folder.where(""),
        "pairs": cache.n_pairs,
        "bytes": cache.manifest.n_bytes,
        "bytes_per_pair": cache.manifest.n_bytes / max(cache.n_pairs, 1),
        "built_shards": report.built_shards,
        "rebuilt_shards": report.rebuilt_shards,
        "shards": len(cache.shard_pairs),
        "seconds": report.seconds,
        "pairs_reused": report.pairs_reused,
        "pairs_scored": report.pairs_scored,
        "pairs_per_second": report.pairs_scored / report.seconds if report.seconds else 0.0,
        "drops": report.drops.as_dict(),
        "self_check": [check.model_dump(exclude_unset=True) for check in report.self_checks],
    }


def _print_cache(report: Any) -> None:
    cache = report.cache
    n_bytes = cache.manifest.n_bytes
    print(f"{report.split}")
    print(f"  key         {cache.key}")
    print(f"  path        {cache.folder.where('')}")
    for number, line in enumerate(report.drops.lines()):
        print(f"  {'pairs' if number == 0 else '':<12}{line.strip()}")
    print(
        f"  size        {size(n_bytes)}, {n_bytes / max(cache.n_pairs, 1):,.0f} bytes per pair, "
        f"{len(cache.shard_pairs)} shards"
    )
    for check in report.self_checks:
        print(f"  {'self-check':<12}{check.line()}")
    if report.foreign_shards:
        print(
            f"  note        {report.foreign_shards} of {len(cache.shard_pairs)} shards were there already and not "
            "computed in this store (a stopped pull, a killed writer); no other cache will copy from them"
        )
    if report.rebuilt_shards:
        shards = "1 shard is" if report.rebuilt_shards == 1 else f"{report.rebuilt_shards} shards are"
        print(f"  rebuilt     {shards} as the manifest says again")
    elif report.built_shards:
        rate, tokens = report.pairs_scored / report.seconds, report.tokens_scored / report.seconds
        reused = f"{report.pairs_reused:,} pairs copied from other caches, " if report.pairs_reused else ""
        print(
            f"  built       {report.built_shards} shards in {report.seconds:.1f} s: {reused}"
            f"{report.pairs_scored:,} scored ({rate:,.1f} pairs/s, {tokens:,.0f} tokens/s)"
        )
    else:
        print(f"  hit         found complete in {report.seconds:.1f} s; no model was loaded")


if __name__ == "__main__":
    main()
