"""
What a cache was made from, in words. The recipe holds digests, because names can lie; the names that its maker
used stand in the records' provenance under "inputs" and are for people only. In a base, and in a column of features:

    {"reference": {"model", "revision", "adapter"}, "data": {"source", "subset", "revision", "split"}}
    {"sae"}

All of it may be a stranger's: what these functions return is one printable line.
"""

from __future__ import annotations

from typing import Any

from fpo.store.files import printable
from fpo.store.format.columns import column_name

INPUTS = "inputs"
_LONGEST = 300
"""Characters of a label: a path fits, a page does not."""


def counted(count: int, what: str) -> str:
    """1 shard, 2,000 shards"""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def reference_label(recipe: dict[str, Any], inputs: dict[str, Any]) -> str:
    """
    google/gemma-2-2b-it@main + my-adapter [3fa9c1d2], scored by vllm 0.11.2, as far as it is known; the digits are the
    weights' digest.
    """
    given = _dict(inputs.get("reference"))
    label = " + ".join(
        part for part in (_revised(given, "model"), given.get("adapter")) if isinstance(part, str) and part
    )
    reference = _dict(_dict(recipe.get("scorer")).get("reference"))
    engine = reference.get("scored_by")
    by = f", scored by {engine}" if isinstance(engine, str) else ""
    return _line(_with_digest(label, reference.get("weights")) + by)


def column_label(spec: dict[str, Any], inputs: dict[str, Any]) -> str:
    """features at model.layers.12, top 64: path/of/sae [9b01e2aa]; without the SAE where a column has none."""
    name = inputs.get("sae")
    sae = _with_digest(name if isinstance(name, str) else "", _dict(spec.get("sae")).get("weights"))
    return _line(f"{column_name(spec)}: {sae}" if sae else column_name(spec))


def data_label(inputs: dict[str, Any]) -> str:
    """HuggingFaceH4/ultrafeedback_binarized train_prefs, or "" where nobody wrote it down."""
    given = _dict(inputs.get("data"))
    parts = (_revised(given, "source"), given.get("subset"), given.get("split"))
    return _line(" ".join(part for part in parts if isinstance(part, str) and part))


def _line(text: str) -> str:
    return printable(text, _LONGEST)


def _revised(given: dict[str, Any], field: str) -> str:
    name, revision = given.get(field), given.get("revision")
    if not isinstance(name, str):
        return ""
    return f"{name}@{revision}" if isinstance(revision, str) else name


def _with_digest(label: str, digest: Any) -> str:
    short = f"[{digest[:8]}]" if isinstance(digest, str) else ""
    return " ".join(part for part in (label, short) if part)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
