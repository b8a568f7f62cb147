"""`fpo features`: what the features say of a cache before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpo.commands.caches import existing_root
from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson, StoreOption
from fpo.errors import CacheError, FpoError

if TYPE_CHECKING:
    from fpo.evaluation.breakdown import Part
    from fpo.evaluation.feature_report import FeatureReport
    from fpo.evaluation.labels import Labels
    from fpo.evaluation.pairs import Pairs
    from fpo.recipe import Recipe
    from fpo.store import Cache, Spec

EXAMPLES = 3
"""Pairs of each feature, where a recipe says how to show them."""


def features_command(
    target: Annotated[str, typer.Argument(help="Cache: key, any unique prefix of it, or a tag.", metavar="CACHE")],
    store: StoreOption = None,
    hookpoint: Annotated[str | None, typer.Option(help="Features at this hookpoint alone, of a cache of several.")] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Features of each side that are shown.")] = 15,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the cache: its reference and data, for --examples and --by.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Pairs of each feature, scored again by the recipe's reference; [default: 3]"),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Look at the pairs apart by what this column of the data says.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Neuronpedia's explanations: a file or folder of its export, a source such as "
            "gemma-2-2b/20-gemmascope-res-16k, or `neuronpedia` for that of the SAE by SAELens' table.",
        ),
    ] = None,
    steer: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Also write the features as rows of lm-eval's steered model.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    What separates chosen from rejected in a cache: the gap of every feature with its interval (docs/features.md).
    """
