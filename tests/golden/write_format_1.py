"""
Writes format-1/: a small cache of format 1 with a column of every kind and, written down separately, the values that
it holds.

    python tests/golden/write_format_1.py FOLDER

Ran for this format; the committed bytes are never written again, a new kind of column stands beside the others. They
must open for ever, whatever the writer and its libraries become. A change of the format gets a script and a folder of
its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fpo.store import CacheWriter, Store, open_cache
from fpo.store.beside import column_recipe
from fpo.store.format.columns import Column, Features, HiddenGram, Mismatched, PromptFeatures, Spec, TopLogits
from fpo.store.format.encoding import ColumnRows
from fpo.store.format.groups import Groups, scored_splits, summed_logps
from fpo.store.format.key import cache_key, completion_digests, groups_digest, shard_digest
from fpo.store.format.ragged import starts_of

VOCAB = 2**17
NAN = float("nan")

# group_id -> prompt; weight; per completion its ids, its score, and which of its scored tokens count (None: all).
# One, two and three completions; an empty prompt, whose completions' first tokens are not scored; completions of one
# token; the largest token id; a large row; a token and a whole completion that do not count.
Completion = tuple[list[int], float, list[int] | None]
DATA: dict[int, tuple[list[int], float, list[Completion]]] = {
    0: ([1, 2, 3, 4], 1, [([10, 11, 12], 5, [1, 0, 1]), ([20, 21], 1.5, None)]),
    1: ([], 0.25, [([5, 6], NAN, None), ([7], NAN, None)]),
    2: ([9], 1, [([VOCAB - 1], NAN, None)]),
    3: ([1] * 7, 2, [([30, 31, 32, 33], 0.9, None), ([30, 31], 0.1, None), ([32], NAN, None)]),
    2**40: ([8, 8], 1, [([40], 1, None), ([41, 42, 43, 44, 45], 0, [0, 0, 0, 0, 0])]),
}
PLAN = [[3, 0, 2**40], [1, 2]]
FINER = [[3], [0, 2**40], [1, 2]]
"""Of the first column: it has a shard more than the base."""

Entries = list[tuple[int, float]]
"""Feature and activation, ascending."""

FEW: dict[int, list[Entries]] = {
    0: [[(5, 0.1), (77, 2.5), (2**14 - 1, 1e-45)], []],
    1: [[(0, 3.0)], []],
    2: [[(4, 1e30)]],
    3: [[(4, 7.0)], [(1, 0.25), (2, 0.5)], [(100, 0.75)]],
    2**40: [[(100, 0.625), (101, 0.5), (102, 0.375)], []],
}
EVERY: dict[int, list[Entries]] = {
    0: [[(0, 0.5), (1, -0.25), (2, 0.125), (3, 1.0), (4, 2.0), (5, 4.0)], [(3, 0.3)]],
    1: [[], []],
    2: [[]],
    3: [[], [], [(0, 1.0)]],
    2**40: [[(5, 0.7)], []],
}
OF_PROMPTS: dict[int, list[Entries]] = {
    0: [[(7, 1.5)]], 1: [[]], 2: [[]], 3: [[(0, 0.5), (1, 0.5), (16383, 2.0)]], 2**40: [[(9, 0.5)]],
}  # fmt: skip

SAE = {"weights": "5a" * 32, "config": {"architecture": "jumprelu", "note": "größer, 大, naïve"}}
SPECS: list[Spec] = [
    {"kind": "features", "hookpoint": "model.layers.0", "sae": SAE, "d_sae": 2**14, "top_k": 3, "pooling": "mean"},
    {"kind": "features", "hookpoint": "model.layers.1", "sae": SAE, "d_sae": 6, "top_k": "all", "pooling": "mean"},
    {"kind": "prompt_features", "hookpoint": "model.layers.0", "sae": SAE, "d_sae": 2**14, "top_k": 3,
     "pooling": "mean"},
    {"kind": "top_logits", "m": 2, "vocab_size": VOCAB},
    {"kind": "hidden_gram"},
    {"kind": "mismatched", "vocab_size": VOCAB},
]  # fmt: skip


def groups_of(ids: list[int]) -> Groups:
    """The groups with these ids. The log-prob of a token follows from its place: eighths, and one 0.1."""
    rows = [DATA[group] for group in ids]
    completions = [completion for _, _, several in rows for completion in several]
    segments = [segment for prompt, _, several in rows for segment in (prompt, *(tokens for tokens, _, _ in several))]
    splits = np.cumsum([0, *map(len, segments)]).astype(np.uint64)
    n_completions = np.array([len(several) for _, _, several in rows], np.uint32)
    input_ids = np.array([token for segment in segments for token in segment], np.uint32)
    starts = scored_splits(splits, n_completions)
    scored = np.diff(starts)
    counts = [said if said is not None else [1] * n for (_, _, said), n in zip(completions, scored, strict=True)]
    mask = np.array([said for several in counts for said in several], np.uint8)
    logps = [-(i + 1 + tokens[0] % 4) / 8 if tokens != [20, 21] else -0.1 for (tokens, _, _), n in
             zip(completions, scored, strict=True) for i in range(n)]  # fmt: skip
    token_logps = np.array(logps, np.float32)
    return Groups(
        group_id=np.array(ids, np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(input_ids, splits, n_completions, mask),
        input_ids=input_ids,
        splits=splits,
        score=np.array([score for _, score, _ in completions], np.float32),
        weight=np.array([weight for _, weight, _ in rows], np.float32),
        ref_logps=summed_logps(token_logps, starts, mask),
        token_logps=token_logps,
        score_mask=mask,
    )


def column_of(n: int, ids: list[int]) -> Column:
    """The rows of column n for these groups."""
    groups = groups_of(ids)
    if n == 3:
        logps = groups.token_logps
        indices = np.arange(2 * len(logps), dtype=np.uint32).reshape(-1, 2) * 7 % VOCAB
        both = np.stack([logps / 2, logps / 4 - 0.1], axis=1).astype(np.float32)
        return TopLogits(groups.scored_splits.astype(np.uint64), indices, both)
    if n == 4:
        sums = [np.array([[i + 0.5, group % 5 - 2, 0.1] for i in range(len(DATA[group][2]))]) for group in ids]
        products = np.concatenate([(rows @ rows.T).ravel() for rows in sums]).astype(np.float32)
        lengths = groups.n_completions.astype(np.int64) ** 2
        return HiddenGram(starts_of(lengths).astype(np.uint64), products)
    if n == 5:
        tokens = [[group % VOCAB, 1, 2][: index % 4] for index, group in enumerate(ids)]
        return Mismatched(
            starts_of([len(row) for row in tokens]).astype(np.uint64),
            np.array([token for row in tokens for token in row], np.uint32),
            np.array([1 - (place == 1) for row in tokens for place in range(len(row))], np.uint8),
            np.array([-0.25 * (index % 4) - 0.1 for index in range(len(ids))], np.float32),
        )
    kept = [entries for group in ids for entries in (FEW, EVERY, OF_PROMPTS)[n][group]]
    lengths = np.array([len(entries) for entries in kept])
    # Where as many are kept as may be, as many again were cut off.
    cut = np.full(len(kept), False) if SPECS[n]["top_k"] == "all" else lengths == SPECS[n]["top_k"]
    return (PromptFeatures if n == 2 else Features)(
        splits=starts_of(lengths).astype(np.uint64),
        indices=np.array([index for entries in kept for index, _ in entries], np.uint32),
        acts=np.array([act for entries in kept for _, act in entries], np.float32),
        active=np.where(cut, 2 * lengths, lengths).astype(np.uint32),
        tail_sq=np.where(cut, 0.015625, 0).astype(np.float32),
    )


def digest_of(groups: Groups) -> str:
    return shard_digest(groups.group_id, groups.n_completions, groups.completion_digest, groups.score, groups.weight)


RECIPE: dict[str, Any] = {
    "format": 1,
    "scorer": {"vocab_size": VOCAB, "weights": "00" * 32, "note": "größer, 大, naïve"},
    "groups": {
        "digest": groups_digest(digest_of(groups_of(ids)) for ids in PLAN),
        "n_groups": len(DATA),
        "n_completions": sum(len(completions) for _, _, completions in DATA.values()),
        "score_mask": True,
        "seed": 17,
        "shard_groups": [len(ids) for ids in PLAN],
    },
}


def plan_of(n: int) -> list[list[int]]:
    return FINER if n == 0 else PLAN


def listed(rows: Groups | Column) -> dict[str, Any]:
    """Arrays as lists, by their names; a float32 as the shortest number that is exactly it in float64."""
    fields = [field.name for field in dataclasses.fields(rows) if field.name != "columns"]
    return {name: getattr(rows, name).tolist() for name in fields}


def main(folder: Path) -> None:
    store, key = Store(folder), cache_key(RECIPE)
    # Otherwise the marks in the records would be other bytes each time.
    (folder / ".state").mkdir(parents=True)
    (folder / ".state/secret").write_bytes(bytes(32))
    base = CacheWriter(store, RECIPE, [np.array(ids, np.uint64) for ids in PLAN])
    for sid in base.missing():
        base.write(sid, groups_of(PLAN[sid]), {"device": "none", "seconds": 0.5})
    base.seal({"self_check": [], "split": "golden"})
    columns = []
    for n, spec in enumerate(SPECS):
        plan = plan_of(n)
        recipe = column_recipe(key, spec, [len(ids) for ids in plan])
        writer = CacheWriter(store, recipe, [np.array(ids, np.uint64) for ids in plan])
        for sid in writer.missing():
            groups = groups_of(plan[sid])
            rows = ColumnRows(groups.group_id, len(groups.completion_digest), column_of(n, plan[sid]))
            writer.write(sid, rows, {"device": "none"})
        writer.seal({"self_check": []})
        shards = [{"group_id": ids, **listed(column_of(n, ids))} for ids in plan]
        columns.append({"key": writer.key, "spec": spec, "shards": shards})
    expected = {
        "key": key,
        "digest": open_cache(store, key).digest,
        "shards": [listed(groups_of(ids)) for ids in PLAN],
        "columns": columns,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
