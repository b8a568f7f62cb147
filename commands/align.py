"""`fpo align`: a cache to a policy."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.caches import recipe_cache
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, Overrides, RecipePath, StoreOption, command_line
from fpo.commands.wording import groups_word
from fpo.errors import RunInterrupted
from fpo.interrupts import exit_code, interruptible
from fpo.progress import is_first_rank, say


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
    from fpo.recipe import load_recipe, reads_held_out

    loaded = load_recipe(recipe, overrides)
    if is_first_rank():
        say("opening the cache ...")
    quiet_libraries()
    from fpo.stage2_align import align
    from fpo.store import column_name

    run = Path(os.path.expanduser(output)) if output else Path("runs") / f"{recipe.stem}-{loaded.objective.name}"
    again = f"{command_line('align', recipe, store, overrides)} --output {shlex.quote(str(run))} --resume"
    with interruptible(f"continue with: {again}"):
        cache, held_out = recipe_cache(loaded, recipe, store, overrides), None
        if reads_held_out(loaded):
            held_out = recipe_cache(loaded, recipe, store, overrides, held_out=True)
        try:
            report = align(loaded, cache, run, resume, held_out)
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
        print(json.dumps({**facts, "last": report.last, "best": report.best}, indent=2))
        return
    print(f"run         {report.run}")
    what = groups_word(cache.n_groups, cache.n_completions)
    print(f"cache       {cache.key[:12]} (manifest {cache.digest[:12]}), {cache.n_groups:,} {what}")
    for column in cache.columns:
        sealed = column.sealed
        print(f"column      {sealed.key[:12]} (manifest {sealed.digest[:12]}), {column_name(column.wanted)}")
    if report.layout is not None:
        print(f"layout      {report.layout}")
    if report.parity is not None:
        print(f"parity      {report.parity:.2g} nats per token between the policy and the cached reference")
    world, per_device, accumulation = report.per_step
    print(
        f"trained     {report.steps:,} steps of {world * per_device * accumulation} {what} ({world} "
        f"process{'es' if world > 1 else ''} x {per_device} x {accumulation}), {rate:.1f} {what}/s, "
        f"{report.seconds:.0f} s"
    )
    if report.best is not None:
        best = report.best
        print(f"best        step {best['step']:,}, {best['metric']} {best['value']:.6g}: the policy that was saved")
    for name in sorted(name for name in report.last if "/" in name or name == "loss"):
        print(f"  {name:<28}{report.last[name]:.6g}")


def leave_process_group() -> None:
    """Under torchrun, end the communication in order: threads of gloo that outlive Python abort the process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
