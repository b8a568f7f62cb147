"""`fpo features`: what the features say of a cache before training, and of a run after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpo.commands.caches import recipe_cache, store_root
from fpo.commands.feature_lines import print_report
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, StoreOption
from fpo.errors import FpoError

if TYPE_CHECKING:
    from fpo.evaluation.feature_report import FeatureReport, Question
    from fpo.recipe import Recipe
    from fpo.store import Cache, Spec

EXAMPLES = 3
"""Pairs of each feature, where a recipe says how to show them and nobody says how many."""


def features_command(
    what: Annotated[
        str, typer.Argument(help="Cache (key, any unique prefix of it, a tag), or run folder.", metavar="CACHE|RUN")
    ],
    store: StoreOption = None,
    hookpoint: Annotated[str | None, typer.Option(help="Only the features at this hookpoint.")] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Features of each side that are shown.")] = 10,
    recipe: Annotated[
        Path | None, typer.Option(help="The cache's recipe, for --examples (its reference) and --by (its data).")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help=f"Pairs of each feature, which the reference scores again; {EXAMPLES} by default."
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Look apart at what this column of the data tells apart.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Names of features: a file or folder of Neuronpedia's exports, a source of theirs such as "
            "gemma-2-2b/20-gemmascope-res-16k, or `neuronpedia`: the one that SAELens' table has for the SAE.",
        ),
    ] = None,
    steer: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the features as rows of lm-eval's steered model.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option("--checkpoint", metavar="N", help="Of a run: its policy after step N.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of a run: held-out prompts that policy and reference complete.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of such a completion.")] = 256,
    as_json: AsJson = False,
) -> None:
    """
    Every feature with intervals (docs/features.md): of a cache the gap, what separates chosen from rejected
    completions; of a run the drift, what training did to it, and how well the gap told it.
    """
    if (Path(what) / "recipe.yaml").is_file():
        for option, value in (("--recipe", recipe), ("--examples", examples), ("--by", by), ("--steer", steer)):
            if value is not None:
                raise FpoError(f"{option} is for caches, and {what} is a run; leave it out")
        quiet_libraries()
        _run_features(Path(what), store, (hookpoint, top, labels), checkpoint, (samples, max_new_tokens), html, as_json)
        return
    if checkpoint is not None or samples:
        raise FpoError(f"--checkpoint and --samples are for runs, and {what} is none (no recipe.yaml there)")
    if recipe is None and (examples or by):
        raise FpoError(
            f"{'--by' if by else '--examples'} needs --recipe: a cache does not say where its model and data lie"
        )
    quiet_libraries()
    from fpo.evaluation.feature_report import feature_columns, sae_name
    from fpo.evaluation.steering import steer_rows, steer_target, write_steer_rows
    from fpo.recipe import load_recipe
    from fpo.store import open_cache

    opened = open_cache(store_root(store), what)
    loaded = None if recipe is None else load_recipe(recipe)
    specs = feature_columns(opened, hookpoint)
    targets = [] if steer is None else [steer_target(spec, sae_name(opened, spec)) for spec in specs]
    reports = _reports(opened, specs, top, examples, loaded, by, labels)
    if steer is not None:
        rows = [steer_rows(report.features, target) for report, target in zip(reports, targets, strict=True)]
        write_steer_rows([row for own in rows for row in own], steer)
    if html is not None:
        from fpo.commands.feature_page import features_page

        features_page(reports).save(html)
    if as_json:
        print(json.dumps([report.facts() for report in reports], indent=2, ensure_ascii=False, allow_nan=False))
        return
    for report in reports:
        print_report(report)
    for what, path in (("steering", steer), ("page", html)):
        if path is not None:
            print(f"{what:<12}{path}")


def _run_features(
    run: Path,
    store: str | None,
    named: tuple[str | None, int, str | None],
    checkpoint: int | None,
    spoken: tuple[int, int],
    html: Path | None,
    as_json: bool,
) -> None:
    """
    named   which hookpoint, how many features, where their names are
    spoken  how many prompts, and how many tokens
    """
    from fpo.commands.drift_lines import drift_lines, drift_page
    from fpo.evaluation.drift_report import DriftQuestion, drift_report
    from fpo.evaluation.sampling import Sampling
    from fpo.stage2_align import evaluated_recipe, evaluated_store

    recipe, root = evaluated_recipe(run), evaluated_store(run, store)
    hookpoint, top, labels = named
    entries = tuple(entry for entry in recipe.features if hookpoint in (None, entry.hookpoint))
    if not entries:
        at = f" at {hookpoint}" if hookpoint else ""
        raise FpoError(f"{run}: its recipe has no features{at}, so there is no drift to tell")
    train, held_out = (
        recipe_cache(recipe, run / "recipe.yaml", root, None, held_out=held_out) for held_out in (False, True)
    )
    question = DriftQuestion(top, spoken[0], Sampling(spoken[1], temperature=1.0), labels)
    found = drift_report(recipe.model_copy(update={"features": entries}), train, held_out, run, checkpoint, question)
    if html is not None:
        drift_page(found).save(html)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print("\n".join(drift_lines(found)))
    if html is not None:
        print(f"{'page':<12}{html}")


def _reports(
    cache: Cache,
    specs: Sequence[Spec],
    top: int,
    examples: int | None,
    recipe: Recipe | None,
    by: str | None,
    labels: str | None,
) -> list[FeatureReport]:
    """One for each column of features that is asked for."""
    from fpo.evaluation.breakdown import data_column, sources
    from fpo.evaluation.feature_report import feature_report, reads, sae_name
    from fpo.evaluation.labels import feature_names
    from fpo.evaluation.pairs import read_pairs
    from fpo.progress import progress_bar

    values = None if by is None or recipe is None else data_column(recipe, cache, by)
    question = _question(top, examples, recipe)
    with progress_bar(cache.n_groups + sum(reads(cache, spec) for spec in specs), "groups", "features") as bar:
        pairs = read_pairs(cache, bar.update)
        if values is not None:
            question = question._replace(sources=sources(pairs, values))
        return [
            feature_report(cache, spec, pairs, question, feature_names(labels, sae_name(cache, spec)), bar.update)
            for spec in specs
        ]


def _question(top: int, examples: int | None, recipe: Recipe | None) -> Question:
    """What is asked of every column, pairs only where the reference is at hand or asked for."""
    from fpo.evaluation.examples import at_hand
    from fpo.evaluation.feature_report import Question

    if recipe is None:
        return Question(top, note="no pairs are shown; with --recipe RECIPE its reference scores some again")
    if examples is None and not at_hand(recipe):
        fetch = f"the reference {recipe.reference.model} is not on this machine; --examples {EXAMPLES} fetches it"
        return Question(top, note=f"no pairs are shown: {fetch}")
    return Question(top, EXAMPLES if examples is None else examples, recipe)
