"""`fpo cache`: data to cache, through the reference."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpo.commands.caches import store_root
from fpo.commands.data import data_lines
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, Overrides, RecipePath, StoreOption, command_line
from fpo.commands.wording import size
from fpo.interrupts import interruptible
from fpo.progress import is_first_rank, say

if TYPE_CHECKING:
    from fpo.stage1_cache import CacheReport
    from fpo.store import Nearest


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
    from fpo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from fpo.stage1_cache import build_caches

    root = store_root(store or loaded.cache.store)
    again = command_line("cache", recipe, store, overrides)
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
    print(f"next: {command_line('align', recipe, store, overrides)}")


def _say_why(split: str, near: Nearest | None) -> None:
    """On a miss: the cache that comes closest, and what keeps it from being this one."""
    if near is not None:
        print(f"{split}: not cached yet; nearest is {near.key[:12]}, which differs in", file=sys.stderr)
        for line in near.lines():
            print(f"  {line}", file=sys.stderr)


def _cache_facts(report: CacheReport) -> dict[str, Any]:
    cache = report.cache
    n_bytes = cache.manifest.n_bytes + sum(column.n_bytes for column in report.columns)
    return {
        "split": report.split,
        "key": cache.key,
        "manifest_digest": cache.digest,
        "path": cache.folder.where(""),
        "groups": cache.n_groups,
        "completions": cache.n_completions,
        "bytes": n_bytes,
        "bytes_per_group": n_bytes / max(cache.n_groups, 1),
        "columns": [
            {
                "name": column.name,
                "key": column.key,
                "held": column.held,
                "bytes": column.n_bytes,
                "built": column.built,
            }
            for column in report.columns
        ],
        "base_built": report.base_built,
        "built_shards": report.built_shards,
        "shards_by_others": report.shards_by_others,
        "rebuilt_shards": report.rebuilt_shards,
        "shards": len(cache.shard_groups),
        "seconds": report.seconds,
        "reused": report.reused,
        "scored": report.scored,
        "completions_per_second": report.scored / report.seconds if report.seconds else 0.0,
        "drops": report.drops.as_dict(),
        "trained_on": report.trained_on,
        "self_check": [check.model_dump(exclude_unset=True) for check in report.self_checks],
    }


def _print_cache(report: CacheReport) -> None:
    from fpo.store import counted

    cache = report.cache
    print(f"{report.split}")
    print(f"  key         {cache.key}")
    print(f"  path        {cache.folder.where('')}")
    print("\n".join(f"  {line}" for line in data_lines(report.drops, report.trained_on)))
    shards = counted(len(cache.shard_groups), "shard")
    print(f"  base        {shards}, {_size(report, cache.manifest.n_bytes, built=report.base_built)}")
    for column in report.columns:
        cut = "" if column.held == column.name else f", cut from {column.held}"
        print(f"  column      {column.name}{cut}: {_size(report, column.n_bytes, built=column.built)}")
    for check in report.self_checks:
        print(f"  {'self-check':<12}{check.line()}")
    if report.foreign_shards:
        print(
            f"  note        {report.foreign_shards} of {len(cache.shard_groups)} shards were there already and not "
            "computed in this store (a stopped pull, a killed writer); no other cache will copy from them"
        )
    if report.rebuilt_shards:
        shards = "1 shard is" if report.rebuilt_shards == 1 else f"{report.rebuilt_shards} shards are"
        print(f"  rebuilt     {shards} as the manifest says again")
    elif report.built_shards or report.shards_by_others:
        rate, tokens = report.scored / report.seconds, report.tokens_scored / report.seconds
        if report.layout is not None:
            print(f"  layout      {report.layout}")
        copied = f"{counted(report.reused, 'completion')} copied from other caches" if report.reused else ""
        scored = f"{counted(report.scored, 'completion')} scored ({rate:,.1f}/s, {tokens:,.0f} tokens/s)"
        done = ", ".join(filter(None, [copied, scored if report.scored else ""]))
        print(f"  built       {_built(report)} in {report.seconds:.1f} s{': ' if done else ''}{done}")
    else:
        print(f"  hit         found complete in {report.seconds:.1f} s; no model was loaded")


def _size(report: CacheReport, n_bytes: int, *, built: bool) -> str:
    """393.6 KiB, 409 bytes per pair, built"""
    per_row = f"{n_bytes / max(report.cache.n_groups, 1):,.0f} bytes per {report.drops.unit.removesuffix('s')}"
    return f"{size(n_bytes)}, {per_row}, {'built' if built else 'there'}"


def _built(report: CacheReport) -> str:
    """18 shards, or 6 of 18 shards here, 12 by other processes"""
    from fpo.store import counted

    total = counted(len(report.cache.shard_groups), "shard")
    own = total if report.built_shards == len(report.cache.shard_groups) else f"{report.built_shards:,} of {total} here"
    return f"{own}, {report.shards_by_others:,} by other processes" if report.shards_by_others else own
