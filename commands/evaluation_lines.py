"""What `fpo evaluate` found, for people: the means, and why they are what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

INDENT = " " * 12

Mean = dict[str, Any]
"""`value`, `low` and `high`; None where it cannot be told."""


def evaluation_lines(found: dict[str, Any], by: str | None) -> list[str]:
    """by: the column that the subsets are told by."""
    lines = [*_metrics(found)]
    for name, paragraph in (("length", _length), ("displacement", _displacement), ("own_samples", _own_samples)):
        if name in found:
            lines += ["", *paragraph(found[name])]
    if "subsets" in found:
        lines += ["", _subsets(by or "subset", found["subsets"])]
    return lines


def _metrics(found: dict[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if name.startswith("eval_"):
            ends = _ends(found.get("intervals", {}).get(name), ".4g")
            yield f"  {name:<33}{value:<12.6g}{ends}".rstrip()
    if "all_right" in found:
        yield f"  {'every pair of a group right':<33}{_said(found['all_right'], '.1%')}"


def _length(found: dict[str, Any]) -> Iterator[str]:
    against = _said(found["margin_against_length"], ".2f")
    yield f"length      the margin goes with how much longer chosen is: r {against}"
    for name, words in (("chosen_shorter", "shorter"), ("as_long", "as long"), ("chosen_longer", "longer")):
        part = found[name]
        if part["n"]:
            yield f"{INDENT}right for {_said(part['accuracy'], '.1%')} of {part['n']:,} where chosen is {words}"


def _displacement(found: dict[str, Any]) -> Iterator[str]:
    """Why both rewards fall, if they do."""
    yield (
        f"likelihood  chosen {_said(found['chosen'], '+.2f')}, rejected {_said(found['rejected'], '+.2f')} nats a "
        "completion against the reference"
    )
    yield f"{INDENT}both are less likely than they were in {_said(found['both_fall'], '.1%')} of pairs"
    chosen, rejected = (found[f"{side}_where_both_fall"]["value"] for side in ("chosen", "rejected"))
    if chosen is not None:
        why = "a loss of their difference falls where rejected is pushed down further than chosen"
        if chosen < rejected:
            why = "chosen loses more than rejected, which is not what the pairs say"
        yield f"{INDENT}there chosen {chosen:+.2f}, rejected {rejected:+.2f} nats: {why}"
    if found["worst"]:
        rows = ", ".join(f"{pair['row']} ({pair['chosen']:+.1f})" for pair in found["worst"][:5])
        yield f"{INDENT}chosen loses most in rows {rows} of the held-out data"
    if "ches" not in found:
        yield f"{INDENT}cache.hidden_gram: true adds what tells before training which pairs will (CHES)"
        return
    for name, words in (("ches", "CHES"), ("length_normalised_ches", "length-normalised")):
        yield f"{INDENT}{words} goes with what chosen gains: rank correlation {_said(found[name], '.2f')}"
    yield f"{INDENT}below 0, what looks alike to the reference loses most, and data.filter can leave it out"


def _own_samples(found: dict[str, Any]) -> Iterator[str]:
    yield f"samples     {found['samples']:,} of the policy's own, {_said(found['tokens'], '.1f')} tokens"
    kl, k3 = _said(found["kl"], ".3f"), _said(found["kl_k3"], ".3f")
    yield f"{INDENT}KL to the reference {kl} nats a completion, by the estimator k3 {k3}"
    ours, theirs = _said(found["entropy"], ".3f"), _said(found["reference_entropy"], ".3f")
    yield f"{INDENT}entropy {ours} nats a token, the reference's there {theirs}"
    yield f"{INDENT}of the 100 likeliest tokens, as FPO's paper has it: {_said(found['top_entropy'], '.3f')}"


def _subsets(by: str, rows: list[dict[str, Any]]) -> str:
    from fpo.report import Column, Table

    flat = [{**row, **row["accuracy"], "all": row.get("all_right", {}).get("value")} for row in rows]
    columns = [
        Column("subset", by),
        Column("n", "groups"),
        Column("value", "accuracy", ".1%", interval=("low", "high")),
    ]
    if any("all_right" in row for row in rows):
        columns.append(Column("all", "every pair right", ".1%"))
    return Table(by, columns, flat).text()


def _ends(mean: Mean | None, form: str) -> str:
    if mean is None or mean["low"] is None:
        return ""
    return f"[{mean['low']:{form}}, {mean['high']:{form}}]"


def _said(mean: Mean, form: str) -> str:
    """A mean with its interval."""
    return "-" if mean["value"] is None else f"{mean['value']:{form}} {_ends(mean, form)}".rstrip()
