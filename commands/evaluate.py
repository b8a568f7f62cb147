"""`fpo evaluate`: held-out metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.caches import recipe_cache
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson
from fpo.commands.wording import groups_word


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
    cache = recipe_cache(loaded, run / "recipe.yaml", root, overrides, held_out=True)
    metrics = evaluate_run(loaded, cache, run, checkpoint)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    what = groups_word(cache.n_groups, cache.n_completions)
    print(f"{cache.n_groups:,} held-out {what} ({loaded.data.eval_split}), cache {cache.key[:12]}")
    for name, value in metrics.items():
        print(f"  {name:<33}{value:.6g}")
