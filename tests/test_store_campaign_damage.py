"""
Every kind of damage, of a base and of a column, tried and counted: reading and `verify` refuse it and name the file.

A damage is (file that must be named, what to write where). The quick tests try a sample of each kind, the campaign all.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
from store_cases import Part, World, make_recipe, same
from store_forgery import cache_of, forge, members_of, problems, shard_file

from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheError, CacheMissing
from fpo.store import Store, open_cache
from fpo.store.format.archive import pack
from fpo.store.format.encoding import decode_shard
from fpo.store.format.invariants import Invalid
from fpo.store.format.manifest import recipe_facts

SHARDS = [f"shards/{sid:06d}.zarr.zip" for sid in range(3)]
RECORDS = [f"records/{sid:06d}.json" for sid in range(3)]
FILES = ["recipe.json", "manifest.json", *SHARDS, *RECORDS]
SAMPLE = 15

COLUMN = 1
"""Of the world's columns the one that has the base's three shards."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("pristine"))
    world.fill()
    return world


@pytest.fixture(params=[None, COLUMN], ids=["base", "column"])
def part(request, world):
    return Part(world, request.param)


def copied(part, folder):
    """A copy of the whole cache; the folder of the base or column in it."""
    cache = shutil.copytree(part.world.path, folder / part.world.key)
    return cache / part.path.relative_to(part.world.path)


def train(folder):
    """What training does: all shards with the columns that it asks for; how many."""
    cache = cache_of(folder)
    opened = open_cache(cache.parent, cache.name, columns=World(cache.parent).specs)
    return sum(1 for sid in range(len(opened.shard_groups)) if len(opened.shard(sid)))


def refused(folder, name, damaged):
    """Nothing is trained, and whoever asks is told the file; records are verify's business alone."""
    # By a recipe that is not the key's, nothing else can be judged.
    name = "recipe.json" if "recipe.json" in damaged else name
    is_column = folder != cache_of(folder)
    unfinished = is_column and not (folder / "manifest.json").exists()
    if not unfinished and not any(name in problem for problem in problems(folder)):
        return False
    if set(damaged) <= set(RECORDS):
        return True
    # A manifest that lies about a shard accuses the shard: which of the two is wrong, nobody can tell.
    accused = [*damaged, *(SHARDS if "manifest.json" in damaged else [])]
    try:
        train(folder)
    except CacheMissing as error:
        # A column of which recipe or manifest cannot be read is not there.
        return not is_column or "has no column of top 2 logits" in str(error)
    except CacheError as error:
        return any(file in str(error) for file in accused) or "is not complete" in str(error)
    return False


def regions(data):
    """Name -> (start, end) of every part of a shard's zip: each member's header, name and bytes, directory, end."""
    found, offset = {}, 0
    while data[offset : offset + 4] == b"PK\x03\x04":
        size, length = int.from_bytes(data[offset + 22 : offset + 26], "little"), data[offset + 26]
        name, body = data[offset + 30 : offset + 30 + length].decode(), offset + 30 + length
        found |= {f"{name} header": (offset, body), f"{name} bytes": (body, body + size)}
        offset = body + size
    found["directory"] = (offset, len(data) - 22)
    found["end"] = (len(data) - 22, len(data))
    assert sum(end - start for start, end in found.values()) == len(data)
    return found


def with_flip(data, position, bit):
    flipped = bytearray(data)
    flipped[position] ^= 1 << bit
    return bytes(flipped)


def flips(pristine):
    for name in FILES:
        data = (pristine / name).read_bytes()
        for position in range(len(data)):
            yield name, {name: with_flip(data, position, position % 8)}


