"""A cache from a stranger: whatever it holds, it is refused by name, writes nowhere, runs nothing, fits in memory."""

import copy
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numcodecs import zstd
from store_cases import TOP_LOGITS, Part, World, make_recipe, tree
from store_forgery import (
    cache_of,
    foreign_zip,
    forge,
    forge_members,
    forge_metadata,
    forge_recipe,
    members_of,
    problems,
    shard_file,
)

from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheDamaged, CacheError
from fpo.store import CacheWriter, Store, open_cache
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import MAX_GROUP_TOKENS
from fpo.store.format.key import completion_digests
from fpo.store.format.manifest import MAX_MANIFEST_BYTES

MB = 2**20
SHARD = "shards/000000.zarr.zip"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("pristine"), [TOP_LOGITS, TOP_LOGITS | {"m": 1}])
    world.fill()
    return world.path


@pytest.fixture
def cache(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "store" / pristine.name)


@pytest.fixture(params=[None, 0], ids=["base", "column"])
def folder(request, cache):
    """What is forged: the base, or a column of top logits."""
    return Part(World(cache.parent, [TOP_LOGITS]), request.param).path


def read(folder):
    """What training does with the cache and the column that it asks for."""
    cache = cache_of(folder)
    opened = open_cache(cache.parent, cache.name, columns=[TOP_LOGITS])
    return sum(len(opened.shard(sid)) for sid in range(len(opened.shard_groups)))


def assert_refused(folder, name, reason=""):
    """Reading and verify both name the file, in one line, and change nothing."""
    before = tree(cache_of(folder))
    with pytest.raises(CacheDamaged, match=f"{re.escape(name)}.*{reason}") as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert any(name in problem for problem in problems(folder))
    assert tree(cache_of(folder)) == before


