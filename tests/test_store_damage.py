import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from store_cases import LENGTHS, PLAN, World, make_pairs, make_recipe, tree
from store_forgery import forge

from fpo.canonical import canonical_json, checked_json, parse_checked_json
from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.store import CacheWriter, Store, default_store, export_trl, open_cache, pair_digests, shard_digest, verify
from fpo.store.format.encoding import encode_shard
from fpo.store.format.pairs import gather


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("pristine"))
    world.fill()
    return world


@pytest.fixture
def cache(pristine, tmp_path):
    """The folder of a whole cache that a test may damage."""
    key = pristine.store.keys()[0]
    return shutil.copytree(pristine.store.path(key), tmp_path / key)


def train_from(folder):
    """What training does with a cache."""
    cache = open_cache(folder.parent, folder.name)
    for sid in range(len(cache.shard_pairs)):
        cache.shard(sid)


def problems(folder):
    return "\n".join(verify(folder.parent, folder.name).problems)


def assert_refused(folder, name, reading=True):
    """verify names the file; reading it for training raises and names it too."""
    assert name in problems(folder)
    if reading:
        with pytest.raises((CacheDamaged, CacheMissing), match=re.escape(name)) as caught:
            train_from(folder)
        assert "\n" not in str(caught.value)


READ = (
    "recipe.json",
    "manifest.json",
    "shards/000000.zarr.zip",
    "shards/000001.zarr.zip",
    "shards/000002.zarr.zip",
)
RECORDS = ("records/000000.json", "records/000001.json", "records/000002.json")


@pytest.mark.parametrize("name", [*READ, *RECORDS])
def test_flipped_bytes_are_refused_by_name(cache, name):
    file = cache / name
    data = file.read_bytes()
    step = 7 if len(data) < 2000 else 97
    for position in [*range(0, len(data), step), len(data) - 1]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        found = problems(cache)
        assert name in found, position
    assert_refused(cache, name, reading=name in READ)


