"""The `fpo store` commands: look at caches, name them, doubt them, move them, hand them on, remove them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fpo.commands.bars import byte_bar, shard_bar
from fpo.commands.caches import existing_root, store_root
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, Overrides, StoreOption, command_line
from fpo.commands.wording import age, indented, size, with_numbers
from fpo.errors import FpoError

if TYPE_CHECKING:
    from fpo.store import AllOrKeys, ColumnSummary, RemoteStore, Store, Summary, TransferReport

store_app = typer.Typer(help="The caches of a store: look, name, doubt, move, remove.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="Cache key, any unique prefix of it, or a tag.", metavar="KEY")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Of the columns only this one, by the start of its key; repeatable.", metavar="KEY"),
]
NoColumns = Annotated[bool, typer.Option("--no-columns", help="The base alone.")]
Url = Annotated[str, typer.Argument(help="Where to: a URL or a folder.", metavar="URL")]


@store_app.command("ls")
def store_ls(store: StoreOption = None, as_json: AsJson = False) -> None:
    """List the caches and their columns: size, groups, what they were made from, age, last use, complete or how far."""
    from fpo.store import Store, open_store

    opened = open_store(existing_root(store))
    summaries = opened.summaries()
    if as_json:
        print(json.dumps([_summary_facts(summary) for summary in summaries], indent=2))
        return
    if summaries:
        print(f"{'KEY':<14}{'GROUPS':>10}{'SIZE':>11}  {'STATE':<16}{'CREATED':<12}{'USED':<12}TAGS")
    else:
        print(f"no caches in {store_root(store)}")
    for summary in summaries:
        print(
            f"{summary.key[:12]:<14}{summary.n_groups:>10,}{size(summary.n_bytes):>11}  {summary.state:<16}"
            f"{age(summary.created):<12}{age(summary.used):<12}{', '.join(summary.tags) or '-'}"
        )
        _print_names(summary, _MOST_COLUMNS)
    here = {summary.key for summary in summaries}
    for name, key in opened.tags().items() if isinstance(opened, Store) else ():
        if key not in here:
            print(f"the tag {name} names {key[:12]}, which is not here; pull it, or: fpo store untag {name}")


@store_app.command("show")
def store_show(
    key: Key,
    store: StoreOption = None,
    usage: Annotated[bool, typer.Option("--usage", help="Bytes of every array; reads all shards.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    What a complete cache was made from, its columns, self-check and drop report; with --usage where its bytes go.
    """
    from fpo.store import counted, disk_usage, look_at_columns, open_cache, open_store, printable

    opened = open_store(store_root(store))
    cache = open_cache(opened, key, columns="all" if usage else ())
    columns = look_at_columns(cache.folder, cache.key)
    facts: dict[str, Any] = {
        "key": cache.key,
        "manifest_digest": cache.digest,
        "recipe": cache.recipe,
        "manifest": cache.manifest.model_dump(mode="json"),
        "columns": [_column_facts(column) for column in columns],
    }
    if usage:
        with shard_bar("usage") as advance:
            facts["usage"] = [vars(array) for array in disk_usage(cache, advance)]
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"key         {cache.key}\nmanifest    {cache.digest}")
    print(
        f"groups      {cache.n_groups:,} in {counted(len(cache.shard_groups), 'shard')}, "
        f"{cache.n_completions:,} completions, {cache.manifest.n_tokens:,} tokens, {size(cache.manifest.n_bytes)}"
    )
    for column in columns:
        print(f"column      {_column_line(column)}")
    for name, label in _made_from(opened, cache.key):
        print(f"{name:<12}{label}")
    for section in ("scorer", "groups"):
        print(f"{section}\n{indented(cache.recipe[section])}")
    for name, fact in cache.manifest.facts.items():
        print(f"{printable(name)}\n{indented(with_numbers(fact))}")
    if usage:
        print(f"{'ARRAY':<32}{'ON DISK':>12}{'IN MEMORY':>12}")
        for array in facts["usage"]:
            name = f"{array['column'][:12]}/{array['name']}" if array["column"] else array["name"]
            print(f"{name:<32}{size(array['stored']):>12}{size(array['raw']):>12}")


