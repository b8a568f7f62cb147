"""Big caches of cheap groups: random tokens, log-probs and features, right in every invariant, nothing scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from store_cases import digest_of

from fpo.store import CacheWriter
from fpo.store.beside import column_recipe
from fpo.store.format.columns import Features, Spec
from fpo.store.format.encoding import ColumnRows
from fpo.store.format.groups import Groups
from fpo.store.format.key import completion_digests, groups_digest

D_SAE, TOP_K, VOCAB = 1024, 4, 5000
SHARD_GROUPS = 2048


def cheap_groups(ids: np.ndarray, seed: int) -> Groups:
    """A prompt of 8 tokens, two completions of 1 to 12."""
    rng = np.random.default_rng(seed)
    G = len(ids)
    lengths = rng.integers(1, 13, (G, 3))
    lengths[:, 0] = 8
    splits = np.concatenate([[0], np.cumsum(lengths.ravel())]).astype(np.uint64)
    input_ids = rng.integers(0, VOCAB, int(splits[-1]), dtype=np.uint32)
    scored = lengths[:, 1:].ravel()
    token_logps = -rng.random(int(scored.sum()), dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(scored)[:-1]])
    n_completions = np.full(G, 2, np.uint32)
    return Groups(
        group_id=ids.astype(np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(input_ids, splits, n_completions),
        input_ids=input_ids,
        splits=splits,
        score=np.full(2 * G, np.nan, np.float32),
        weight=np.ones(G, np.float32),
        ref_logps=np.add.reduceat(token_logps, starts, dtype=np.float64).astype(np.float32),
        token_logps=token_logps,
    )


def cheap_features(ids: np.ndarray, seed: int) -> ColumnRows:
    """Four features of each of two completions."""
    rng = np.random.default_rng(seed)
    K = 2 * len(ids)
    first = rng.integers(0, D_SAE - TOP_K, K, dtype=np.uint32)
    features = Features(
        splits=(np.arange(K + 1) * TOP_K).astype(np.uint64),
        indices=(first[:, None] + np.arange(TOP_K, dtype=np.uint32)).ravel(),
        acts=rng.random(K * TOP_K, dtype=np.float32),
        active=np.full(K, TOP_K, np.uint32),
        tail_sq=np.zeros(K, np.float32),
    )
    return ColumnRows(ids.astype(np.uint64), K, features)


def cheap_spec(layer: int) -> Spec:
    return {"kind": "features", "hookpoint": f"model.layers.{layer}", "d_sae": D_SAE, "top_k": TOP_K}


def write_cheap_cache(folder: Path, n_groups: int, n_columns: int = 1) -> str:
    """A sealed cache of so many groups with so many columns of features; its key."""
    plan = np.split(np.arange(n_groups), range(SHARD_GROUPS, n_groups, SHARD_GROUPS))
    sizes = [len(ids) for ids in plan]
    recipe = {
        "format": 1,
        "scorer": {"vocab_size": VOCAB},
        "groups": {
            "digest": groups_digest(digest_of(cheap_groups(ids, sid)) for sid, ids in enumerate(plan)),
            "n_groups": n_groups,
            "n_completions": 2 * n_groups,
            "score_mask": False,
            "seed": 0,
            "shard_groups": sizes,
        },
    }
    base = CacheWriter(folder, recipe, plan)
    for sid in base.missing():
        base.write(sid, cheap_groups(plan[sid], sid), {})
    base.seal({})
    for layer in range(n_columns):
        column = CacheWriter(folder, column_recipe(base.key, cheap_spec(layer), sizes), plan)
        for sid in column.missing():
            column.write(sid, cheap_features(plan[sid], sid), {})
        column.seal({})
    return base.key
