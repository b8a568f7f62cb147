"""
The commands. Each parses, dispatches and prints; torch is imported only by those that compute.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 expected failure with one clear line,
2 usage.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from errors import CacheIncomplete, CacheMissing, FpoError
from recipe import Recipe, load_recipe
from store import Cache, Store, Summary, default_store, open_cache, verify

app = typer.Typer(
    help="Offline preference optimisation with sparse features: run the reference once, cache it, train from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at the caches of a store.", no_args_is_help=True)
app.add_typer(store_app, name="store")

RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
StorePath = Annotated[
    Path | None, typer.Option("--store", help="Folder of caches; else $FPO_STORE, else ~/.cache/fpo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set objective.alpha=1.", metavar="FIELD=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Key = Annotated[str, typer.Argument(help="Cache key, or any unique prefix of it.", metavar="KEY")]


@app.command("cache")
def cache_command(
    recipe: RecipePath,
    store: StorePath = None,
    overrides: Overrides = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per forward pass; changes speed and memory, never the cache.")
    ] = 8192,
    as_json: AsJson = False,
) -> None:
    """Stage 1: build the recipe's caches, or finish them, or say that they are there already."""
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from stage1_cache import build_caches

    root = store or default_store()
    reports = build_caches(loaded, root, batch_tokens)
    if not is_first_rank():
        return
    if as_json:
        print(json.dumps([_cache_facts(report, root) for report in reports], indent=2))
        return
    for report in reports:
        _print_cache(report, root)
    print(f"next: fpo align {recipe}" + (f" --store {store}" if store else ""))