def region_flips(pristine):
    """At least the first, a middle and the last byte of each region of each shard."""
    for name in SHARDS:
        data = (pristine / name).read_bytes()
        for start, end in regions(data).values():
            for position in sorted({start, (start + end) // 2, end - 1}):
                yield name, {name: with_flip(data, position, 7 - position % 8)}


def cuts(pristine):
    for name in FILES:
        data = (pristine / name).read_bytes()
        edges = [end for _, end in regions(data).values()] if name in SHARDS else range(0, len(data), 7)
        for size in sorted({0, 1, len(data) // 2, len(data) - 1, *edges} - {len(data)}):
            yield name, {name: data[:size]}
        for tail in (b"\0", b"\n", b" ", data, b"PK\x05\x06" + bytes(18)):
            yield name, {name: data + tail}
        yield name, {name: bytes(len(data))}
        yield name, {name: data[len(data) // 2 :] + data[: len(data) // 2]}


def missing(pristine):
    for name in FILES:
        yield name, {name: None}


def swaps(pristine):
    for names in (SHARDS, RECORDS, ["recipe.json", "manifest.json"], [SHARDS[0], RECORDS[0]]):
        for a, b in itertools.permutations(names, 2):
            yield a, {a: (pristine / b).read_bytes(), b: (pristine / a).read_bytes()}
            yield a, {a: (pristine / b).read_bytes()}


def extra(pristine):
    names = [
        "evil.sh", ".hidden", "recipe.json.bak", "000000.zarr.zip", "shards/000003.zarr.zip", "shards/0.zarr.zip",
        "shards/000000.zarr.zip~", "shards/zarr.json", "records/000003.json", "records/00000.json", "records/0.JSON",
    ]  # fmt: skip
    for name in names:
        yield name, {name: (pristine / SHARDS[0]).read_bytes()}


def stale(pristine):
    """Whole files of caches that differ in one thing, put in one, two, or all of a kind."""
    for change in ("seed", "bits", "plan"):
        other = _other(pristine, change)
        for sid in range(3):
            shard, record = SHARDS[sid], RECORDS[sid]
            yield shard, {shard: (other / shard).read_bytes()}
            yield shard, {shard: (other / shard).read_bytes(), record: (other / record).read_bytes()}
            yield record, {record: (other / record).read_bytes()}
        yield "manifest.json", {"manifest.json": (other / "manifest.json").read_bytes()}
        if (other / "recipe.json").read_bytes() != (pristine / "recipe.json").read_bytes():
            yield "recipe.json", {"recipe.json": (other / "recipe.json").read_bytes()}


def _other(pristine, change):
    """The same base or column of a cache with another seed, of another device's low bits, or of another plan."""
    cache = cache_of(pristine)
    other = World(cache.parent.parent / f"other-{change}")
    part = Part(other, None if cache == pristine else COLUMN)
    if change == "bits":
        for array in (other.groups.ref_logps, other.groups.columns[COLUMN].logps):
            array[:] = np.nextafter(array, np.float32(-9))
    if change == "plan":
        other.plan = [other.plan[1], other.plan[0], other.plan[2]]
        other.recipe = make_recipe(other.groups, other.plan)
    other.recipe["groups"]["seed"] += change == "seed"
    return part.fill().folder.root


def edits(pristine):
    """Each value of manifest and records changed, with a checksum that fits; what is free (facts, provenance) aside."""
    for name in ("manifest.json", *RECORDS):
        body = parse_checked_json((pristine / name).read_bytes())
        for path, value in _leaves({k: v for k, v in body.items() if k not in ("facts", "provenance")}):
            for new in _other_values(value):
                changed = json.loads(json.dumps(body))
                inner = changed
                for step in path[:-1]:
                    inner = inner[step]
                inner[path[-1]] = new
                yield name, {name: checked_json(changed)}


def _leaves(node, path=()):
    if isinstance(node, (dict, list)):
        for step, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(inner, (*path, step))
    else:
        yield path, node


def _other_values(value):
    if isinstance(value, int):
        return [value + 1, -1, 2**60, str(value), float(value), True, None, [value]]
    return ["f" * len(value), value.upper() + "0", "", 7, None, "../../etc/passwd", {"a": 1}]


def torn_json(pristine):
    """Duplicate, missing and added names, other spellings of the same facts, a second document behind."""
    for name in ("manifest.json", *RECORDS, "recipe.json"):
        data = (pristine / name).read_bytes()
        body = json.loads(data)
        first = data.index(b'"')
        yield name, {name: data[:first] + b'"key": "' + b"0" * 64 + b'", ' + data[first:]}
        yield name, {name: data[:first] + b'"surprise": 1, ' + data[first:]}
        yield name, {name: json.dumps(body).encode()}
        yield name, {name: json.dumps(body, indent=2, sort_keys=True).encode() + b"\n"}
        yield name, {name: data.replace(b"\n", b"\r\n") if b"\n" in data else data + b"\r\n"}
        yield name, {name: b"\xef\xbb\xbf" + data}
        yield name, {name: data.decode().encode("utf-16")}
        yield name, {name: data + data}
        for field in body:
            yield name, {name: json.dumps({k: v for k, v in body.items() if k != field}).encode()}
    manifest = parse_checked_json((pristine / "manifest.json").read_bytes())
    for shards in ([0, 0, 1, 2], [0, 1], [1, 0, 2], [0, 1, 2, 2], []):
        changed = manifest | {"shards": [manifest["shards"][sid] for sid in shards]}
        changed |= {
            total: sum(s[total] for s in changed["shards"]) for total in ("n_groups", "n_completions", "n_tokens")
        }
        yield "manifest.json", {"manifest.json": checked_json(changed)}


KINDS = [flips, region_flips, cuts, missing, swaps, extra, stale, edits, torn_json]


def tried_and_caught(kind, pristine, folder, every):
    tried, slipped = 0, []
    for number, (name, files) in enumerate(kind(pristine)):
        if number % every:
            continue
        for file, data in files.items():
            (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
        tried += 1
        if not found_out(folder, name, files):
            slipped.append((number, name, list(files)))
        for file in files:
            original = pristine / file
            shutil.copyfile(original, folder / file) if original.exists() else (folder / file).unlink()
    return tried, slipped


def found_out(folder, name, damaged):
    """A cache without its recipe is none at all: it has no name to open it by."""
    if folder == cache_of(folder) and not (folder / "recipe.json").exists():
        return Store(folder.parent).keys() == []
    if name not in FILES:
        return problems(folder) == [f"{folder / name} does not belong to this cache"]
    return refused(folder, name, damaged)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_sample_of_every_damage_is_refused_by_name(part, tmp_path, kind):
    folder = copied(part, tmp_path)
    every = max(sum(1 for _ in kind(part.path)) // SAMPLE, 1)
    tried, slipped = tried_and_caught(kind, part.path, folder, every)
    assert slipped == []
    assert tried > 0
    assert problems(folder) == []
    assert train(folder) == 3


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_damage_is_refused_by_name(part, tmp_path, kind):
    folder = copied(part, tmp_path)
    every = 5 if kind is flips else 1
    tried, slipped = tried_and_caught(kind, part.path, folder, every)
    print(f"damage {kind.__name__}: tried {tried}, caught {tried - len(slipped)}")
    assert slipped == []


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.campaign)])
def test_flips_under_forged_checksums_never_change_a_value(part, every):
    """
    File checksum and zip made to fit again: metadata, frames and invariants alone must catch it. A few bits inside the
    blocks of a zstd frame mean nothing; with them flipped, the shard reads as before.
    """
    bounds, key = recipe_facts(part.recipe).bounds, part.path.name
    data = shard_file(part.path).read_bytes()
    whole = decode_shard(data, key, 0, bounds)
    tried = harmless = 0
    for name, member in members_of(data).items():
        for position, bit in itertools.islice(itertools.product(range(len(member)), range(8)), 0, None, every):
            forged = pack(members_of(data) | {name: with_flip(member, position, bit)})
            tried += 1
            try:
                found = decode_shard(forged, key, 0, bounds)
            except Invalid:
                continue
            assert same(found, whole), (name, position, bit)
            harmless += 1
    print(f"flips under forged checksums: tried {tried}, refused {tried - harmless}, without effect {harmless}")
    assert harmless <= tried / 200


@pytest.mark.parametrize("claim", [{"n_tokens": 11}, {"n_groups": 3}, {"n_completions": 4}], ids=str)
def test_a_forged_shard_that_decodes_but_lies_about_its_size_is_named(part, tmp_path, claim):
    folder = copied(part, tmp_path)
    forge(folder, shard_file(folder).read_bytes(), **claim)
    assert refused(folder, "manifest.json" if "n_groups" in claim else SHARDS[0], ["manifest.json"])