@store_app.command("diff")
def store_diff(
    here: Annotated[str, typer.Argument(metavar="A")],
    there: Annotated[str, typer.Argument(metavar="B")],
    store: StoreOption = None,
    as_json: AsJson = False,
) -> None:
    """Why two caches are not one: the fields that differ, with both values, and the columns that one of them lacks."""
    from fpo.store import diff

    report = diff(store_root(store), here, there)
    if as_json:
        facts = {part: [vars(one) for one in getattr(report, part)] for part in ("recipe", "inputs")}
        columns = {"only_here": report.only_here, "only_there": report.only_there}
        print(json.dumps({"here": report.here, "there": report.there, **facts, "columns": columns}, indent=2))
        return
    if not report.recipe:
        print("the same cache")
    for difference in report.recipe:
        print(difference)
    if report.inputs:
        print("made from:")
        for difference in report.inputs:
            print(f"  {difference}")
    for key, labels in ((report.here, report.only_here), (report.there, report.only_there)):
        for label in labels:
            print(f"only {key[:12]} has {label}")


@store_app.command("tag")
def store_tag(
    key: Key,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, . _ -", metavar="NAME")],
    store: StoreOption = None,
) -> None:
    """Give a cache a name that works wherever a key does; a tag that exists moves."""
    from fpo.store import tag

    tagged = tag(store_root(store), key, name)
    moved = f" (was {tagged.before[:12]})" if tagged.before and tagged.before != tagged.key else ""
    print(f"{tagged.name} -> {tagged.key[:12]}{moved}")


@store_app.command("untag")
def store_untag(name: Annotated[str, typer.Argument(metavar="NAME")], store: StoreOption = None) -> None:
    """Take a name away; the cache stays."""
    from fpo.store import untag

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
    column: Columns = None,
    no_columns: NoColumns = False,
    recompute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also score N random groups again; needs --recipe.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose reference and SAEs score them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random groups.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Doubt a cache and its columns. Exit code 1 where anything is wrong, naming every file."""
    from fpo.store import counted, verify

    if recompute is not None and recipe is None:
        raise FpoError("--recompute needs --recipe: a cache holds the digests of its reference, not where it lies")
    root = store_root(store)
    with shard_bar("verify") as advance:
        report = verify(root, key, advance, level, _meant(column, no_columns))
    facts: dict[str, Any] = vars(report)
    if report.ok and recompute is not None and recipe is not None:
        facts["recompute"] = _recomputed(root, report.key, recompute, recipe, seed)
    if as_json:
        print(json.dumps(facts, indent=2))
    elif report.ok:
        beside = f" and {counted(len(report.columns), 'column')}" if report.columns else ""
        print(
            f"{report.key[:12]}: {counted(report.shards, 'shard')}, {counted(report.groups, 'group')}{beside}: "
            f"{_PASSED[level]}"
        )
        for note in report.notes:
            print(note)
        if "recompute" in facts:
            found = facts["recompute"]
            print(
                f"{found['groups']} groups scored again: token log-probs differ by {found['worst']:.2g} nats at most, "
                f"in the mean of a completion (tolerance {found['tolerance']:g}), its activations by "
                f"{100 * found['worst_features']:.2g} % (tolerance {100 * found['feature_tolerance']:g} %)"
            )
            if found["left_out"]:
                print(f"not scored again: {'; '.join(found['left_out'])}")
    if not report.ok:
        lines = "\n".join(f"  {problem}" for problem in report.problems)
        raise FpoError(f"{report.key[:12]}: {counted(len(report.problems), 'problem')}\n{lines}")


_PASSED = {
    "sizes": "sizes are as the manifest says",
    "checksums": "every byte is as the manifest says",
    "all": "all as the manifest says",
}


@store_app.command("push")
def store_push(
    key: Key,
    url: Url,
    store: StoreOption = None,
    column: Columns = None,
    no_columns: NoColumns = False,
    threads: int = 8,
    as_json: AsJson = False,
) -> None:
    """Copy a complete cache and its columns to another store; only missing objects move, every byte is verified."""
    from fpo.store import push

    with byte_bar("push") as advance:
        report = push(
            store_root(store), key, url, columns=_meant(column, no_columns), threads=threads, on_object=advance
        )
    _print_transfer("pushed", report, as_json)


@store_app.command("pull")
def store_pull(
    key: Key,
    url: Annotated[str, typer.Argument(help="Where from: a URL or a folder.", metavar="URL")],
    store: StoreOption = None,
    column: Columns = None,
    no_columns: NoColumns = False,
    repair: Annotated[bool, typer.Option("--repair", help="Read a complete copy too and replace damage.")] = False,
    threads: int = 8,
    as_json: AsJson = False,
) -> None:
    """Copy a complete cache and its columns from another store; an interrupted pull continues."""
    from fpo.store import pull

    with byte_bar("pull") as advance:
        report = pull(
            url,
            key,
            store_root(store),
            columns=_meant(column, no_columns),
            threads=threads,
            repair=repair,
            on_object=advance,
        )
    _print_transfer("pulled", report, as_json)


@store_app.command("export")
def store_export(
    key: Key,
    path: Annotated[Path, typer.Argument(help="New file; for trl a new folder.", metavar="PATH")],
    to: Annotated[
        Literal["trl", "parquet", "jsonl", "distill"],
        typer.Option("--to", help="TRL's DPOTrainer, rows of groups, or of completions with their likeliest tokens."),
    ],
    store: StoreOption = None,
) -> None:
    """Write what a cache holds for other programs: trainers, notebooks, distillation (docs/export.md)."""
    from fpo.store import export_rows, export_trl, open_cache

    quiet_libraries()
    with shard_bar("export") as advance:
        cache = open_cache(store_root(store), key)
        report = export_trl(cache, path, advance) if to == "trl" else export_rows(cache, path, to, advance)
    print(f"exported {report.n_groups:,} groups of {report.key[:12]} to {report.path}, {size(report.n_bytes)}")


@store_app.command("import")
def store_import(
    files: Annotated[list[Path], typer.Argument(help="Parquet or .jsonl with token ids.", metavar="FILE...")],
    recipe: Annotated[Path, typer.Option("--recipe", help="Whose groups they are; it has reference.scored_by.")],
    store: StoreOption = None,
    overrides: Overrides = None,
) -> None:
    """Make a recipe's caches from log-probs that another engine computed, instead of running the reference."""
    from fpo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from fpo.stage1_cache import import_caches

    for report in import_caches(loaded, files, store_root(store or loaded.cache.store)):
        cache = report.cache
        print(f"{report.split}\n  key         {cache.key}\n  data        {report.drops.lines()[0]}")
        print(f"  imported    {cache.n_completions:,} completions, scored by {loaded.reference.scored_by}")
    print(f"next: {command_line('align', recipe, store, overrides)}")


