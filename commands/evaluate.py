"""`fpo evaluate`: held-out metrics of a run, and what stands behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.caches import recipe_cache
from fpo.commands.evaluation_lines import evaluation_lines
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson
from fpo.commands.wording import groups_word


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run folder of fpo align.", metavar="RUN")],
    checkpoint: Annotated[
        int | None,
        typer.Option("--checkpoint", help="Evaluate RUN/checkpoint-N, finished or not.", metavar="N"),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", help="Accuracy by this column of the held-out data, such as subset.", metavar="COLUMN"),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, help="Let the policy complete so many held-out prompts: KL to the reference, entropy."
        ),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of such a completion.")] = 256,
    store: Annotated[
        str | None, typer.Option("--store", help="Folder or URL of caches; else the one the run was trained from.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Other held-out pairs: --set data.eval_split=test.", metavar="FIELD=VALUE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out metrics of a run by its own recipe, from the cache of the held-out pairs, with intervals."""
    quiet_libraries()
    from fpo.evaluation.evaluate import Speaking, evaluate
    from fpo.evaluation.sampling import Sampling
    from fpo.stage2_align import evaluated_recipe, evaluated_store

    loaded, root = evaluated_recipe(run, overrides), evaluated_store(run, store)
    cache = recipe_cache(loaded, run / "recipe.yaml", root, overrides, held_out=True)
    speaking = Speaking(samples, Sampling(max_new_tokens, temperature=1.0)) if samples else None
    found = evaluate(loaded, cache, run, checkpoint, by, speaking)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    what = groups_word(cache.n_groups, cache.n_completions)
    print(f"{cache.n_groups:,} held-out {what} ({loaded.data.held_out_split}), cache {cache.key[:12]}")
    print("\n".join(evaluation_lines(found, by)))
