"""
Names of caches and of what they were made from: canonical JSON, the cache key, digests of pairs;
and the JSON that carries its own checksum.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.pairs import U8, U32, U64, lengths_of

FORMAT_VERSION = 1
"""Of the cache format. Part of every key: a cache of another version is another cache."""


def canonical_json(obj: Any) -> bytes:
    """
    The one way to write these facts: sorted keys, no whitespace, UTF-8.

    Only dict (string keys), list, tuple, str, int, bool and None. Raises TypeError for anything else: a
    float has several spellings, so a fact that is not whole is given as a string.
    """
    _refuse_ambiguous(obj, "$")
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


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


def checked_json(body: dict[str, Any]) -> bytes:
    """A JSON object for people and machines, with the sha256 of the rest of it under "check"."""
    return _spelled({**body, "check": hashlib.sha256(_spelled(body)).hexdigest()})


def parse_json(data: bytes, most_values: int) -> Any:
    """
    A stranger's JSON. Raises ValueError for what is none, and for more than `most_values` values in it: counted
    before anything is built of them, since an empty list of two bytes becomes an object of sixty.
    """
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"it holds more than {most_values} values")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_checked_json(data: bytes, most_values: int = 2**20) -> dict[str, Any]:
    """What `checked_json` was given. Raises ValueError for any other bytes, and above `most_values`."""
    body = parse_json(data, most_values)
    if not isinstance(body, dict) or "check" not in body:
        raise ValueError("it is no JSON object with a checksum")
    check = body.pop("check")
    if check != hashlib.sha256(_spelled(body)).hexdigest() or data != checked_json(body):
        raise ValueError("its checksum does not fit its contents")
    return body


def _spelled(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _refuse_ambiguous(obj: Any, where: str) -> None:
    if isinstance(obj, dict):
        for name, value in obj.items():
            if not isinstance(name, str):
                raise TypeError(f"canonical JSON: a key at {where} is {name!r}, keys are strings")
            _refuse_ambiguous(value, f"{where}.{name}")
    elif isinstance(obj, (list, tuple)):
        for n, value in enumerate(obj):
            _refuse_ambiguous(value, f"{where}[{n}]")
    # type(), not isinstance: numpy's float64 is a float, an IntEnum is an int.
    elif type(obj) not in (str, int, bool, type(None)):
        raise TypeError(f"canonical JSON: {where} is {obj!r}, a {type(obj).__name__}; give a string or an int")
