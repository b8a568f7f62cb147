"""
The commands. Each parses, dispatches and prints; torch is imported only by those that compute.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failure with one clear line, 2 usage.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from fpo.commands.store import AsJson, StoreOption, quiet_libraries, size, store_app, store_root
from fpo.errors import CacheIncomplete, CacheMissing, FpoError, RunInterrupted
from fpo.interrupts import exit_code, interruptible
from fpo.progress import is_first_rank, say
from fpo.recipe import Recipe, load_recipe
from fpo.store import Cache, Nearest, counted, printable

app = typer.Typer(
    help="Offline preference optimisation with sparse features: run the reference once, cache it, train from it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fpo {version('fpo')}")
        raise typer.Exit()


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
    if sys.stderr.isatty():
        say("loading libraries ...")  # seconds in which a terminal would show nothing
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from fpo.stage1_cache import build_caches

    root = store_root(store or loaded.cache.store)
    again = _command("cache", recipe, store, overrides)
    with interruptible(f"finished shards are kept; continue with: {again}"):
        reports = build_caches(loaded, root, batch_tokens, _say_why if is_first_rank() else None, rebuild)
    if not is_first_rank():
        for report in reports:
            print(f"rank {os.environ['RANK']}: {report.split}: {_built(report)}", file=sys.stderr)
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
    if is_first_rank():
        say("opening the cache ...")
    quiet_libraries()
    from fpo.stage2_align import align

    run = Path(os.path.expanduser(output)) if output else Path("runs") / f"{recipe.stem}-{loaded.objective.name}"
    again = f"{_command('align', recipe, store, overrides)} --output {shlex.quote(str(run))} --resume"
    with interruptible(f"continue with: {again}"):
        cache = _find(loaded, recipe, store, overrides)
        try:
            report = align(loaded, cache, run, resume)
        except RunInterrupted as error:
            leave_process_group()
            if is_first_rank():
                print(f"{error}; continue with: {again}", file=sys.stderr)
            sys.exit(exit_code(error.signum))
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
    if report.layout is not None:
        print(f"layout      {report.layout}")
    if report.parity is not None:
        print(f"parity      {report.parity:.2g} nats per token between the policy and the cached reference")
    world, per_device, accumulation = report.per_step
    print(
        f"trained     {report.steps:,} steps of {world * per_device * accumulation} pairs ({world} "
        f"process{'es' if world > 1 else ''} x {per_device} x {accumulation}), {rate:.1f} pairs/s, "
        f"{report.seconds:.0f} s"
    )
    for name in sorted(name for name in report.last if "/" in name or name == "loss"):
        print(f"  {name:<28}{report.last[name]:.6g}")


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run folder of fpo align.", metavar="RUN")],
    checkpoint: Annotated[
        int | None,
        typer.Option("--checkpoint", help="Evaluate RUN/checkpoint-N, finished or not.", metavar="N"),
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Folder or URL of caches; else the one the run was trained from.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Other held-out pairs: --set data.eval_split=test.", metavar="FIELD=VALUE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out metrics of a run by its own recipe, from the cache of the held-out pairs."""
    quiet_libraries()
    from fpo.stage2_align import evaluate_run, evaluated_recipe, evaluated_store

    loaded, root = evaluated_recipe(run, overrides), evaluated_store(run, store)
    cache = _find(loaded, run / "recipe.yaml", root, overrides, held_out=True)
    metrics = evaluate_run(loaded, cache, run, checkpoint)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    print(f"{cache.n_pairs:,} held-out pairs ({loaded.data.eval_split}), cache {cache.key[:12]}")
    for name, value in metrics.items():
        print(f"  {name:<33}{value:.6g}")


def main() -> None:
    """
    Run the command line. Whatever fails is one line and exit code 1; FPO_DEBUG=1 leaves what was not expected to
    Python, which prints its traceback.
    """
    try:
        app()
    except FpoError as error:
        print("\n".join(printable(line, 10_000) for line in f"error: {error}".split("\n")), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FPO_DEBUG"):
            raise
        print(f"error: {_unexpected(error)}", file=sys.stderr)
        sys.exit(1)


def _unexpected(error: Exception) -> str:
    """One line about a failure that no command expects, and where its traceback is."""
    said = " ".join(str(error).split())[:300]
    # safetensors wraps what the disk says in an error of its own.
    if isinstance(error, OSError) or type(error).__module__.startswith("safetensors"):
        what = f"{said or type(error).__name__}; mend that and give the same command again"
    else:
        what = f"this is a bug, or a case that fpo does not know: {type(error).__name__}: {said}"
    return f"{what}; the traceback is {_kept_traceback(error)}"


def _kept_traceback(error: Exception) -> str:
    """Where it lies; a temporary folder can be written where a home cannot."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fpo-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.writelines([f"{shlex.join(sys.argv)}\n", *traceback.format_exception(error)])
    except OSError:
        return "shown with FPO_DEBUG=1"
    return f"in {file.name}"


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
    from fpo.stage1_cache import find_cache

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
        "shards_by_others": report.shards_by_others,
        "rebuilt_shards": report.rebuilt_shards,
        "shards": len(cache.shard_pairs),
        "seconds": report.seconds,
        "pairs_reused": report.pairs_reused,
        "pairs_scored": report.pairs_scored,
        "pairs_per_second": report.pairs_scored / report.seconds if report.seconds else 0.0,
        "drops": report.drops.as_dict(),
        "trained_on": report.trained_on,
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
    if report.trained_on:
        print(f"  {'':<12}noted {report.trained_on:,}: the training split holds them too, so they are not held out")
    print(f"  prompt      {report.drops.prompt_line()}")
    print(
        f"  size        {size(n_bytes)}, {n_bytes / max(cache.n_pairs, 1):,.0f} bytes per pair, "
        f"{counted(len(cache.shard_pairs), 'shard')}"
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
    elif report.built_shards or report.shards_by_others:
        rate, tokens = report.pairs_scored / report.seconds, report.tokens_scored / report.seconds
        if report.layout is not None:
            print(f"  layout      {report.layout}")
        copied = f"{counted(report.pairs_reused, 'pair')} copied from other caches" if report.pairs_reused else ""
        scored = f"{report.pairs_scored:,} scored ({rate:,.1f} pairs/s, {tokens:,.0f} tokens/s)"
        done = ", ".join(filter(None, [copied, scored if report.pairs_scored else ""]))
        print(f"  built       {_built(report)} in {report.seconds:.1f} s{': ' if done else ''}{done}")
    else:
        print(f"  hit         found complete in {report.seconds:.1f} s; no model was loaded")


def _built(report: Any) -> str:
    """18 shards, or 6 of 18 shards here, 12 by other processes"""
    total = counted(len(report.cache.shard_pairs), "shard")
    own = total if report.built_shards == len(report.cache.shard_pairs) else f"{report.built_shards:,} of {total} here"
    return f"{own}, {report.shards_by_others:,} by other processes" if report.shards_by_others else own


if __name__ == "__main__":
    main()
