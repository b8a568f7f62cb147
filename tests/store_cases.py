"""Small pairs, plans and caches for the tests of the store: everything made here, nothing read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fpo.canonical import checked_json, parse_checked_json
from fpo.store import (
    CacheWriter,
    Features,
    Pairs,
    Store,
    TopLogits,
    pair_digests,
    pairs_digest,
    scored_lengths,
    shard_digest,
)
from fpo.store.format.manifest import recipe_facts
from fpo.store.format.pairs import starts_of

VOCAB = 100
HOOKPOINTS: tuple[tuple[int, int | str], ...] = ((50, 4), (9, "all"))
KEY = "ab" * 32


def make_pairs(
    lengths: Any,
    ids: Any = None,
    seed: int = 0,
    hookpoints: tuple[tuple[int, int | str], ...] = HOOKPOINTS,
    top_logits: int = 2,
) -> Pairs:
    """Random pairs of these (prompt, chosen, rejected) token counts for which every invariant holds."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, dtype=np.int64).reshape(-1, 3)
    P = len(lengths)
    input_ids = rng.integers(0, VOCAB, lengths.sum()).astype(np.uint32)
    splits = starts_of(lengths.ravel()).astype(np.uint64)
    scored = starts_of(scored_lengths(lengths).ravel())
    C = int(scored[-1])
    token_logps = -rng.gamma(1, 2, C).astype(np.float32)
    sums = [token_logps[a:b].sum(dtype=np.float64) for a, b in itertools.pairwise(scored)]
    top = TopLogits(
        rng.integers(0, VOCAB, (C, top_logits)).astype(np.uint32),
        -rng.random((C, top_logits), dtype=np.float32),
    )
    return Pairs(
        pair_id=np.asarray(range(P) if ids is None else ids, dtype=np.uint64),
        pair_digest=pair_digests(input_ids, splits),
        input_ids=input_ids,
        splits=splits,
        ref_logps=np.array(sums, dtype=np.float32).reshape(P, 2),
        token_logps=token_logps,
        features=tuple(_features(rng, P, d_sae, top_k) for d_sae, top_k in hookpoints),
        top_logits=top if top_logits else None,
    )


def _features(rng: np.random.Generator, P: int, d_sae: int, top_k: int | str) -> Features:
    kept = rng.integers(0, (d_sae if top_k == "all" else int(top_k)) + 1, 2 * P)
    chosen = [np.sort(rng.choice(d_sae, n, replace=False)) for n in kept]
    indices = np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.uint32)
    return Features(
        indices=indices,
        acts=rng.random(len(indices), dtype=np.float32),
        splits=starts_of(kept).astype(np.uint64),
        active=kept.reshape(P, 2).astype(np.uint32),
        tail_sq=np.zeros((P, 2), np.float32),
    )


def make_recipe(
    pairs: Pairs, plan: list[np.ndarray], hookpoints: Any = HOOKPOINTS, top_logits: int = 2
) -> dict[str, Any]:
    """`pairs` in dataset order."""
    features = [
        {"d_sae": d_sae, "top_k": top_k, "hookpoint": f"model.layers.{n}"}
        for n, (d_sae, top_k) in enumerate(hookpoints)
    ]
    return {
        "format": 1,
        "scorer": {"vocab_size": VOCAB, "features": features, "extras": {"top_logits": top_logits}},
        "pairs": {
            "digest": pairs_digest(shard_digest(ids, pairs.pair_digest[rows_of(pairs, ids)]) for ids in plan),
            "n_pairs": len(pairs),
            "seed": 7,
            "shard_pairs": [len(ids) for ids in plan],
        },
    }


def rows_of(pairs: Pairs, ids: np.ndarray) -> np.ndarray:
    """Where the pairs with these ids stand."""
    return np.argsort(pairs.pair_id)[np.searchsorted(np.sort(pairs.pair_id), ids)]


LENGTHS = [(2, 3, 1), (0, 1, 2), (4, 2, 2), (1, 1, 1), (3, 5, 4)]
PLAN = [np.array([3, 0]), np.array([4, 1]), np.array([2])]


class World:
    """Five pairs in three shards, and a store to put them in."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.pairs = make_pairs(LENGTHS)
        self.plan = PLAN
        self.recipe = make_recipe(self.pairs, self.plan)
        self.bounds = recipe_facts(self.recipe).bounds

    def shard(self, sid: int) -> Pairs:
        return self.pairs.take(self.plan[sid])

    def writer(self) -> CacheWriter:
        return CacheWriter(self.store, self.recipe, self.plan)

    def fill(self) -> CacheWriter:
        """Write what is missing, in order, and seal."""
        writer = self.writer()
        for sid in writer.missing():
            writer.write(sid, self.shard(sid), {"device": "cpu", "seconds": 0.5})
        writer.seal({"self_check": {"fvu": "0.12"}})
        return writer


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a reader may see, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unmarked(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the marks in the records, which only their own store can make."""

    def without_mark(data: bytes) -> bytes:
        body = parse_checked_json(data)
        body["provenance"].pop("mark", None)
        return checked_json(body)

    return {name: without_mark(data) if name.startswith("records/") else data for name, data in files.items()}


def same(a: Pairs, b: Pairs) -> bool:
    """Equal arrays, dtypes and shapes."""

    def arrays(pairs: Pairs) -> list[np.ndarray]:
        top = () if pairs.top_logits is None else (pairs.top_logits.indices, pairs.top_logits.logps)
        rows = [getattr(pairs, n) for n in ("pair_id", "pair_digest", "input_ids", "splits")]
        parts = [getattr(f, n) for f in pairs.features for n in Features.__dataclass_fields__]
        return [*rows, pairs.ref_logps, pairs.token_logps, *parts, *top]

    left, right = arrays(a), arrays(b)
    return len(left) == len(right) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y) for x, y in zip(left, right, strict=True)
    )


# Empty prompts, one-token completions and no pairs at all are inside; so are completions of no token.
ragged_lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(1, 6)), max_size=6)