@pytest.mark.parametrize("name", [*READ, *RECORDS])
@pytest.mark.parametrize("cut", ["missing", "empty", "half", "one byte less", "junk behind", "a link"])
def test_files_cut_or_replaced_are_refused_by_name(cache, name, cut):
    file = cache / name
    data = file.read_bytes()
    if cut in ("missing", "a link"):
        file.rename(cache.parent / "elsewhere")
        if cut == "a link":
            file.symlink_to(cache.parent / "elsewhere")
    else:
        new = {
            "empty": b"",
            "half": data[: len(data) // 2],
            "one byte less": data[:-1],
            "junk behind": data + b"x",
        }
        file.write_bytes(new[cut])
    if (name, cut) == ("recipe.json", "missing"):
        with pytest.raises(CacheMissing, match=cache.name[:12]):
            train_from(cache)
    elif (name, cut) == ("manifest.json", "missing"):
        assert name in problems(cache)
        with pytest.raises(CacheError, match="is not complete: 3 of 3 shards are done"):
            train_from(cache)
    else:
        assert_refused(cache, name, reading=name in READ)


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def test_swapped_shards_are_refused_by_name(cache):
    swap(cache / "shards/000000.zarr.zip", cache / "shards/000001.zarr.zip")
    assert_refused(cache, "shards/000000.zarr.zip")
    assert "shards/000001.zarr.zip" in problems(cache)


def test_swapped_records_are_refused_by_name(cache):
    swap(cache / "records/000000.json", cache / "records/000001.json")
    assert "records/000000.json is the record of shard 1" in problems(cache)


def test_a_valid_shard_of_another_cache_is_refused_even_under_a_forged_manifest(cache, tmp_path):
    """Same pairs, another seed: every checksum is made to fit, the key inside the shard does not."""
    pairs = make_pairs(LENGTHS)
    recipe = make_recipe(pairs, PLAN)
    recipe["pairs"]["seed"] = 8
    writer = CacheWriter(Store(tmp_path / "other"), recipe, PLAN)
    writer.write(0, pairs.take(PLAN[0]), {})
    other = writer.folder.root
    shutil.copy(other / "shards/000000.zarr.zip", cache / "shards/000000.zarr.zip")
    stale = parse_checked_json((other / "records/000000.json").read_bytes())
    body = parse_checked_json((cache / "manifest.json").read_bytes())
    body["shards"][0] |= {"size": stale["size"], "sha256": stale["sha256"]}
    (cache / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(
        CacheDamaged, match=r"000000\.zarr\.zip is damaged: zarr\.json inside it is not that of shard 0"
    ):
        train_from(cache)
    assert "records/000000.json does not say what manifest.json says" in problems(cache)


def with_swapped_labels(world):
    """Shard 1 says that the rejected completions are the chosen ones; all else about it is in order."""
    shard = world.shard(1)
    rejected_first = gather(shard.splits, (3 * np.arange(len(shard))[:, None] + [0, 2, 1]).ravel())
    ids, splits = shard.input_ids[rejected_first[0]], rejected_first[1]
    lengths = shard.lengths[:, [0, 2, 1]]
    made = make_pairs(lengths, ids=shard.pair_id, seed=1)
    return dataclasses.replace(made, input_ids=ids, splits=splits, pair_digest=pair_digests(ids, splits))


@pytest.mark.parametrize("forged", ["shard", "ids", "shard and manifest", "ids and manifest"])
def test_a_cache_of_your_key_with_other_pairs_is_refused_by_every_reader(cache, pristine, tmp_path, forged):
    """The key fixes tokens, labels and ids: a stranger can put other numbers under it, but no other pairs."""
    shard = pristine.shard(1)
    if "ids" in forged:
        pairs = dataclasses.replace(shard, pair_id=shard.pair_id + np.uint64(7))
    else:
        pairs = with_swapped_labels(pristine)
    data = encode_shard(pairs, cache.name, 1, pristine.bounds)
    claims = {"pairs_digest": shard_digest(pairs.pair_id, pairs.pair_digest)} if "manifest" in forged else {}
    forge(cache, data, 1, **claims)
    assert "other pairs than the key stands for" in problems(cache)
    if "manifest" in forged:
        with pytest.raises(CacheDamaged, match=r"manifest\.json lists other pairs than the key stands for"):
            open_cache(cache.parent, cache.name)
        return
    readers = [
        lambda: train_from(cache),
        lambda: export_trl(open_cache(cache.parent, cache.name), tmp_path / "exported"),
    ]
    for read in readers:
        with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip holds other pairs than the key stands for"):
            read()


def test_a_manifest_that_does_not_say_which_pairs_its_shards_hold_is_refused(cache):
    """As they were written before the key said it."""
    body = parse_checked_json((cache / "manifest.json").read_bytes())
    for entry in body["shards"]:
        del entry["pairs_digest"]
    (cache / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=r"shards\.0\.pairs_digest: Field required; .*fpo cache") as caught:
        open_cache(cache.parent, cache.name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shards/000003.zarr.zip", "shards/x", "records/000003.json", "evil.sh"])
def test_files_that_do_not_belong_are_named_by_verify(cache, name):
    (cache / name).write_bytes(b"")
    assert problems(cache) == f"{cache / name} does not belong to this cache"


def test_leftovers_of_a_killed_writer_are_no_damage(cache):
    (cache / "tmp/000000.zarr.zip.0123").write_bytes(b"half")
    assert problems(cache) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_pairs": 6}, "n_pairs is 6, its shards add up to 5"),
        ({"format": 2}, "format: Input should be 1"),
        ({"key": "cd" * 32}, "is the manifest of cache cdcdcdcdcdcd"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"shards": []}, "add up to 0"),
    ],
)
def test_an_edited_manifest_is_refused_even_with_a_fresh_checksum(cache, change, message):
    body = parse_checked_json((cache / "manifest.json").read_bytes()) | change
    (cache / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=message):
        open_cache(cache.parent, cache.name)


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"shard": 1}),
        (0, {"size": "12"}),
        (1, {"shard": 0}),
        (0, {"sha256": "../../etc/passwd"}),
        (0, {"name": "x"}),
    ],
)
def test_edited_manifest_entries_are_refused(cache, number, change):
    body = parse_checked_json((cache / "manifest.json").read_bytes())
    body["shards"][number] |= change
    (cache / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=r"manifest\.json is damaged"):
        open_cache(cache.parent, cache.name)


@pytest.mark.parametrize("data", [b"[" * 10**5, b"9" * 10**5, b"\xff\xfe", b"null", b'{"check": 1}', b"NaN"])
def test_hostile_json_is_refused(cache, data):
    (cache / "manifest.json").write_bytes(data)
    with pytest.raises(CacheDamaged, match=r"manifest\.json is damaged"):
        open_cache(cache.parent, cache.name)


