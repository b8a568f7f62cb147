"""
What atheris (libFuzzer) feeds: python store_fuzz_target.py TARGET CORPUS [libFuzzer options], where TARGET is shard,
members (of a base), column, column_members, manifest or recipe.

A find is any exception but the refusal, accepted bytes of a file whose values differ from what was written, and
accepted members whose values cannot be written again. `members` puts the fuzzer's bytes behind a valid zip, so that it
need not guess CRC-32s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fpo.store"]):
    from fpo.canonical import canonical_json, checked_json, parse_checked_json
    from fpo.store.format.archive import pack, unpack
    from fpo.store.format.encoding import Rows, decode_shard, encode_shard
    from fpo.store.format.invariants import BaseBounds, Bounds, Invalid
    from fpo.store.format.key import cache_key
    from fpo.store.format.manifest import manifest_bytes, parse_manifest, parse_recipe, recipe_facts

from store_cases import FEATURES, KEY, PLAN, VOCAB, World, column_bounds, column_rows, digest_of, make_groups, same

from fpo.canonical import sha256_hex
from fpo.errors import CacheError


class Target:
    """The bytes of a shard, whole or by members, against what was written."""

    def __init__(self, rows: Rows, bounds: Bounds) -> None:
        self.rows, self.bounds = rows, bounds
        self.data = encode_shard(rows, KEY, 3, bounds)
        self.parts = {name: bytes(member) for name, member in unpack(self.data).items()}
        self.names = sorted(self.parts)

    def whole(self, data: bytes) -> None:
        try:
            found = decode_shard(data, KEY, 3, self.bounds)
        except Invalid:
            return
        assert same(found, self.rows), "other values were accepted"

    def members(self, data: bytes) -> None:
        """The first byte picks a member, the rest replaces it: one whole chunk in the place of another may pass."""
        if not data:
            return
        try:
            found = decode_shard(
                pack(self.parts | {self.names[data[0] % len(self.names)]: data[1:]}), KEY, 3, self.bounds
            )
        except Invalid:
            return
        assert same(decode_shard(encode_shard(found, KEY, 3, self.bounds), KEY, 3, self.bounds), found)

    def member_seeds(self) -> list[bytes]:
        return [bytes([n]) + self.parts[name] for n, name in enumerate(self.names)]


GROUPS = make_groups([(2, (3, 1)), (0, (1, 2, 2))], score_mask=True)
BASE = Target(GROUPS, BaseBounds(VOCAB, score_mask=True))
COLUMN = Target(column_rows(FEATURES, GROUPS), column_bounds(FEATURES))
WORLD = World(Path("/nowhere"))
RECIPE = WORLD.recipe
FACTS = recipe_facts(RECIPE)


def manifest(data: bytes) -> None:
    """As it is, and once more under a checksum that fits."""
    for candidate in (data, _checked(data)):
        try:
            parsed = parse_manifest(candidate, cache_key(RECIPE), FACTS, "manifest.json")
        except CacheError:
            continue
        assert manifest_bytes(parsed) == candidate, "another spelling was accepted"


def _checked(data: bytes) -> bytes:
    try:
        body = json.loads(data)
        body.pop("check", None)
        return checked_json(body)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def recipe(data: bytes) -> None:
    """A stranger names the folder: the key always fits."""
    try:
        parsed = parse_recipe(data, sha256_hex(data), "recipe.json")
    except CacheError:
        return
    assert canonical_json(parsed) == data, "another spelling was accepted"
    assert recipe_facts(parsed).bounds


def manifest_seed() -> bytes:
    entries = [
        {
            "n_completions": len(WORLD.shard(n).completion_digest),
            "n_groups": len(ids),
            "n_tokens": 9,
            "rows_digest": digest_of(WORLD.shard(n)),
            "sha256": "0" * 64,
            "shard": n,
            "size": 9,
        }
        for n, ids in enumerate(PLAN)
    ]
    totals = {"n_completions": 10, "n_groups": 5, "n_tokens": 27}
    seed = checked_json({"facts": {}, "format": 1, "key": cache_key(RECIPE), "shards": entries} | totals)
    assert parse_checked_json(seed)
    assert parse_manifest(seed, cache_key(RECIPE), FACTS, "manifest.json")
    return seed


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "shard": (BASE.whole, lambda: [BASE.data]),
    "members": (BASE.members, BASE.member_seeds),
    "column": (COLUMN.whole, lambda: [COLUMN.data]),
    "column_members": (COLUMN.members, COLUMN.member_seeds),
    "manifest": (manifest, lambda: [manifest_seed()]),
    "recipe": (recipe, lambda: [canonical_json(RECIPE), canonical_json(WORLD.column_recipe(0))]),
}


def main() -> None:
    target, corpus, *options = sys.argv[1:]
    run, seeds = TARGETS[target]
    for number, seed in enumerate(seeds()):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], corpus, *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
