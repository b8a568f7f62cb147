"""`fpo evaluate`: held-out metrics of a run, and what stands behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    print(f"{cache.n_groups:,} held-out {what} ({loaded.data.eval_split}), cache {cache.key[:12]}")
    for name, value in found.items():
        if name.startswith("eval_"):
            interval = _ends(found.get("intervals", {}).get(name), "{:.4g}")
            print(f"  {name:<33}{value:<12.6g}{interval}".rstrip())
    if "displacement" in found:
        print("\n".join(["", *_by_length(found["length"]), "", *_displaced(found["displacement"])]))
    if "subsets" in found:
        print("\n" + _subsets(by or "", found["subsets"]))
    if "own_samples" in found:
        print("\n" + "\n".join(_own(found["own_samples"])))


def _ends(mean: dict[str, Any] | None, form: str) -> str:
    if mean is None or mean["low"] is None:
        return ""
    return f"[{form.format(mean['low'])}, {form.format(mean['high'])}]"


def _said(mean: dict[str, Any], form: str) -> str:
    """A mean with its interval."""
    if mean["value"] is None:
        return "-"
    return f"{form.format(mean['value'])} {_ends(mean, form)}".rstrip()


def _by_length(length: dict[str, Any]) -> list[str]:
    parts = [
        f"{_said(part['accuracy'], '{:.1%}')} of {part['n']:,} where chosen is {words}"
        for name, words in (("chosen_shorter", "shorter"), ("as_long", "as long"), ("chosen_longer", "longer"))
        if (part := length[name])["n"]
    ]
    return [
        f"length      the margin goes with how much longer chosen is: r {_said(length['margin_against_length'], '{:.2f}')}",
        *(f"            right for {part}" for part in parts),
    ]


def _displaced(found: dict[str, Any]) -> list[str]:
    """Why both rewards fall, if they do."""
    lines = [
        f"likelihood  chosen {_said(found['chosen'], '{:+.2f}')}, rejected {_said(found['rejected'], '{:+.2f}')} nats a completion against the reference",
        f"            both are less likely than they were in {_said(found['both_fall'], '{:.1%}')} of pairs",
    ]
    share, chosen, rejected = (
        found[name]["value"] for name in ("both_fall", "chosen_where_both_fall", "rejected_where_both_fall")
    )
    if share and chosen is not None:
        why = "a loss of the difference is lowered by pushing rejected down further than chosen"
        if chosen < rejected:
            why = "and there chosen loses more than rejected, which is no learning of the preference"
        lines.append(f"            there chosen {chosen:+.2f}, rejected {rejected:+.2f} nats: {why}")
        rows = ", ".join(f"{pair['row']} ({pair['chosen']:+.1f})" for pair in found["worst"][:5])
        lines.append(f"            chosen loses most in rows {rows} of the held-out data")
    if "ches" in found:
        for name, words in (("ches", "CHES"), ("length_normalised_ches", "length-normalised")):
            lines.append(
                f"            {words} goes with what chosen loses: rank correlation {_said(found[name], '{:.2f}')}"
            )
        lines.append(
            "            below 0: pairs whose sides look alike to the reference lose most; data.filter leaves the worst out"
        )
    else:
        lines.append("            cache.hidden_gram: true adds what says before training which pairs will (CHES)")
    return lines


def _subsets(by: str, rows: list[dict[str, Any]]) -> str:
    from fpo.report import Column, Table

    ends = ("low", "high")
    flat = [
        {**row, **row["accuracy"], **({"all": row["all_right"]["value"]} if "all_right" in row else {})} for row in rows
    ]
    columns = [
        Column("subset", by),
        Column("n", "groups"),
        Column("value", "accuracy", ".1%", interval=ends),
        *([Column("all", "chosen beats all", ".1%")] if "all" in flat[0] else []),
    ]
    return Table(by, columns, flat).text()


def _own(found: dict[str, Any]) -> list[str]:
    return [
        f"samples     {found['samples']:,} of the policy's own, {_said(found['tokens'], '{:.1f}')} tokens",
        f"            KL to the reference {_said(found['kl'], '{:.3f}')} nats a completion, k3 {_said(found['kl_k3'], '{:.3f}')}",
        f"            entropy {_said(found['entropy'], '{:.3f}')} nats a token, the reference's there {_said(found['reference_entropy'], '{:.3f}')}",
        f"            of the 100 likeliest tokens, as FPO's paper has it: {_said(found['top_entropy'], '{:.3f}')}",
    ]