@store_app.command("rm")
def store_rm(
    key: Key,
    store: StoreOption = None,
    column: Annotated[
        str | None, typer.Option(help="Only this column of it, by the start of its key.", metavar="KEY")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """
    Remove a cache that nobody uses, or one column of it; says what would go, and asks. Tagged ones stay until fpo store
    untag.
    """
    from fpo.store import Store, removable, removable_column, rm

    opened = Store(existing_root(store))
    doomed = removable(opened, key)
    again = doomed.key[:12]
    if column is None:
        print(f"{doomed.key[:12]}  {doomed.n_groups:,} groups, {size(doomed.n_bytes)}, {doomed.state}")
        _print_names(doomed, len(doomed.columns))
    else:
        part = removable_column(opened, doomed.key, column)
        again += f" --column {part.key[:12]}"
        print(f"{doomed.key[:12]}  column {_column_line(part)}")
    if not yes:
        if not sys.stdin.isatty():
            raise FpoError(f"nothing is removed without a yes; to remove it: fpo store rm {again} --yes")
        typer.confirm("remove it?", abort=True)
    removed = rm(opened, doomed.key, column)
    print(f"removed {removed.key[:12]} ({size(removed.n_bytes)})")


@store_app.command("gc")
def store_gc(
    store: StoreOption = None,
    unused_days: Annotated[
        float | None, typer.Option(help="Also complete caches that nobody opened for so long.")
    ] = None,
    unfinished_days: Annotated[
        float, typer.Option(help="Unfinished caches and columns that nobody worked on for so long.")
    ] = 14,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Collect what killed processes left and caches nobody uses; tagged ones and those in use stay."""
    from fpo.store import counted, gc, printable

    found = gc(existing_root(store), unused_days, unfinished_days, dry_run=not yes)
    if as_json:
        items = [{**vars(item), "path": str(item.path)} for item in found.items]
        facts = {"dry_run": found.dry_run, "bytes": found.n_bytes, "items": items}
        print(json.dumps({**facts, "notes": found.notes, "problems": found.problems}, indent=2))
    else:
        for item in found.items:
            kept = ", in use, kept" if item.in_use else ""
            name = item.key[:12] if item.key else printable(item.path.name)
            name += f" column {item.column[:12]}" if item.column else ""
            print(f"{size(item.n_bytes):>11}  {name}: {item.reason}{kept}")
        for note in found.notes:
            print(f"{'':>11}  {note}")
        verb = "would be freed; add --yes to remove" if found.dry_run else "freed"
        print(f"{size(found.n_bytes):>11}  {verb}")
    if found.problems:
        lines = "\n".join(f"  {problem}" for problem in found.problems)
        raise FpoError(f"{counted(len(found.problems), 'thing')} could not be looked at or removed\n{lines}")


def _recomputed(root: str, key: str, count: int, recipe: Path, seed: int) -> dict[str, Any]:
    from fpo.recipe import load_recipe
    from fpo.store import open_cache

    quiet_libraries()
    from fpo.stage1_cache import recompute

    return vars(recompute(load_recipe(recipe), open_cache(root, key, counts=False), count, seed))


def _summary_facts(summary: Summary) -> dict[str, Any]:
    return {
        "key": summary.key,
        "state": summary.state,
        "complete": summary.complete,
        "groups": summary.n_groups,
        "completions": summary.n_completions,
        "bytes": summary.n_bytes,
        "base_bytes": summary.base.n_bytes,
        "created": summary.created.isoformat(),
        "used": summary.used.isoformat() if summary.used else None,
        "tags": list(summary.tags),
        "reference": summary.reference,
        "data": summary.data,
        "columns": [_column_facts(column) for column in summary.columns],
        "problem": summary.problem,
    }


def _column_facts(column: ColumnSummary) -> dict[str, Any]:
    return {
        "key": column.key,
        "name": column.label,
        "spec": column.spec,
        "state": column.state,
        "complete": column.complete,
        "shards": column.extent.shards_total,
        "shards_done": column.extent.shards_done,
        "bytes": column.n_bytes,
        "problem": column.problem,
    }


def _column_line(column: ColumnSummary) -> str:
    """b87d956baeee  features at model.layers.12, top 64: sae [9b01e2aa], complete, 12.5 MiB"""
    return f"{column.key[:12]}  {column.label}, {column.state}, {size(column.n_bytes)}"


def _meant(column: list[str] | None, no_columns: bool) -> AllOrKeys:
    """Which columns, by the options of a command."""
    if no_columns and column:
        raise typer.BadParameter("--column and --no-columns exclude each other")
    return () if no_columns else (column or "all")


def _print_transfer(verb: str, report: TransferReport, as_json: bool) -> None:
    from fpo.store import counted

    if as_json:
        totals = {
            name: getattr(report, name) for name in ("manifest_digest", "moved", "present", "n_bytes", "repaired")
        }
        columns = [vars(column) for column in report.columns]
        print(json.dumps({**vars(report), **totals, "base": vars(report.base), "columns": columns}, indent=2))
        return
    print(
        f"{verb} {report.key[:12]} to {report.target}: {counted(report.moved, 'object')} moved "
        f"({size(report.n_bytes)}), {report.present} there already, {report.seconds:.1f} s; "
        f"manifest {report.manifest_digest[:12]}"
    )
    for column in report.columns:
        print(f"  column {column.key[:12]}, {column.name}: {column.moved} moved, {column.present} there already")
    if not report.listed and not report.columns:
        print("the base alone: its columns cannot be listed there, name each by its 64 digits with --column")
    if report.tag:
        print(f"tag {report.tag} stands for it there, too")
    for name in report.repaired:
        print(f"repaired {name}")


_MOST_COLUMNS = 4
"""Of one cache in the listing; `show` has them all."""


def _print_names(summary: Summary, most: int) -> None:
    for label in (summary.reference, summary.data):
        if label:
            print(f"{'':<14}{label}")
    for column in summary.columns[:most]:
        state = "" if column.complete else f", {column.state}"
        print(f"{'':<14}+ {column.key[:12]}  {column.label}{state}")
    if len(summary.columns) > most:
        print(f"{'':<14}+ {len(summary.columns) - most} more: fpo store show {summary.key[:12]}")


def _made_from(store: Store | RemoteStore, key: str) -> list[tuple[str, str]]:
    """The names behind the digests, as `ls` shows them."""
    from fpo.store import Store

    if not isinstance(store, Store):
        return []
    summary = store.summary(key)
    return [(name, label) for name, label in (("reference", summary.reference), ("data", summary.data)) if label]
