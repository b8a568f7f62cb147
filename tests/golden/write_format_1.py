"""
Writes format-1/: a small cache of format 1 and, written down separately, the values that it holds.

    python tests/golden/write_format_1.py FOLDER

Ran once, for this format; the committed bytes are never written again. They must open for ever, whatever the writer
and its libraries become. A change of the format gets a script and a folder of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fpo.store import (
    CacheWriter,
    Features,
    Pairs,
    Store,
    TopLogits,
    open_cache,
    pair_digests,
    pairs_digest,
    shard_digest,
)

VOCAB = 2**17
D_SAE = (2**14, 6)
TOP_K: tuple[int | str, ...] = (3, "all")
TOP_LOGITS = 2

# (pair_id, prompt, chosen, rejected): an empty prompt, completions of one token, the largest token id, a large row.
TOKENS: list[tuple[int, list[int], list[int], list[int]]] = [
    (0, [1, 2, 3, 4], [10, 11, 12], [20, 21]),
    (1, [], [5, 6], [7]),
    (2, [9], [VOCAB - 1], [0]),
    (3, [1, 1, 1, 1, 1, 1, 1], [30, 31, 32, 33], [30, 31]),
    (2**40, [8, 8], [40], [41, 42, 43, 44, 45]),
]
PLAN = [[3, 0, 2**40], [1, 2]]

# Kept features (index, activation) of the chosen and the rejected completion of every pair, at either hookpoint.
NONE: list[tuple[int, float]] = []
KEPT = [
    [
        [(5, 0.1), (77, 2.5), (D_SAE[0] - 1, 1e-45)], NONE,
        [(0, 3.0)], [(1, 0.25), (2, 0.5)],
        NONE, NONE,
        [(4, 1e30)], [(4, 7.0)],
        [(100, 0.75)], [(100, 0.625), (101, 0.5), (102, 0.375)],
    ],
    [
        [(0, 0.5), (1, -0.25), (2, 0.125), (3, 1.0), (4, 2.0), (5, 4.0)], [(3, 0.3)],
        NONE, NONE,
        NONE, NONE,
        NONE, NONE,
        [(5, 0.7)], NONE,
    ],
]  # fmt: skip


def pairs_of(ids: list[int]) -> Pairs:
    """The rows above with these pair ids; values that are not above follow from the position in the list above."""
    rows = [[pair_id for pair_id, *_ in TOKENS].index(wanted) for wanted in ids]
    texts = [TOKENS[row] for row in rows]
    segments = [segment for text in texts for segment in text[1:]]
    input_ids = np.array([token for segment in segments for token in segment], np.uint32)
    splits = np.cumsum([0, *map(len, segments)]).astype(np.uint64)
    logps = [_logps(row, side) for row in rows for side in (0, 1)]
    token_logps = np.concatenate(logps).astype(np.float32)
    C = len(token_logps)
    return Pairs(
        pair_id=np.array(ids, np.uint64),
        pair_digest=pair_digests(input_ids, splits),
        input_ids=input_ids,
        splits=splits,
        ref_logps=np.array([part.sum() for part in logps]).reshape(-1, 2).astype(np.float32),
        token_logps=token_logps,
        features=tuple(_features(n, rows) for n in (0, 1)),
        top_logits=TopLogits(
            np.arange(C * TOP_LOGITS, dtype=np.uint32).reshape(C, TOP_LOGITS) * 7 % VOCAB,
            np.stack([token_logps / 2, token_logps / 4 - 0.1], axis=1).astype(np.float32),
        ),
    )


def _logps(row: int, side: int) -> np.ndarray:
    """Eighths, and one 0.1 that float32 rounds."""
    _, prompt, *completions = TOKENS[row]
    scored = len(completions[side]) - (not prompt)
    return np.array([-0.1 if i == 0 and row == 0 else -(i + 1 + row + 3 * side) / 8 for i in range(scored)])


def _features(n: int, rows: list[int]) -> Features:
    kept = [KEPT[n][2 * row + side] for row in rows for side in (0, 1)]
    counts = np.array([len(entries) for entries in kept]).reshape(-1, 2)
    # Where top_k of them are kept, as many again were cut off.
    cut = np.zeros_like(counts, dtype=bool) if TOP_K[n] == "all" else counts == TOP_K[n]
    return Features(
        indices=np.array([index for entries in kept for index, _ in entries], np.uint32),
        acts=np.array([act for entries in kept for _, act in entries], np.float32),
        splits=np.cumsum([0, *counts.ravel()]).astype(np.uint64),
        active=np.where(cut, 2 * counts, counts).astype(np.uint32),
        tail_sq=np.where(cut, 0.015625, 0).astype(np.float32),
    )


RECIPE: dict[str, Any] = {
    "format": 1,
    "scorer": {
        "vocab_size": VOCAB,
        "weights": "00" * 32,
        "features": [
            {"d_sae": d_sae, "top_k": top_k, "hookpoint": f"model.layers.{n}"}
            for n, (d_sae, top_k) in enumerate(zip(D_SAE, TOP_K, strict=True))
        ],
        "extras": {"top_logits": TOP_LOGITS},
    },
    "pairs": {
        "digest": pairs_digest(shard_digest(np.array(ids), pairs_of(ids).pair_digest) for ids in PLAN),
        "n_pairs": len(TOKENS),
        "seed": 17,
        "shard_pairs": [len(ids) for ids in PLAN],
        "note": "größer, 大, naïve",
    },
}


def arrays_of(pairs: Pairs) -> dict[str, Any]:
    """As lists, by their names in the shard; a float32 as the shortest number that is exactly it in float64."""
    names = ("pair_id", "pair_digest", "input_ids", "splits", "token_logps", "ref_logps")
    arrays = {name: getattr(pairs, name).tolist() for name in names}
    for n, features in enumerate(pairs.features):
        for name in ("indices", "acts", "splits", "active", "tail_sq"):
            arrays[f"features/{n}/{name}"] = getattr(features, name).tolist()
    assert pairs.top_logits is not None
    return arrays | {f"top_logits/{name}": getattr(pairs.top_logits, name).tolist() for name in ("indices", "logps")}


def main(folder: Path) -> None:
    writer = CacheWriter(Store(folder), RECIPE, [np.array(ids, np.uint64) for ids in PLAN])
    for sid in writer.missing():
        writer.write(sid, pairs_of(PLAN[sid]), {"device": "none", "seconds": 0.5})
    writer.seal({"self_check": [], "split": "golden"})
    expected = {
        "key": writer.key,
        "digest": open_cache(folder, writer.key).digest,
        "shards": [arrays_of(pairs_of(ids)) for ids in PLAN],
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
