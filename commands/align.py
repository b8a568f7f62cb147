"""`fpo align`: a cache to a policy."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.caches import recipe_cache
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, Overrides, RecipePath, StoreOption, command_line
from fpo.commands.reports import align_facts, cache_lines, column_lines, cost_lines
from fpo.commands.sweep import align_sweep
from fpo.commands.wording import groups_word
from fpo.errors import RunInterrupted
from fpo.interrupts import exit_code, interruptible
from fpo.progress import is_first_rank, say


def align_command(
    recipe: RecipePath,
    store: StoreOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Run folder; else runs/<recipe>-<objective>, or -sweep.", metavar="RUN"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output, if it was begun.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """
    Stage 2: train the recipe's policy from its cache. The reference is never run. `--set objective.alpha=0.1,0.5,1`
    trains a run for each value, in a folder of its own below RUN, and skips those that are finished.
    """
    from fpo.recipe import load_variants, reads_held_out

    variants = load_variants(recipe, overrides)
    if is_first_rank():
        say("opening the cache ...")
    quiet_libraries()
    from fpo.stage1_cache import with_module_paths

    variants = [variant._replace(recipe=with_module_paths(variant.recipe)) for variant in variants]
    loaded = variants[0].recipe
    output = None if output is None else output.expanduser()
    if len(variants) > 1:
        align_sweep(recipe, store, output, overrides, variants, as_json)
        return
    from fpo.stage2_align import align

    run = output or Path("runs") / f"{recipe.stem}-{loaded.objective.name}"
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
    if as_json:
        print(json.dumps(align_facts(report), indent=2))
        return
    print(f"run         {report.run}")
    print("\n".join([*cache_lines(cache), *column_lines(cache)]))
    if report.layout is not None:
        print(f"layout      {report.layout}")
    if report.parity is not None:
        print(f"parity      {report.parity:.2g} nats per token between the policy and the cached reference")
    world, per_device, accumulation = report.per_step
    what = groups_word(cache.n_groups, cache.n_completions)
    print(
        f"trained     {report.steps:,} steps of {world * per_device * accumulation} {what} ({world} "
        f"process{'es' if world > 1 else ''} x {per_device} x {accumulation}), {report.rate:.1f} {what}/s, "
        f"{report.seconds:.0f} s"
    )
    if report.best is not None:
        best = report.best
        print(f"best        step {best['step']:,}, {best['metric']} {best['value']:.6g}: the policy that was saved")
    print("\n".join(cost_lines(report.cost)))
    for name in sorted(name for name in report.last if "/" in name or name in ("loss", "kl")):
        print(f"  {name:<28}{report.last[name]:.6g}")


def leave_process_group() -> None:
    """Under torchrun, end the communication in order: threads of gloo that outlive Python abort the process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