@app.command("align")
def align_command(
    recipe: RecipePath,
    store: StorePath = None,
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

    cache = _find(loaded, recipe, store)
    report = align(loaded, cache, output or Path("runs") / f"{recipe.stem}-{loaded.objective.name}", resume)
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
    store: StorePath = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Held-out metrics of a run, from the cache of the held-out pairs."""
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from stage2_align import evaluate_run

    cache = _find(loaded, recipe, store, held_out=True)
    metrics = evaluate_run(loaded, cache, run)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    print(f"{cache.n_pairs:,} held-out pairs ({loaded.data.eval_split}), cache {cache.key[:12]}")
    for name, value in metrics.items():
        print(f"  {name:<33}{value:.6g}")


@store_app.command("ls")
def store_ls(store: StorePath = None, as_json: AsJson = False) -> None:
    """List the caches of a store."""
    root = store or default_store()
    summaries = Store(root).summaries()
    if as_json:
        print(json.dumps([_summary_facts(summary) for summary in summaries], indent=2))
        return
    if not summaries:
        print(f"no caches in {root}")
        return
    print(f"{'KEY':<14}{'PAIRS':>10}{'SIZE':>11}  {'STATE':<16}{'CREATED':<18}FEATURES")
    for summary in summaries:
        facts = _summary_facts(summary)
        kept = ", ".join(f"{f['hookpoint']} top {f['top_k']}" for f in facts["features"]) or "-"
        print(
            f"{summary.key[:12]:<14}{summary.n_pairs:>10,}{_size(summary.n_bytes):>11}  {facts['state']:<16}"
            f"{summary.created:%Y-%m-%d %H:%M}  {kept}"
        )


@store_app.command("show")
def store_show(key: Key, store: StorePath = None) -> None:
    """Print what a complete cache contains, as JSON: what it was made from, its shards, its maker's facts."""
    cache = open_cache(store or default_store(), key)
    facts: dict[str, Any] = {
        "key": cache.key,
        "manifest_digest": cache.digest,
        "recipe": cache.recipe,
        "manifest": cache.manifest.model_dump(mode="json"),
    }
    print(json.dumps(facts, indent=2))


@store_app.command("verify")
def store_verify(key: Key, store: StorePath = None, as_json: AsJson = False) -> None:
    """Doubt a cache: names, sizes, checksums, decoding, every invariant. Exit code 1 where anything is wrong."""
    root = store or default_store()
    with tqdm(desc="verify", unit=" shards", disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(root, key, advance)
    if as_json:
        facts = {
            "key": report.key,
            "shards": report.shards,
            "pairs": report.pairs,
            "problems": report.problems,
        }
        print(json.dumps(facts, indent=2))
    elif report.ok:
        print(f"{report.key[:12]}: {report.shards} shards, {report.pairs:,} pairs: all as the manifest says")
    if not report.ok:
        raise FpoError(
            f"{report.key[:12]}: {len(report.problems)} problems\n" + "\n".join(f"  {p}" for p in report.problems)
        )


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


def is_first_rank() -> bool:
    """Under torchrun, one process speaks."""
    return os.environ.get("RANK", "0") == "0"


def _find(recipe: Recipe, path: Path, store: Path | None, *, held_out: bool = False) -> Cache:
    """The recipe's cache; where it is missing, how to build it."""
    from stage1_cache import find_cache

    try:
        return find_cache(recipe, store or default_store(), held_out=held_out)
    except (CacheMissing, CacheIncomplete) as error:
        where = f" --store {store}" if store else ""
        raise type(error)(f"{error}\n  build it with: fpo cache {path}{where}") from None


def _cache_facts(report: Any, root: Path) -> dict[str, Any]:
    cache = report.cache
    return {
        "split": report.split,
        "key": cache.key,
        "manifest_digest": cache.digest,
        "path": str(Store(root).path(cache.key)),
        "pairs": cache.n_pairs,
        "bytes": cache.manifest.n_bytes,
        "bytes_per_pair": cache.manifest.n_bytes / max(cache.n_pairs, 1),
        "built_shards": report.built_shards,
        "shards": len(cache.shard_pairs),
        "seconds": report.seconds,
        "pairs_per_second": report.pairs_scored / report.seconds if report.seconds else 0.0,
        "drops": report.drops.as_dict(),
        "self_check": cache.manifest.facts["self_check"],
    }


def _print_cache(report: Any, root: Path) -> None:
    cache = report.cache
    size = cache.manifest.n_bytes
    print(f"{report.split}")
    print(f"  key         {cache.key}")
    print(f"  path        {Store(root).path(cache.key)}")
    for number, line in enumerate(report.drops.lines()):
        print(f"  {'pairs' if number == 0 else '':<12}{line.strip()}")
    print(
        f"  size        {_size(size)}, {size / max(cache.n_pairs, 1):,.0f} bytes per pair, "
        f"{len(cache.shard_pairs)} shards"
    )
    for check in cache.manifest.facts["self_check"]:
        print(f"  {'self-check':<12}{_check_line(check)}")
    if report.built_shards:
        rate, tokens = report.pairs_scored / report.seconds, report.tokens_scored / report.seconds
        print(
            f"  built       {report.built_shards} shards in {report.seconds:.1f} s: {rate:,.1f} pairs/s, "
            f"{tokens:,.0f} tokens/s"
        )
    else:
        print(f"  hit         found complete in {report.seconds:.1f} s; no model was loaded")


def _check_line(check: dict[str, Any]) -> str:
    if not check["checked"]:
        return f"{check['hookpoint']}: off"
    advertised = f" (advertised {check['advertised_l0']})" if check["advertised_l0"] else ""
    return f"{check['hookpoint']}: L0 {check['l0']}{advertised}, FVU {check['fvu']} on {check['tokens']} tokens"


def _summary_facts(summary: Summary) -> dict[str, Any]:
    if summary.problem:
        state = "damaged"
    else:
        state = "complete" if summary.complete else f"{summary.shards_done} of {summary.shards_total} shards"
    scorer = summary.recipe.get("scorer", {})
    return {
        "key": summary.key,
        "state": state,
        "pairs": summary.n_pairs,
        "bytes": summary.n_bytes,
        "created": summary.created.isoformat(),
        "features": [{name: f[name] for name in ("hookpoint", "top_k")} for f in scorer.get("features", [])],
        "problem": summary.problem,
    }


def _size(n_bytes: int) -> str:
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


if __name__ == "__main__":
    main()