def test_a_cache_of_a_future_format_says_what_to_do(cache, pristine, tmp_path):
    import hashlib

    data = canonical_json(pristine.recipe | {"format": 2})
    future = tmp_path / hashlib.sha256(data).hexdigest()
    future.mkdir()
    (future / "recipe.json").write_bytes(data)
    with pytest.raises(CacheError, match="has format 2, this version of fpo reads 1; use the version that wrote it"):
        open_cache(tmp_path, future.name)


def test_a_pair_in_two_shards_is_found(tmp_path):
    """The writer refuses such a plan, so it is changed behind its back."""
    world = World(tmp_path)
    writer = world.writer()
    writer.plan[2] = world.plan[0][:1].astype("uint64")
    for sid in range(3):
        writer.write(sid, world.pairs.take(writer.plan[sid].astype(int)), {})
    assert "a pair stands in two shards" in problems(world.store.path(writer.key))


def test_verify_reads_on_behind_the_first_problem(cache):
    os.unlink(cache / "shards/000000.zarr.zip")
    os.unlink(cache / "records/000002.json")
    (cache / "shards/000001.zarr.zip").write_bytes(b"x")
    report = verify(cache.parent, cache.name)
    assert (len(report.problems), report.shards, report.pairs, report.ok) == (3, 1, 1, False)


def test_verify_reports_its_progress(cache):
    seen = []
    verify(cache.parent, cache.name, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_key_may_be_abbreviated_to_a_unique_prefix(tmp_path):
    store = Store(tmp_path)
    for first in ("a1", "a2", "b0"):
        (tmp_path / (first * 32)).mkdir()
        (tmp_path / (first * 32) / "recipe.json").write_bytes(b"{}")
    assert store.keys() == ["a1" * 32, "a2" * 32, "b0" * 32]
    assert store.resolve("b") == "b0" * 32
    assert store.resolve("a1" * 32) == "a1" * 32
    with pytest.raises(CacheMissing, match="a is the start of 2 keys") as caught:
        store.resolve("a")
    assert "a1a1" in str(caught.value)
    assert "b0b0" not in str(caught.value)
    for name in ("", "c", "../", "a1" * 32 + "/recipe.json"):
        with pytest.raises(CacheMissing, match="it holds"):
            store.resolve(name)
    with pytest.raises(ValueError, match="64 hex digits"):
        store.path("../" * 21 + "x")


def test_other_folders_in_a_store_are_no_caches(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / ("ab" * 32)).mkdir()
    (tmp_path / ("cd" * 32)).write_text("a file")
    assert Store(tmp_path).keys() == []
    assert Store(tmp_path / "nowhere").keys() == []


def test_summaries_say_how_far_each_cache_is(tmp_path):
    world = World(tmp_path)
    writer = world.writer()
    writer.write(1, world.shard(1), {})
    (started,) = world.store.summaries()
    assert (started.complete, started.shards_done, started.shards_total, started.n_pairs) == (False, 1, 3, 5)
    assert started.n_bytes == os.path.getsize(writer.folder.root / "shards/000001.zarr.zip")
    world.fill()
    (done,) = world.store.summaries()
    assert (done.complete, done.shards_done, done.problem) == (True, 3, None)
    assert done.n_bytes == sum(len(b) for n, b in tree(writer.folder.root).items() if n.startswith("shards/"))
    assert done.recipe == world.recipe


def test_a_damaged_cache_does_not_hide_the_others(cache):
    (cache / "recipe.json").write_bytes(b"{}")
    (summary,) = Store(cache.parent).summaries()
    assert "recipe.json" in (summary.problem or "")
    assert not summary.complete


def test_the_store_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FPO_STORE", str(tmp_path / "s"))
    assert default_store() == tmp_path / "s"
    monkeypatch.delenv("FPO_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store() == tmp_path / ".cache/fpo"


def test_the_output_address_is_the_checksum_of_the_manifest(cache):
    import hashlib

    data = (cache / "manifest.json").read_bytes()
    assert open_cache(cache.parent, cache.name).digest == hashlib.sha256(data).hexdigest()
    body = json.loads(data)
    del body["check"]
    spelled = json.dumps(body, sort_keys=True, indent=1) + "\n"
    assert json.loads(data)["check"] == hashlib.sha256(spelled.encode()).hexdigest()