def peak_growth(work):
    """Bytes by which the process grew at most while it worked: resident memory, numpy and zstd included."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def raw_zip(names, flags=0, method=0):
    """Local headers as `pack` writes them, of empty members with any names, and nothing behind."""
    rest = (20, flags, method, 0, 33, 0, 0, 0)
    return b"".join(struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *rest, len(name), 0) + name for name in names)


HOSTILE_NAMES = [
    "../../evil", "/etc/cron.d/evil", "..\\evil", "C:/evil", "input_ids/../../../evil", "a" * 5000,
    "group_id/.zarray", ".zgroup", "zarr.json/zarr.json", "shards/000001.zarr.zip", "\x1b[2J", "__pycache__/x.pyc",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_members_with_other_names_are_refused(folder, name):
    forge_members(folder, {name: b"#!/bin/sh\n"})
    assert_refused(folder, SHARD, "members missing or unknown")
    forge(folder, foreign_zip(folder, sid=1, **{name: b"#!/bin/sh\n"}))
    assert_refused(folder, SHARD, "not a zip file as this format writes it")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused_without_unpacking_them(folder, method):
    forge(folder, foreign_zip(folder, compression=method, bomb=bytes(64 * MB)))
    assert peak_growth(lambda: assert_refused(folder, SHARD, "not a zip file")) < 16 * MB


def test_encrypted_duplicate_and_overlapping_members_are_refused(folder):
    whole = shard_file(folder).read_bytes()
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    twice = raw_zip([b"zarr.json", b"zarr.json"]) + whole
    overlapping = whole[:18] + struct.pack("<II", 5, 5) + whole[26:]
    link = whole.replace(struct.pack("<I", 0o100644 << 16), struct.pack("<I", 0o120777 << 16))
    inserted = whole[:-22] + raw_zip([b"x"]) + whole[-22:]
    for data in (bytes(encrypted), twice, overlapping, link, whole + whole, inserted):
        assert data != whole
        forge(folder, data)
        assert_refused(folder, SHARD, "not a zip file as this format writes it")


def test_a_zip_of_very_many_members_is_refused_before_they_become_objects(folder):
    """More than a zip's directory can count; a Python object for each would take 300 times the member's bytes."""
    forge(folder, raw_zip(b"%06d" % n for n in range(10**6)))
    assert peak_growth(lambda: assert_refused(folder, SHARD, "not a zip file")) < 4 * 36 * MB


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]},
        {"shape": [2**62, 2**62]},
        {"shape": [10**400]},
        {"shape": [-1]},
        {"shape": [2.0]},
        {"shape": {}},
        {"zarr_format": 2},
        {"zarr_format": 2, "dtype": "|O", "filters": [{"id": "pickle"}], "order": "C"},
        {"data_type": "object"},
        {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s"}}},
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 9}}]},
        {"codecs": [{"name": "sharding_indexed", "configuration": {}}]},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "../"}}},
        {"storage_transformers": [{"name": "http://evil"}]},
        {"attributes": {"__reduce__": "os.system"}},
        {"fill_value": 0},
    ],
    ids=str,
)
def test_metadata_that_is_not_ours_is_refused_and_not_interpreted(folder, change):
    forge_metadata(folder, "group_id", change)
    reason = "(group_id/zarr.json inside it|claim|bytes of its shape)"
    assert peak_growth(lambda: assert_refused(folder, SHARD, reason)) < 16 * MB


def with_tokens(folder, n, frame):
    """The shard claims n tokens everywhere, and this frame holds them."""
    members = members_of(shard_file(folder).read_bytes())

    def spelled(metadata):
        return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()

    root, array = json.loads(members["zarr.json"]), json.loads(members["input_ids/zarr.json"])
    root["attributes"]["n_tokens"] = n
    array["shape"] = array["chunk_grid"]["configuration"]["chunk_shape"] = [n]
    changes = {"zarr.json": spelled(root), "input_ids/zarr.json": spelled(array), "input_ids/c/0": frame}
    forge_members(folder, changes, n_tokens=n)


def test_zstd_bombs_are_refused_before_they_are_unpacked(cache):
    """32 kB for 1 GiB, under the true shape, under a shape that fits it, and with a header that lies."""
    n_tokens = parse_checked_json((cache / "manifest.json").read_bytes())["shards"][0]["n_tokens"]
    bomb = zstd.compress(np.zeros(2**30 - 2**12, np.uint8), 1, True)
    assert len(bomb) < MB // 4
    small = zstd.compress(np.zeros(4 * 9, np.uint8), 1, True)
    # Byte 4 describes the header; 0xa4: single segment, checksum, a content size of four bytes.
    lying = small[:4] + b"\xa4" + struct.pack("<I", 4 * 2**19) + small[6:]

    def attack(tokens, frame, reason):
        with_tokens(cache, tokens, frame)
        return peak_growth(lambda: assert_refused(cache, SHARD, reason))

    assert attack(n_tokens, bomb, f"does not hold the {4 * n_tokens} bytes of its shape") < 16 * MB
    # What the manifest claims is held against the plan before a shard is read.
    with_tokens(cache, 2**24, bomb)
    with pytest.raises(CacheDamaged, match=r"manifest\.json is damaged: .* 16777216 tokens, a shard holds at most"):
        read(cache)
    # This one is believed: the array is allocated, and zstd finds out before it writes a second page.
    assert attack(2**19, lying, "does not hold the|does not decompress") < 16 * MB


def test_zstd_bombs_in_a_column_are_refused_before_they_are_unpacked(cache):
    """Its number of entries is not in the manifest: the limit on all arrays bounds it, and the frame's own header."""
    folder = Part(World(cache.parent, [TOP_LOGITS]), 0).path
    whole = shard_file(folder).read_bytes()
    array = json.loads(members_of(whole)["logps/zarr.json"])
    bomb = zstd.compress(np.zeros(2**28, np.uint8), 1, True)
    for n, reason in [(array["shape"][0], "logps does not hold the"), (2**25, r"its arrays claim \d+ bytes"),
                      (2**40, r"logps/zarr\.json inside it is missing or not"),
                      (2**22, "logps does not hold the")]:  # fmt: skip
        array["shape"] = array["chunk_grid"]["configuration"]["chunk_shape"] = [n, 2]
        spelled = json.dumps(array, sort_keys=True, separators=(",", ":")).encode()
        forge(folder, whole)
        forge_members(folder, {"logps/zarr.json": spelled, "logps/c/0/0": bomb})
        assert peak_growth(lambda reason=reason: assert_refused(folder, SHARD, reason)) < 16 * MB


