"""
Names of caches and of what they were made from: the cache key, digests of pairs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.canonical import canonical_json
from fpo.store.format.pairs import U8, U32, U64, lengths_of

FORMAT_VERSION = 1
"""Of the cache format. Part of every key: a cache of another version is another cache."""


def cache_key(recipe: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of {"format", "scorer", "pairs"}: 64 hex digits."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()


def pair_digests(input_ids: U32, splits: U64) -> U8:
    """
    Digest of each pair's token ids: (T,), (3P+1,) -> (P, 16).

    The first 16 bytes of sha256 over the three token counts (uint64) and the ids (uint32), little-endian.
    """
    ids = memoryview(input_ids.astype("<u4", copy=False).tobytes())
    counts = memoryview(lengths_of(splits).astype("<u8").tobytes())
    bounds = (4 * np.asarray(splits[::3], dtype=np.int64)).tolist()
    digests = bytearray()
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        digest = hashlib.sha256(counts[24 * row : 24 * row + 24])
        digest.update(ids[start:end])
        digests += digest.digest()[:16]
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)


def shard_digest(pair_id: NDArray[np.integer[Any]], digests: U8) -> str:
    """
    What a shard holds, in its order: (P,) ids and (P, 16) digests of its pairs -> 64 hex digits.

    sha256 over the ids (uint64, little-endian), then the digests: who the pairs are, their tokens, and which of
    the two completions is the chosen one.
    """
    return hashlib.sha256(pair_id.astype("<u8").tobytes() + digests.tobytes()).hexdigest()


def pairs_digest(shards: Iterable[str]) -> str:
    """
    The digests of all shards in their order -> the digest of a cache's pairs, 64 hex digits: sha256 over their bytes.

    It is part of the key, so the key says of every shard what it holds; no score is needed to know it.
    """
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in shards)).hexdigest()
