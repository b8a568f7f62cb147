"""
What atheris (libFuzzer) feeds: python store_fuzz_target.py shard|members|manifest|recipe CORPUS [libFuzzer options]

A find is any exception but the refusal, and any accepted bytes whose values differ from what was written. `members`
puts the fuzzer's bytes behind a valid zip, so that it need not guess CRC-32s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fpo.store"]):
    from fpo.canonical import canonical_json, checked_json, parse_checked_json
    from fpo.store.format.archive import pack, unpack
    from fpo.store.format.encoding import decode_shard, encode_shard
    from fpo.store.format.invariants import Invalid
    from fpo.store.format.key import cache_key, shard_digest
    from fpo.store.format.manifest import manifest_bytes, parse_manifest, parse_recipe, recipe_facts

from store_cases import KEY, PLAN, World, make_pairs, same

from fpo.canonical import sha256_hex
from fpo.errors import CacheError
from fpo.store.format.invariants import Bounds

BOUNDS = Bounds(100, ((50, 4), (9, None)), 2)
PAIRS = make_pairs([(2, 3, 1), (0, 1, 2)])
SHARD = encode_shard(PAIRS, KEY, 3, BOUNDS)
MEMBERS = {name: bytes(data) for name, data in unpack(SHARD).items()}
NAMES = sorted(MEMBERS)
WORLD = World(Path("/nowhere"))
RECIPE = WORLD.recipe
FACTS = recipe_facts(RECIPE)


def shard(data: bytes) -> None:
    try:
        found = decode_shard(data, KEY, 3, BOUNDS)
    except Invalid:
        return
    assert same(found, PAIRS), "other values were accepted"


def members(data: bytes) -> None:
    """The first byte picks a member, the rest replaces it."""
    if data:
        shard(pack(MEMBERS | {NAMES[data[0] % len(NAMES)]: data[1:]}))


def manifest(data: bytes) -> None:
    """As it is, and once more under a checksum that fits."""
    for candidate in (data, _checked(data)):
        try:
            parsed = parse_manifest(candidate, cache_key(RECIPE), FACTS, "manifest.json")
        except CacheError:
            continue
        assert manifest_bytes(parsed) == candidate, "another spelling was accepted"


def _checked(data: bytes) -> bytes:
    import json

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


def seeds(target: str) -> list[bytes]:
    if target == "shard":
        return [SHARD]
    if target == "members":
        return [bytes([n]) + MEMBERS[name] for n, name in enumerate(NAMES)]
    if target == "recipe":
        return [canonical_json(RECIPE)]
    entries = [
        {
            "n_pairs": len(ids),
            "n_tokens": 9,
            "pairs_digest": shard_digest(ids, WORLD.shard(n).pair_digest),
            "sha256": "0" * 64,
            "shard": n,
            "size": 9,
        }
        for n, ids in enumerate(PLAN)
    ]
    body = {"facts": {}, "format": 1, "key": cache_key(RECIPE), "n_pairs": 5, "n_tokens": 27, "shards": entries}
    assert parse_checked_json(checked_json(body))
    return [checked_json(body)]


def main() -> None:
    target, corpus, *options = sys.argv[1:]
    for number, seed in enumerate(seeds(target)):
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    run: Callable[[bytes], None] = {"shard": shard, "members": members, "manifest": manifest, "recipe": recipe}[target]
    atheris.Setup([sys.argv[0], corpus, *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