@pytest.mark.campaign
def test_the_largest_shard_that_is_allowed_takes_a_bounded_multiple_of_the_limit(tmp_path):
    """20 kB of file that unpack to 32 MiB of zeros, and are a valid group: MAX_GROUP_TOKENS bounds what that costs."""
    tokens = MAX_GROUP_TOKENS
    ids, splits = np.zeros(tokens, np.uint32), np.array([0, 1, tokens - 1, tokens], np.uint64)
    n_completions = np.full(1, 2, np.uint32)
    groups = Groups(
        group_id=np.zeros(1, np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(ids, splits, n_completions),
        input_ids=ids,
        splits=splits,
        score=np.zeros(2, np.float32),
        weight=np.ones(1, np.float32),
        ref_logps=np.zeros(2, np.float32),
        token_logps=np.zeros(tokens - 1, np.float32),
    )
    plan = [np.zeros(1, np.uint64)]
    writer = CacheWriter(tmp_path, make_recipe(groups, plan), plan)
    writer.write(0, groups, {})
    writer.seal({})
    size = open_cache(tmp_path, writer.key).manifest.n_bytes
    peak = peak_growth(lambda: open_cache(tmp_path, writer.key).shard(0))
    print(f"largest shard: {size} bytes of file, {peak / 2**20:.0f} MiB resident for 32 MiB unpacked")
    assert size < MB // 4
    assert peak < 256 * MB


BOMBS = {
    "deep": lambda: b"[" * (MAX_MANIFEST_BYTES - 1),
    "deep enough to parse": lambda: b"[" * 900 + b"]" * 900,
    "objects": lambda: b"[" + b"{}," * ((MAX_MANIFEST_BYTES - 4) // 3) + b"0]",
    "digits": lambda: b"9" * (MAX_MANIFEST_BYTES - 1),
    "too long": lambda: b" " * (MAX_MANIFEST_BYTES + 1),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_json_bombs_are_refused_in_bounded_memory(folder, kind):
    (folder / "manifest.json").write_bytes(BOMBS[kind]())

    def attack():
        with pytest.raises(CacheDamaged, match=r"manifest\.json (is damaged|has \d+ bytes)"):
            read(folder)

    assert peak_growth(attack) < 4 * MAX_MANIFEST_BYTES


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("groups", "shard_groups"), [0] * (2**15 + 1), r"groups\.shard_groups: Tuple should have at most 32768"),
        (("groups", "shard_groups"), [2**16 + 1], r"groups\.shard_groups\.0: Input should be less"),
        (("scorer", "vocab_size"), 2**32, r"scorer\.vocab_size"),
        (("groups", "n_groups"), 10**300, r"groups\.n_groups"),
        (("groups", "n_completions"), -1, r"groups\.n_completions"),
        (("groups", "score_mask"), 1, r"groups\.score_mask: Input should be a valid boolean"),
        (("groups", "digest"), "../../etc/passwd", r"groups\.digest"),
        (("format",), {"a\x1b[2J\n": 1}, r"recipe\.json has format \{'a\\x1b\[2J\\n': 1\},"),
    ],
)
def test_recipes_out_of_bounds_are_refused_naming_the_field(tmp_path, place, value, message):
    folder = forge_recipe(tmp_path / "store", changed(World(tmp_path / "unused").recipe, place, value))
    with pytest.raises(CacheError, match=message) as caught:
        open_cache(folder.parent, folder.name)
    assert str(caught.value).isprintable()


