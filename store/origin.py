"""
Which shards were computed in this store. Their records carry a mark, an HMAC over what they say of the shard with
the store's secret: who fetches a cache from elsewhere, unpacks it or finishes what somebody else began gets records
without it. Rows are copied into other caches from marked shards alone (see `reuse`), so that what a stranger calls the
reference's numbers stays where it was put.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

from fpo.canonical import canonical_json
from fpo.errors import CacheError
from fpo.store.files import Folder
from fpo.store.format.manifest import MAX_RECORD_BYTES, ShardEntry, parse_record, record_name
from fpo.store.local import STATE, Store

MARK = "mark"
"""Where the mark stands in a record's provenance."""
_SECRET = "secret"
_SECRET_BYTES = 32


class Origin:
    """Makes and knows the marks of one store."""

    def __init__(self, store: Store, make_secret: bool = False) -> None:
        """
        make_secret: for a writer.
        Never fails: where there is no secret nothing is marked, and nothing counts as computed here.
        """
        self._secret = _secret(store, make_secret)

    def mark(self, key: str, entry: ShardEntry) -> dict[str, str]:
        """What the record of a shard that is computed here says in its provenance."""
        return {} if self._secret is None else {MARK: _mark(self._secret, key, entry)}

    def computed_here(self, folder: Folder, key: str, entries: Sequence[ShardEntry]) -> list[bool]:
        """Of each of these shards, whether its record says that it was computed in this store."""
        return [self._is_marked(folder, key, entry) for entry in entries]

    def _is_marked(self, folder: Folder, key: str, entry: ShardEntry) -> bool:
        if self._secret is None:
            return False
        name = record_name(entry.shard)
        try:
            record = parse_record(folder.read(name, MAX_RECORD_BYTES), key, entry.shard, folder.where(name))
        except CacheError:
            return False
        found: Any = record.provenance.get(MARK)
        expected = _mark(self._secret, key, entry)
        return isinstance(found, str) and hmac.compare_digest(found.encode("utf-8", "replace"), expected.encode())


def _mark(secret: bytes, key: str, entry: ShardEntry) -> str:
    facts = canonical_json([key, entry.model_dump(include=set(ShardEntry.model_fields))])
    return hmac.new(secret, facts, hashlib.sha256).hexdigest()


def _secret(store: Store, make: bool) -> bytes | None:
    """The store's own, which never leaves it. Whoever may write here may make marks."""
    folder = Folder(store.root / STATE, store.root)
    try:
        if make and _SECRET not in folder.names():
            folder.prepare()
            folder.create(_SECRET, secrets.token_bytes(_SECRET_BYTES))
        secret = folder.read(_SECRET, _SECRET_BYTES)
    except CacheError:
        return None
    return secret if len(secret) == _SECRET_BYTES else None
