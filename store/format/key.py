"""
Names of caches and of what they were made from: keys, digests of completions and of shards.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.canonical import canonical_json
from fpo.store.format.groups import scored_splits
from fpo.store.format.ragged import F32, U8, U32, U64, lengths_of

_KEY = re.compile(r"[0-9a-f]{64}")

FORMAT_VERSION = 1
"""Of the cache format. Part of every key: a cache of another version is another cache."""


def is_key(name: str) -> bool:
    """Whether this is spelled as a full key: 64 hex digits, lower case."""
    return _KEY.fullmatch(name) is not None


def cache_key(recipe: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a recipe.json, of a cache or of a column: 64 hex digits."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()


def completion_digests(
    input_ids: U32, splits: U64, n_completions: NDArray[np.integer[Any]], score_mask: U8 | None = None
) -> U8:
    """
    Digest of each completion with its prompt: (T,), (G+K+1,), (G,), (C,) -> (K, 16).

    The first 16 bytes of sha256 over the prompt's token count (uint64) and ids (uint32), the completion's count and
    ids, all little-endian, and, where a token of it does not count, its part of the mask (a byte per scored token).
    """
    ids = memoryview(np.ascontiguousarray(input_ids, dtype="<u4").tobytes())
    counts = memoryview(lengths_of(splits).astype("<u8").tobytes())
    ends = (4 * np.asarray(splits, dtype=np.int64)).tolist()
    masks = _masks(splits, n_completions, score_mask)
    digests = bytearray()
    segment = 0
    for n in n_completions.tolist():
        prompt = hashlib.sha256(counts[8 * segment : 8 * segment + 8])
        prompt.update(ids[ends[segment] : ends[segment + 1]])
        for at in range(segment + 1, segment + 1 + n):
            digest = prompt.copy()
            digest.update(counts[8 * at : 8 * at + 8])
            digest.update(ids[ends[at] : ends[at + 1]])
            if masks:
                digest.update(masks[len(digests) // 16])
            digests += digest.digest()[:16]
        segment += n + 1
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)


def _masks(splits: U64, n_completions: NDArray[np.integer[Any]], score_mask: U8 | None) -> list[bytes]:
    """Each completion's part of the mask, empty where all of it counts; [] without a mask."""
    if score_mask is None:
        return []
    bounds = scored_splits(splits, n_completions).tolist()
    parts = [score_mask[start:end] for start, end in itertools.pairwise(bounds)]
    return [b"" if part.all() else part.tobytes() for part in parts]


def shard_digest(
    group_id: NDArray[np.integer[Any]],
    n_completions: NDArray[np.integer[Any]],
    completion_digest: U8,
    score: F32,
    weight: F32,
) -> str:
    """
    What a shard holds, in its order: (G,), (G,), (K, 16), (K,), (G,) -> 64 hex digits.

    sha256 over ids (uint64), counts (uint32), digests, scores (float32) and weights (float32), little-endian: who the
    groups are, their tokens, which completion is preferred, and what the data says of them. No log-prob is in it.
    """
    digest = hashlib.sha256(group_id.astype("<u8").tobytes())
    digest.update(n_completions.astype("<u4").tobytes())
    digest.update(completion_digest.tobytes())
    digest.update(score.astype("<f4").tobytes())
    digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()


def groups_digest(shards: Iterable[str]) -> str:
    """
    The digests of all shards in their order -> the digest of a cache's groups, 64 hex digits: sha256 over their bytes.

    It is part of the key, so the key says of every shard what it holds; no log-prob is needed to know it.
    """
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in shards)).hexdigest()
