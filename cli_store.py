"""The `fpo store` commands: look at caches, name them, doubt them, move them, hand them on, remove them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from tqdm import tqdm

from errors import FpoError
from recipe import load_recipe
from store import (
    Summary,
    TransferReport,
    default_store,
    diff,
    disk_usage,
    export_trl,
    gc,
    open_cache,
    open_store,
    pull,
    push,
    rm,
    tag,
    untag,
    verify,
)

store_app = typer.Typer(help="The caches of a store: look, name, doubt, move, remove.", no_args_is_help=True)

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or URL of caches (s3, gs, az, hf, https); else $FPO_STORE, else ~/.cache/fpo"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Key = Annotated[str, typer.Argument(help="Cache key, any unique prefix of it, or a tag.", metavar="KEY")]
Url = Annotated[str, typer.Argument(help="Where to: a URL or a folder.", metavar="URL")]


def store_root(option: str | None) -> str:
    """--store, else $FPO_STORE, else ~/.cache/fpo."""
    return option or str(default_store())


@store_app.command("ls")
def store_ls(store: StoreOption = None, as_json: AsJson = False) -> None:
    """List the caches: size, pairs, what they were made from, age, last use, complete or how far."""
    summaries = open_store(store_root(store)).summaries()
    if as_json:
        print(json.dumps([_summary_facts(summary) for summary in summaries], indent=2))
        return
    if not summaries:
        print(f"no caches in {store_root(store)}")
        return
    print(f"{'KEY':<14}{'PAIRS':>10}{'SIZE':>11}  {'STATE':<16}{'CREATED':<12}{'USED':<12}TAGS")
    for summary in summaries:
        print(
            f"{summary.key[:12]:<14}{summary.n_pairs:>10,}{size(summary.n_bytes):>11}  {summary.state:<16}"
            f"{_age(summary.created):<12}{_age(summary.used):<12}{', '.join(summary.tags) or '-'}"
        )
        for label in (summary.reference, *summary.features, summary.data):
            if label:
                print(f"{'':<14}{label}")


@store_app.command("show")
def store_show(
    key: Key,
    store: StoreOption = None,
    usage: Annotated[bool, typer.Option("--usage", help="Bytes of every array; reads all shards.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a complete cache was made from, its self-check and drop report, and with --usage where its bytes go."""
    cache = open_cache(store_root(store), key)
    facts: dict[str, Any] = {
        "key": cache.key,
        "manifest_digest": cache.digest,
        "recipe": cache.recipe,
        "manifest": cache.manifest.model_dump(mode="json"),
    }
    if usage:
        with _shard_bar("usage") as advance:
            facts["usage"] = [vars(array) for array in disk_usage(cache, advance)]
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"key         {cache.key}\nmanifest    {cache.digest}")
    print(
        f"pairs       {cache.n_pairs:,} in {len(cache.shard_pairs)} shards, {cache.manifest.n_tokens:,} tokens, "
        f"{size(cache.manifest.n_bytes)}"
    )
    for section in ("scorer", "pairs"):
        print(f"{section}\n{_indented(cache.recipe[section])}")
    for name, fact in cache.manifest.facts.items():
        print(f"{name}\n{_indented(fact)}")
    if usage:
        print(f"{'ARRAY':<32}{'ON DISK':>12}{'IN MEMORY':>12}")
        for array in facts["usage"]:
            print(f"{array['name']:<32}{size(array['stored']):>12}{size(array['raw']):>12}")