def changed(recipe, place, value):
    recipe = copy.deepcopy(recipe)
    inner = recipe
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return recipe


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("shard_groups",), [0] * (2**15 + 1), "shard_groups: Tuple should have at most 32768"),
        (("column", "m"), 2**64, "column: 1 validation error|m: Input should be less|m"),
        (("column", "m"), "all", "m"),
        (("column", "vocab_size"), 0, "vocab_size"),
        (("column", "kind"), "os.system", "kind"),
        (("base",), "cd" * 32, "is no column of cache"),
        (("surprise",), 1, "surprise: Extra inputs are not permitted"),
    ],
)
def test_column_recipes_out_of_bounds_are_named_by_verify_and_serve_nothing(cache, place, value, message):
    """It lies among the columns under the name that fits it."""
    world = World(cache.parent, [TOP_LOGITS])
    folder = forge_recipe(cache / "columns", changed(world.column_recipe(0), place, value))
    (problem,) = (problem for problem in problems(cache) if folder.name in problem)
    assert re.search(message, problem)
    assert problem.isprintable()
    assert read(cache) == 5


def test_more_columns_than_are_listed_cost_no_more(cache):
    """300 folders with names of keys, and nothing in them."""
    for n in range(300):
        (cache / f"columns/{n:064x}").mkdir()
    started = time.perf_counter()
    assert len(open_cache(cache.parent, cache.name, columns="all").columns) <= 2
    assert time.perf_counter() - started < 1


