"""
Token ids that all processes of a store share: one of them tokenises, the others wait for it and map what it wrote, and
so does whoever starts later. They save time and decide nothing: deleting them is always safe, and what is damaged or
cannot be written is not used.

    STORE/.state/tokens/QUESTION/input_ids, ...   a file per array of `TokenisedGroups`, its bytes and nothing else
                                 tokens.json      what was asked, the sha256 of each array, the drops; written last
                        .QUESTION.HEX             the same while it is being written
                        .QUESTION.claim           locked by who writes it, see `store.claims`
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpo.canonical import canonical_json, checked_json, parse_checked_json, sha256_hex
from fpo.errors import CacheError
from fpo.progress import is_first_rank, say
from fpo.stage1_cache.drops import DropReport
from fpo.stage1_cache.tokenise import ARRAYS, TokenisedGroups, mapped
from fpo.store import Claims, Store
from fpo.store.files import Folder, make_durable_dirs, refuse_links
from fpo.store.local import TOKENS, TOKENS_JSON

_MAX_JSON_BYTES = 2**20
_PAUSE_SECONDS = 0.2
"""Between two looks at what another process makes."""

Make = Callable[[Path | None, Callable[[], None] | None], TokenisedGroups]
"""Tokenises into a folder (None: into memory), and calls the second argument now and then: it is at work."""


class SharedTokens:
    """What one question about data and tokenizer is answered with, see `get`."""

    def __init__(self, store: Store, asked: Callable[[], dict[str, Any]]) -> None:
        """asked: gives what decides the tokens, in JSON types without floats; asked again when they are there."""
        self._asked, self._question = asked, asked()
        name = sha256_hex(canonical_json(self._question))
        self._store = store
        self._place = Folder(store.root / TOKENS, store.root)
        self._folder = self._place.inside(name)
        self._claims = Claims(self._place)

    def get(self, make: Make) -> TokenisedGroups:
        """The tokens, from whoever made them first; by `make` where nobody has. Raises what `make` raises."""
        try:
            refuse_links(self._place.root, self._store.root)
            make_durable_dirs(self._place.root, like=self._store.root)
        except (CacheError, OSError):
            return make(None, None)
        told = False
        while (found := self._mapped()) is None:
            claim = self._claims.claim(f".{self._folder.root.name}.claim")
            if claim is not None:
                break
            if not told and is_first_rank():
                say("another process is tokenising the same data; waiting for it ...")
            told = True
            time.sleep(_PAUSE_SECONDS)
        else:
            return found
        try:
            # Looked at again under the claim: its last holder may have written them just before.
            found = self._mapped()
            return self._made(make, claim.renew) if found is None else found
        finally:
            claim.end()

    def forget(self) -> None:
        """Drop what is shared: it turned out wrong."""
        with contextlib.suppress(CacheError):
            self._place.delete(self._folder.root.name)

    def _mapped(self) -> TokenisedGroups | None:
        """What is there, if it is whole and answers this question; every byte is read once."""
        try:
            said = parse_checked_json(self._folder.read(TOKENS_JSON, _MAX_JSON_BYTES))
            if canonical_json(said["asked"]) != canonical_json(self._question):
                return None
            if said["sha256"] != _digests(self._folder.root):
                return None
            arrays = {name: mapped(self._folder.root, name) for name in said["sha256"]}
            with contextlib.suppress(OSError):  # another user's: then their use is told by their own alone
                os.utime(self._folder.root / TOKENS_JSON)
            return TokenisedGroups.of(arrays, DropReport.from_dict(said["drops"]))
        except (CacheError, OSError, ValueError, KeyError, TypeError):
            return None

    def _made(self, make: Make, renew: Callable[[], None]) -> TokenisedGroups:
        work = self._place.root / f".{self._folder.root.name}.{secrets.token_hex(8)}"

        def show_life() -> None:
            renew()
            with contextlib.suppress(OSError):
                os.utime(work)

        try:
            work.mkdir()
            tokens = make(work, show_life)
            if self._asked() == self._question:
                self._publish(work, tokens)
            return tokens  # mapped: it stays readable where its files go
        except OSError:  # a disk that is full or may not be written is no reason to fail
            return make(None, renew)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _publish(self, work: Path, tokens: TokenisedGroups) -> None:
        said = {"asked": self._question, "sha256": _digests(work), "drops": tokens.drops.as_dict()}
        (work / TOKENS_JSON).write_bytes(checked_json(said))
        self.forget()  # what stands there is damaged, or this process would have mapped it
        with contextlib.suppress(OSError):  # without locks somebody else may have been faster
            work.rename(self._folder.root)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each array that is there. Raises OSError."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in ARRAYS:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with os.fdopen(descriptor, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
