"""Big caches of cheap pairs: random tokens, log-probs and features, right in every invariant, nothing scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fpo.store import CacheWriter, Features, Pairs, pair_digests, pairs_digest, shard_digest

D_SAE, TOP_K, VOCAB = 1024, 4, 5000
SHARD_PAIRS = 2048


def cheap_pairs(ids: np.ndarray, seed: int) -> Pairs:
    """A prompt of 8 tokens, completions of 1 to 12, four features each."""
    rng = np.random.default_rng(seed)
    P = len(ids)
    lengths = rng.integers(1, 13, (P, 3))
    lengths[:, 0] = 8
    splits = np.concatenate([[0], np.cumsum(lengths.ravel())]).astype(np.uint64)
    input_ids = rng.integers(0, VOCAB, int(splits[-1]), dtype=np.uint32)
    scored = lengths[:, 1:].ravel()
    token_logps = -rng.random(int(scored.sum()), dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(scored)[:-1]])
    first = rng.integers(0, D_SAE - TOP_K, 2 * P, dtype=np.uint32)
    return Pairs(
        pair_id=ids.astype(np.uint64),
        pair_digest=pair_digests(input_ids, splits),
        input_ids=input_ids,
        splits=splits,
        ref_logps=np.add.reduceat(token_logps, starts, dtype=np.float64).reshape(P, 2).astype(np.float32),
        token_logps=token_logps,
        features=(
            Features(
                indices=(first[:, None] + np.arange(TOP_K, dtype=np.uint32)).ravel(),
                acts=rng.random(2 * P * TOP_K, dtype=np.float32),
                splits=(np.arange(2 * P + 1) * TOP_K).astype(np.uint64),
                active=np.full((P, 2), TOP_K, np.uint32),
                tail_sq=np.zeros((P, 2), np.float32),
            ),
        ),
    )


def write_cheap_cache(folder: Path, n_pairs: int) -> str:
    """A sealed cache of so many pairs; its key."""
    plan = np.split(np.arange(n_pairs), range(SHARD_PAIRS, n_pairs, SHARD_PAIRS))
    digests = [shard_digest(ids, cheap_pairs(ids, sid).pair_digest) for sid, ids in enumerate(plan)]
    recipe = {
        "format": 1,
        "scorer": {"vocab_size": VOCAB, "features": [{"d_sae": D_SAE, "top_k": TOP_K}]},
        "pairs": {
            "digest": pairs_digest(digests),
            "n_pairs": n_pairs,
            "seed": 0,
            "shard_pairs": [len(ids) for ids in plan],
        },
    }
    writer = CacheWriter(folder, recipe, plan)
    for sid in writer.missing():
        writer.write(sid, cheap_pairs(plan[sid], sid), {})
    writer.seal({})
    return writer.key