def test_what_nobody_could_read_again_is_not_written(tmp_path):
    world = World(tmp_path)
    huge = {"note": "x" * MAX_MANIFEST_BYTES}
    writer = world.writer()
    with pytest.raises(ValueError, match="a record would have"):
        writer.write(0, world.shard(0), huge)
    world.fill()
    assert problems(world.path) == []
    with pytest.raises(ValueError, match=r"recipe\.json would have"):
        CacheWriter(world.store, world.recipe | huge, world.plan)
    (writer.folder.root / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json would have"):
        writer.seal(huge)


@pytest.mark.parametrize("field", ["name", "path", "../../evil", "a\nb\x1b[31m", "x" * 10**5])
@pytest.mark.parametrize("file", ["manifest.json", "records/000000.json"])
def test_names_inside_json_are_never_used_and_printed_harmlessly(cache, file, field):
    body = parse_checked_json((cache / file).read_bytes())
    entry = body["shards"][0] if file == "manifest.json" else body
    entry[field] = "../../../evil"
    (cache / file).write_bytes(checked_json(body))
    found = [problem for problem in problems(cache) if file in problem]
    assert len(found) == 1
    assert found[0].isprintable()
    assert len(found[0]) < 1000


@pytest.mark.parametrize("inside", ["shards", "columns"])
def test_file_names_of_a_stranger_are_printed_harmlessly(cache, inside):
    for name in (b"\xff\xfe", b"a\nb", b"\x1b[2J", "\u202egnp.exe".encode()):
        (Path(os.fsdecode(os.fsencode(cache / inside) + b"/" + name))).write_bytes(b"")
    found = problems(cache)
    assert len(found) == 4
    assert all(problem.isprintable() and "does not belong" in problem for problem in found)


@pytest.mark.parametrize("name", ["recipe.json", "manifest.json", SHARD, "records/000000.json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", "socket"])
def test_what_is_no_plain_file_is_refused_without_waiting_on_it(cache, tmp_path, name, kind, monkeypatch):
    file = cache / name
    file.rename(tmp_path / "moved")
    if "link" in kind:
        file.symlink_to(tmp_path / ("moved" if kind == "link" else "nowhere"))
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        monkeypatch.chdir(file.parent)  # a socket's path has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    assert any(name in problem for problem in problems(cache))
    if not name.startswith("records"):
        with pytest.raises(CacheError, match=re.escape(name)):
            read(cache)
    (summary,) = Store(cache.parent).summaries()
    assert summary.complete or name in (summary.problem or "")


@pytest.mark.parametrize("name", ["shards", "records", "tmp"])
def test_subfolders_that_are_links_are_refused_and_nothing_is_written_behind_them(cache, tmp_path, name):
    world = World(cache.parent)
    outside = tmp_path / "outside"
    (cache / name).rename(outside)
    (cache / name).symlink_to(outside, target_is_directory=True)
    (cache / "manifest.json").unlink()
    before = tree(tmp_path)
    with pytest.raises(CacheDamaged, match=rf"{cache / name} is a link, not a folder"):
        world.writer()
    if name != "tmp":
        assert any(f"{cache / name} is a link" in problem for problem in problems(cache))
    assert {k: v for k, v in tree(tmp_path).items() if ".state" not in k} == {
        k: v for k, v in before.items() if ".state" not in k
    }


def test_columns_behind_a_link_are_refused(cache, tmp_path):
    (cache / "columns").rename(tmp_path / "outside")
    (cache / "columns").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(CacheDamaged, match=rf"{cache / 'columns'} is a link, not a folder"):
        read(cache)
    assert any(f"{cache / 'columns'} is a link" in problem for problem in problems(cache))
    with pytest.raises(CacheDamaged, match="is a link, not a folder"):
        World(cache.parent, [TOP_LOGITS]).column_writer(0)


GUARD = """
import os, sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from store_forgery import problems, read_all
from fpo.errors import CacheError
store, calm = Path(sys.argv[1]), Path(sys.argv[2])
read_all(calm), problems(calm)  # imports what is imported lazily
def noted(path):
    path = os.readlink(f"/proc/self/fd/{{path}}") if isinstance(path, int) else path
    return str(path).startswith(str(store)) and "/.state" in str(path)
def watch(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & 3
    changes = event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.chmod", "os.truncate")
    runs = event.split(".")[0] in ("subprocess", "pickle", "marshal", "socket", "ctypes", "exec", "compile", "import")
    runs = runs or event in ("os.system", "os.exec", "os.posix_spawn", "os.fork")
    if runs or ((writes or changes) and not noted(args[0])):
        print("VIOLATION", event, args)
sys.addaudithook(watch)
for cache in sorted(store.glob("*/" + "[0-9a-f]" * 64)):
    if cache == calm:
        continue
    try:
        read_all(cache)
        print("READ", cache)
    except CacheError:
        pass
    if not problems(cache):
        print("NO PROBLEM", cache)
    print("done")
"""


def test_reading_hostile_caches_opens_nothing_for_writing_and_runs_nothing(pristine, tmp_path):
    """Python's audit hooks see every file opened, process started, module imported and pickle loaded."""

    def column(c):
        return Part(World(c.parent, [TOP_LOGITS]), 0).path

    attacks = [
        lambda c: forge_members(c, {"../../evil": b"x"}),
        lambda c: forge_members(column(c), {"../../evil": b"x"}),
        lambda c: forge_members(c, {"input_ids/c/0": b"cos\nsystem\n(S'true'\ntR."}),
        lambda c: forge_members(column(c), {"logps/c/0/0": b"cos\nsystem\n(S'true'\ntR."}),
        lambda c: forge(c, foreign_zip(c, **{"/etc/evil": b"x"})),
        lambda c: forge(c, b"cos\nsystem\n(S'true'\ntR."),
        lambda c: forge_metadata(c, "input_ids", {"data_type": "object", "codecs": [{"name": "numcodecs.pickle"}]}),
        lambda c: forge_metadata(c, "input_ids", {"zarr_format": 2, "dtype": "|O", "filters": [{"id": "pickle"}]}),
        lambda c: (c / "manifest.json").write_bytes(b'{"__class__": "os.system", "check": 1}'),
        lambda c: (column(c) / "manifest.json").write_bytes(b'{"__class__": "os.system", "check": 1}'),
        lambda c: (shard_file(c).unlink(), shard_file(c).symlink_to("/etc/passwd")),
        lambda c: (shard_file(column(c)).unlink(), shard_file(column(c)).symlink_to("/etc/passwd")),
    ]
    calm = shutil.copytree(pristine, tmp_path / "calm" / pristine.name)
    for n, attack in enumerate(attacks):
        attack(shutil.copytree(pristine, tmp_path / f"attack-{n}" / pristine.name))
    here = Path(__file__).parent
    # Opening a cache notes its use beside it, in .state; nothing else may be written.
    script = GUARD.format(here=str(here))
    arguments = [sys.executable, "-c", script, str(tmp_path), str(calm)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["done"] * len(attacks) + [""]
