"""Every kind of damage is refused by name, in the base of a cache and in a column of it."""

import dataclasses
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
from store_cases import FEATURES, TOP_LOGITS, Part, World, column_bounds, digest_of, make_groups, tree
from store_forgery import cache_of, forge

from fpo.canonical import canonical_json, checked_json, parse_checked_json
from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.store import Store, default_store, open_cache, verify
from fpo.store.files import Folder
from fpo.store.format.encoding import encode_shard
from fpo.store.format.key import completion_digests
from fpo.store.format.ragged import gather
from fpo.store.sealed import Sealed

BASE, COLUMN = None, 1
"""The column has the base's three shards; the one before it is cut finer."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("pristine"))
    world.fill()
    return world


@pytest.fixture
def cache(pristine, tmp_path):
    """The folder of a whole cache that a test may damage."""
    return shutil.copytree(pristine.path, tmp_path / pristine.key)


def folder_of(cache, pristine, part):
    """The base's or the column's."""
    return cache / Part(pristine, part).path.relative_to(pristine.path)


@pytest.fixture(params=[BASE, COLUMN], ids=["base", "column"])
def folder(request, cache, pristine):
    """What is damaged: the base, or the column beside it."""
    return folder_of(cache, pristine, request.param)


def train_from(folder):
    """What training does with a cache and its columns."""
    cache = cache_of(folder)
    opened = open_cache(cache.parent, cache.name, columns=(FEATURES, TOP_LOGITS))
    for sid in range(len(opened.shard_groups)):
        opened.shard(sid)


def problems(folder):
    cache = cache_of(folder)
    return "\n".join(verify(cache.parent, cache.name).problems)


def opened(folder):
    """Read as what it is: a cache, or a column whose recipe is believed."""
    return Sealed(Folder(folder, cache_of(folder).parent), folder.name)


def is_base(folder):
    return cache_of(folder) == folder


def assert_refused(folder, name, reading=True):
    """verify names the file; reading it for training raises and names it too, or says that there is no such column."""
    assert name in problems(folder)
    if reading:
        named = is_base(folder) or name != "recipe.json"
        match = re.escape(name) if named else "has no column of top 2 logits"
        with pytest.raises((CacheDamaged, CacheMissing), match=match) as caught:
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
def test_flipped_bytes_are_refused_by_name(folder, name):
    file = folder / name
    data = file.read_bytes()
    step = 29 if len(data) < 2000 else 397
    for position in [*range(0, len(data), step), len(data) - 1]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        found = problems(folder)
        assert name in found, position
    assert_refused(folder, name, reading=name in READ)


@pytest.mark.parametrize("name", [*READ, *RECORDS])
@pytest.mark.parametrize("cut", ["missing", "empty", "half", "one byte less", "junk behind", "a link"])
def test_files_cut_or_replaced_are_refused_by_name(folder, name, cut, tmp_path):
    file = folder / name
    data = file.read_bytes()
    if cut in ("missing", "a link"):
        file.rename(tmp_path / "elsewhere")
        if cut == "a link":
            file.symlink_to(tmp_path / "elsewhere")
    else:
        new = {
            "empty": b"",
            "half": data[: len(data) // 2],
            "one byte less": data[:-1],
            "junk behind": data + b"x",
        }
        file.write_bytes(new[cut])
    if cut == "missing" and name == "manifest.json" and not is_base(folder):
        # A column that is being written: nobody reads it, and nothing of it is damaged.
        assert problems(folder) == ""
        with pytest.raises(CacheMissing, match="has no column of top 2 logits"):
            train_from(folder)
    elif cut == "missing" and name == "manifest.json":
        assert name in problems(folder)
        with pytest.raises(CacheError, match="is not complete: 3 of 3 shards are done"):
            train_from(folder)
    elif cut == "missing" and name == "recipe.json" and is_base(folder):
        with pytest.raises(CacheMissing, match=folder.name[:12]):
            train_from(folder)
    else:
        assert_refused(folder, name, reading=name in READ)


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def test_swapped_shards_are_refused_by_name(folder):
    swap(folder / "shards/000000.zarr.zip", folder / "shards/000001.zarr.zip")
    assert_refused(folder, "shards/000000.zarr.zip")
    assert "shards/000001.zarr.zip" in problems(folder)


def test_swapped_records_are_refused_by_name(folder):
    swap(folder / "records/000000.json", folder / "records/000001.json")
    assert "records/000000.json is the record of shard 1" in problems(folder)


def test_swapped_columns_are_refused_by_name(cache, pristine):
    """Both are right in themselves, and lie beside the base that they name; only their folders are exchanged."""
    first, second = (folder_of(cache, pristine, part) for part in (0, COLUMN))
    first.rename(cache / "aside")
    second.rename(first)
    (cache / "aside").rename(second)
    assert problems(cache).count("recipe.json has the sha256") == 2
    with pytest.raises(CacheMissing, match="has no column of features"):
        train_from(cache)


def test_a_column_of_another_base_is_refused_by_name(cache, pristine, tmp_path):
    """Sealed and right, but of a cache with another seed."""
    other = World(tmp_path / "other")
    other.recipe["groups"]["seed"] = 8
    other.fill_column(COLUMN)
    shutil.copytree(other.column_path(COLUMN), cache / "columns" / other.column_key(COLUMN))
    assert f"{other.column_key(COLUMN)}/recipe.json is no column of cache {pristine.key[:12]}" in problems(cache)
    train_from(cache)  # those that belong to it still serve


def test_a_valid_shard_of_another_cache_is_refused_even_under_a_forged_manifest(folder, pristine, tmp_path):
    """Same groups, another seed: every checksum is made to fit, the key inside the shard does not."""
    other = World(tmp_path / "other")
    other.recipe["groups"]["seed"] = 8
    part = Part(other, BASE if is_base(folder) else COLUMN)
    part.writer().write(0, part.rows(0), {})
    forge(folder, (part.path / "shards/000000.zarr.zip").read_bytes())
    with pytest.raises(
        CacheDamaged, match=r"000000\.zarr\.zip is damaged: zarr\.json inside it is not that of shard 0"
    ):
        train_from(folder)
    shutil.copy(part.path / "records/000000.json", folder / "records/000000.json")
    assert "records/000000.json is the record of shard 0 of cache" in problems(folder)


def with_swapped_labels(world):
    """Shard 1, two groups of two, says that the rejected completions are the preferred ones; all else is in order."""
    shard = world.shard(1)
    rows, splits = gather(shard.splits, np.array([0, 2, 1, 3, 5, 4]))
    tokens = shard.input_ids[rows]
    made = make_groups([(3, (4, 5)), (0, (2, 1))], ids=shard.group_id)
    digests = completion_digests(tokens, splits, made.n_completions)
    return dataclasses.replace(made, input_ids=tokens, splits=splits, completion_digest=digests)


OTHERS = {
    "swapped labels": with_swapped_labels,
    "other ids": lambda world: dataclasses.replace(world.shard(1), group_id=world.shard(1).group_id + np.uint64(7)),
    "other scores": lambda world: dataclasses.replace(world.shard(1), score=np.zeros(4, np.float32)),
    "other weights": lambda world: dataclasses.replace(world.shard(1), weight=np.full(2, 9, np.float32)),
}


@pytest.mark.parametrize("claimed", [False, True], ids=["shard", "shard and manifest"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_cache_of_your_key_with_other_groups_is_refused(cache, pristine, other, claimed):
    """The key fixes tokens, labels and ids: a stranger can put other numbers under it, but no other groups."""
    groups = other(pristine)
    forge(
        cache,
        encode_shard(groups, cache.name, 1, pristine.bounds),
        1,
        **({"rows_digest": digest_of(groups)} if claimed else {}),
    )
    assert "other groups than the key stands for" in problems(cache)
    name = r"manifest\.json lists" if claimed else r"000001\.zarr\.zip holds"
    with pytest.raises(CacheDamaged, match=f"{name} other groups than the key stands for"):
        train_from(cache)


@pytest.mark.parametrize("claimed", [False, True], ids=["shard", "shard and manifest"])
def test_a_column_with_the_rows_of_other_groups_is_refused(cache, pristine, claimed):
    """Every checksum of the column fits; the base says whose rows belong there."""
    folder = folder_of(cache, pristine, COLUMN)
    rows = pristine.column_shard(COLUMN, 1)
    other = dataclasses.replace(rows, group_id=rows.group_id[::-1].copy())
    claims = {"rows_digest": hashlib.sha256(other.group_id.tobytes()).hexdigest()} if claimed else {}
    forge(folder, encode_shard(other, folder.name, 1, column_bounds(TOP_LOGITS)), 1, **claims)
    said = "it holds other groups than the base" if claimed else "holds other groups than the key stands for"
    assert said in problems(cache)
    with pytest.raises(CacheDamaged, match=said):
        train_from(cache)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([4, 5, 0, 1], "its splits are not those of the scored"), ([5, 4, 1], "it has 3 rows, the groups ask for 4")],
    ids=["another completion has them", "of three completions"],
)  # fmt: skip
def test_a_column_whose_entries_are_not_the_bases_is_refused(cache, pristine, lengths, said):
    """Group 4 has 5 and 4 scored tokens, group 1 none and 1: nine and one in all."""
    folder = folder_of(cache, pristine, COLUMN)
    rows = pristine.column_shard(COLUMN, 1)
    splits = np.cumsum([0, *lengths]).astype(np.uint64)
    forged = dataclasses.replace(
        rows, n_completions=len(lengths), column=dataclasses.replace(rows.column, splits=splits)
    )
    data = encode_shard(forged, folder.name, 1, column_bounds(TOP_LOGITS))
    forge(folder, data, 1, n_completions=len(lengths))
    with pytest.raises(CacheDamaged, match=said):
        train_from(cache)
    assert said in problems(cache)


def test_a_manifest_that_does_not_say_whose_rows_its_shards_hold_is_refused(cache):
    body = parse_checked_json((cache / "manifest.json").read_bytes())
    for entry in body["shards"]:
        del entry["rows_digest"]
    (cache / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=r"shards\.0\.rows_digest: Field required; .*fpo cache") as caught:
        open_cache(cache.parent, cache.name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shards/000003.zarr.zip", "shards/x", "records/000003.json", "evil.sh"])
def test_files_that_do_not_belong_are_named_by_verify(folder, name):
    (folder / name).write_bytes(b"")
    assert problems(folder) == f"{folder / name} does not belong to this cache"


def test_a_file_among_the_columns_does_not_belong(cache):
    (cache / "columns/notes").write_bytes(b"")
    assert problems(cache) == f"{cache / 'columns/notes'} does not belong to this cache"


def test_leftovers_of_a_killed_writer_are_no_damage(folder):
    (folder / "tmp/000000.zarr.zip.0123").write_bytes(b"half")
    assert problems(folder) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 6}, "n_groups is 6, its shards add up to 5"),
        ({"n_completions": 9}, "n_completions is 9, its shards add up to 10"),
        ({"format": 2}, "format: Input should be 1"),
        ({"key": "cd" * 32}, "is the manifest of cache cdcdcdcdcdcd"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"shards": []}, "add up to 0"),
    ],
)
def test_an_edited_manifest_is_refused_even_with_a_fresh_checksum(folder, change, message):
    body = parse_checked_json((folder / "manifest.json").read_bytes()) | change
    (folder / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=message):
        opened(folder)


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
def test_edited_manifest_entries_are_refused(folder, number, change):
    body = parse_checked_json((folder / "manifest.json").read_bytes())
    body["shards"][number] |= change
    (folder / "manifest.json").write_bytes(checked_json(body))
    with pytest.raises(CacheDamaged, match=r"manifest\.json is damaged"):
        opened(folder)


@pytest.mark.parametrize("data", [b"[" * 10**5, b"9" * 10**5, b"\xff\xfe", b"null", b'{"check": 1}', b"NaN"])
def test_hostile_json_is_refused(folder, data):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(CacheDamaged, match=r"manifest\.json is damaged"):
        opened(folder)


def test_a_cache_of_a_future_format_says_what_to_do(cache, pristine, tmp_path):
    data = canonical_json(pristine.recipe | {"format": 2})
    future = tmp_path / hashlib.sha256(data).hexdigest()
    future.mkdir()
    (future / "recipe.json").write_bytes(data)
    with pytest.raises(CacheError, match="has format 2, this version of fpo reads 1; use the version that wrote it"):
        open_cache(tmp_path, future.name)


def test_a_group_in_two_shards_is_found(tmp_path):
    """The writer refuses such a plan, so it is changed behind its back."""
    world = World(tmp_path)
    writer = world.writer()
    writer.plan[2] = world.plan[0][:1].astype("uint64")
    for sid in range(3):
        writer.write(sid, dataclasses.replace(world.groups, columns=()).take(writer.plan[sid].astype(int)), {})
    assert "a group stands in two shards" in problems(world.store.path(writer.key))


def test_verify_reads_on_behind_the_first_problem(cache):
    os.unlink(cache / "shards/000000.zarr.zip")
    os.unlink(cache / "records/000002.json")
    (cache / "shards/000001.zarr.zip").write_bytes(b"x")
    report = verify(cache.parent, cache.name)
    assert (len(report.problems), report.shards, report.groups, report.ok) == (3, 1, 1, False)


def test_verify_reports_its_progress(cache):
    seen = []
    verify(cache.parent, cache.name, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 11) for n in range(1, 12)]  # 3 of the base, 5 and 3 of its columns


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


def test_summaries_say_how_far_each_cache_and_each_column_is(tmp_path):
    world = World(tmp_path)
    writer = world.writer()
    writer.write(1, world.shard(1), {})
    (started,) = world.store.summaries()
    assert (started.complete, started.state, started.n_groups) == (False, "1 of 3 shards", 5)
    assert started.n_bytes == os.path.getsize(writer.folder.root / "shards/000001.zarr.zip")
    world.fill_base()
    world.column_writer(0).write(4, world.column_shard(0, 4), {})
    (done,) = world.store.summaries()
    assert (done.complete, done.state, done.problem, done.n_completions) == (True, "complete", None, 10)
    assert done.n_bytes == sum(len(data) for name, data in tree(world.path).items() if name.endswith(".zip"))
    assert done.recipe == world.recipe
    (column,) = done.columns
    assert (column.key, column.spec, column.complete) == (world.column_key(0), world.specs[0], False)
    assert column.state == "1 of 5 shards"


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
    data = (cache / "manifest.json").read_bytes()
    assert open_cache(cache.parent, cache.name).digest == hashlib.sha256(data).hexdigest()
    body = json.loads(data)
    del body["check"]
    spelled = json.dumps(body, sort_keys=True, indent=1) + "\n"
    assert json.loads(data)["check"] == hashlib.sha256(spelled.encode()).hexdigest()