@store_app.command("diff")
def store_diff(
    here: Annotated[str, typer.Argument(metavar="A")],
    there: Annotated[str, typer.Argument(metavar="B")],
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Why two caches are not one: the fields that differ, with both values."""
    report = diff(store_root(store), here, there)
    if as_json:
        facts = {part: [vars(one) for one in getattr(report, part)] for part in ("recipe", "inputs")}
        print(json.dumps({"here": report.here, "there": report.there, **facts}, indent=2))
        return
    if not report.recipe:
        print("the same cache")
    for difference in report.recipe:
        print(difference)
    if report.inputs:
        print("made from:")
        for difference in report.inputs:
            print(f"  {difference}")


@store_app.command("tag")
def store_tag(
    key: Key,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, . _ -", metavar="NAME")],
    store: StoreOption = None,
) -> None:
    """Give a cache a name that works wherever a key does; a tag that exists moves."""
    tagged = tag(store_root(store), key, name)
    moved = f" (was {tagged.before[:12]})" if tagged.before and tagged.before != tagged.key else ""
    print(f"{tagged.name} -> {tagged.key[:12]}{moved}")


@store_app.command("untag")
def store_untag(name: Annotated[str, typer.Argument(metavar="NAME")], store: StoreOption = None) -> None:
    """Take a name away; the cache stays."""
    tagged = untag(store_root(store), name)
    print(f"{tagged.name} no longer names {tagged.key[:12]}")


@store_app.command("verify")
def store_verify(
    key: Key,
    store: StoreOption = None,
    level: Annotated[
        Literal["sizes", "checksums", "all"],
        typer.Option(help="Of the shards: their size; every byte; also decoding and every invariant."),
    ] = "all",
    recompute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also score N random pairs again; needs --recipe.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose reference and SAEs score them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random pairs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Doubt a cache. Exit code 1 where anything is wrong, naming every file."""
    if recompute is not None and recipe is None:
        raise FpoError("--recompute needs --recipe: a cache holds the digests of its reference, not where it lies")
    root = store_root(store)
    with _shard_bar("verify") as advance:
        report = verify(root, key, advance, level)
    facts: dict[str, Any] = {
        "key": report.key,
        "shards": report.shards,
        "pairs": report.pairs,
        "problems": report.problems,
    }
    if report.ok and recompute is not None and recipe is not None:
        facts["recompute"] = _recomputed(root, report.key, recompute, recipe, seed)
    if as_json:
        print(json.dumps(facts, indent=2))
    elif report.ok:
        print(f"{report.key[:12]}: {report.shards} shards, {report.pairs:,} pairs: {_PASSED[level]}")
        if "recompute" in facts:
            found = facts["recompute"]
            print(
                f"{found['pairs']} pairs scored again: token log-probs differ by {found['worst']:.2g} nats at most per "
                f"pair (tolerance {found['tolerance']:g}), activations by {100 * found['worst_features']:.2g} % of a "
                f"completion (tolerance {100 * found['feature_tolerance']:g} %)"
            )
    if not report.ok:
        lines = "\n".join(f"  {problem}" for problem in report.problems)
        raise FpoError(f"{report.key[:12]}: {len(report.problems)} problems\n{lines}")


_PASSED = {
    "sizes": "sizes are as the manifest says",
    "checksums": "every byte is as the manifest says",
    "all": "all as the manifest says",
}


@store_app.command("push")
def store_push(key: Key, url: Url, store: StoreOption = None, threads: int = 8, as_json: AsJson = False) -> None:
    """Copy a complete cache to another store; only missing objects move, every byte is verified."""
    with _byte_bar("push") as advance:
        report = push(store_root(store), key, url, threads=threads, on_object=advance)
    _print_transfer("pushed", report, as_json)


@store_app.command("pull")
def store_pull(
    key: Key,
    url: Annotated[str, typer.Argument(help="Where from: a URL or a folder.", metavar="URL")],
    store: StoreOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Read a complete copy too and replace damage.")] = False,
    threads: int = 8,
    as_json: AsJson = False,
) -> None:
    """Copy a complete cache from another store; an interrupted pull continues."""
    with _byte_bar("pull") as advance:
        report = pull(url, key, store_root(store), threads=threads, repair=repair, on_object=advance)
    _print_transfer("pulled", report, as_json)


@store_app.command("export")
def store_export(
    key: Key,
    folder: Annotated[Path, typer.Argument(help="New folder.", metavar="FOLDER")],
    to: Annotated[Literal["trl"], typer.Option("--to", help="For whom.")],
    store: StoreOption = None,
) -> None:
    """Write a cache as a `datasets` folder that TRL's own DPOTrainer trains from (docs/export.md)."""
    with _shard_bar("export") as advance:
        report = export_trl(open_cache(store_root(store), key), folder, advance)
    print(f"exported {report.n_pairs:,} pairs of {report.key[:12]} to {report.folder}, {size(report.n_bytes)}")


@store_app.command("rm")
def store_rm(key: Key, store: StoreOption = None) -> None:
    """Remove a cache that nobody uses."""
    removed = rm(store_root(store), key)
    tags = f", tags: {', '.join(removed.tags)}" if removed.tags else ""
    print(f"removed {removed.key[:12]} ({size(removed.n_bytes)}{tags})")


@store_app.command("gc")
def store_gc(
    store: StoreOption = None,
    unused_days: Annotated[
        float | None, typer.Option(help="Also complete caches that nobody opened for so long.")
    ] = None,
    unfinished_days: Annotated[float, typer.Option(help="Unfinished caches that nobody worked on for so long.")] = 14,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Collect what killed processes left and caches nobody uses; tagged ones and those in use stay."""
    found = gc(store_root(store), unused_days, unfinished_days, dry_run=not yes)
    if as_json:
        items = [{**vars(item), "path": str(item.path)} for item in found.items]
        print(json.dumps({"dry_run": found.dry_run, "bytes": found.n_bytes, "items": items}, indent=2))
        return
    for item in found.items:
        kept = ", in use, kept" if item.in_use else ""
        print(f"{size(item.n_bytes):>11}  {item.key[:12] if item.key else item.path.name}: {item.reason}{kept}")
    verb = "would be freed; add --yes to remove" if found.dry_run else "freed"
    print(f"{size(found.n_bytes):>11}  {verb}")


def size(n_bytes: int) -> str:
    """1.5 MiB"""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _recomputed(root: str, key: str, count: int, recipe: Path, seed: int) -> dict[str, Any]:
    from stage1_cache import recompute

    return vars(recompute(load_recipe(recipe), open_cache(root, key), count, seed))


def _summary_facts(summary: Summary) -> dict[str, Any]:
    return {
        "key": summary.key,
        "state": summary.state,
        "complete": summary.complete,
        "pairs": summary.n_pairs,
        "bytes": summary.n_bytes,
        "created": summary.created.isoformat(),
        "used": summary.used.isoformat() if summary.used else None,
        "tags": list(summary.tags),
        "reference": summary.reference,
        "features": summary.features,
        "data": summary.data,
        "problem": summary.problem,
    }


def _print_transfer(verb: str, report: TransferReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(report), indent=2))
        return
    print(
        f"{verb} {report.key[:12]} to {report.target}: {report.moved} objects moved ({size(report.n_bytes)}), "
        f"{report.present} there already, {report.seconds:.1f} s; manifest {report.manifest_digest[:12]}"
    )
    if report.tag:
        print(f"tag {report.tag} stands for it there, too")
    for name in report.repaired:
        print(f"repaired {name}")


def _indented(value: Any) -> str:
    return "\n".join(f"  {line}" for line in json.dumps(value, indent=2).splitlines())


def _age(moment: datetime | None) -> str:
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


@contextmanager
def _shard_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=label, unit=" shards", disable=None) as bar:
        yield _advancing(bar)


@contextmanager
def _byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield _advancing(bar)


def _advancing(bar: Any) -> Callable[[int, int], None]:
    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return advance
