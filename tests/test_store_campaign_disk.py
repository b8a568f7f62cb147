"""
Disks that refuse: full, failing, read-only, forbidden. One clear line, nothing committed is lost, and the same command
finishes when the cause is gone. Real kernels where the tests may mount and change users, injected errors elsewhere.
"""

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_cases import World, tree
from store_killed_writer import CALLS

from fpo.errors import CacheError, CacheIncomplete, CacheMissing
from fpo.store import Store, gc, open_cache, rm, tag, untag, verify

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of the cache when nothing goes wrong."""
    world = World(tmp_path_factory.mktemp("whole"))
    return tree(world.store.path(world.fill().key))


def comparable(files):
    """An adopted shard's record says so; all else is the same."""
    return {name: data for name, data in files.items() if "records/" not in name}


def fill_or_error(world):
    """None, or the one line that a user sees."""
    try:
        world.fill()
    except CacheError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    assert message.startswith("cannot ")
    assert str(world.store.root) in message
    return message


def look(world):
    """What a reader sees of a cache that could not be finished: none, that it is not complete, or a column missing."""
    with pytest.raises((CacheMissing, CacheIncomplete)):
        open_cache(world.store, "")
    for summary in world.store.summaries():
        with pytest.raises((CacheMissing, CacheIncomplete)):
            open_cache(world.store, summary.key, columns=world.specs)


def assert_finishes(world, whole):
    key = world.fill().key
    found = tree(world.store.path(key))
    assert comparable(found) == comparable(whole)
    assert set(found) == set(whole)
    assert verify(world.store, key).ok


@contextmanager
def mounted(folder, options):
    """A tmpfs of its own; skips where this user may not mount."""
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not (ROOT and mount) or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield lambda changed: subprocess.run([mount, "-o", f"remount,{changed}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


PAGES = [1, 3, 9, 20, 40]


@pytest.mark.parametrize("pages", [*PAGES, *(pytest.param(n, marks=pytest.mark.campaign) for n in range(1, 56))])
def test_a_full_disk_says_so_and_the_rest_is_written_when_there_is_space(tmp_path, whole, pages):
    """A tmpfs of so many pages of 4 KiB; base and columns need about 50 with their folders' own."""
    with mounted(tmp_path, f"size={4 * pages}k") as remount:
        world = World(tmp_path)
        message = fill_or_error(world)
        if message is not None:
            assert "No space left on device; free some space and run the same command again" in message
            look(world)
            assert [path for path in tmp_path.rglob("tmp/*") if path.is_file()] == []
        remount("size=1m")
        assert_finishes(world, whole)


@pytest.mark.parametrize("inodes", [3, 6, 8, 9, 11, 13])
def test_a_disk_without_inodes_says_so(tmp_path, whole, inodes):
    with mounted(tmp_path, f"size=1m,nr_inodes={inodes}") as remount:
        world = World(tmp_path)
        assert "No space left on device" in fill_or_error(world)
        remount("nr_inodes=1000")
        assert_finishes(world, whole)


def test_a_read_only_disk_serves_complete_caches_and_refuses_to_finish_others(tmp_path, whole):
    with mounted(tmp_path, "size=1m") as remount:
        complete, started = World(tmp_path / "complete"), World(tmp_path / "started")
        key = complete.fill().key
        shutil.rmtree(complete.store.path(key) / "tmp")  # as a copied cache lacks it
        started.writer().write(0, started.shard(0), {})
        remount("ro")
        assert open_cache(complete.store, key).shard(0)
        assert verify(complete.store, key).ok
        assert [summary.complete for summary in complete.store.summaries()] == [True]
        assert "Read-only file system; choose a writable store with --store or FPO_STORE" in fill_or_error(started)
        assert "Read-only file system" in fill_or_error(World(tmp_path / "new"))
        look(started)
        remount("rw")
        assert_finishes(started, whole)


def failing_call(monkeypatch, number, code, names=CALLS):
    """The number-th of these system calls fails; returns the list that counts them."""
    made = []

    def wrap(name, real):
        def call(*args, **kwargs):
            made.append(name)
            if len(made) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in names:
        wrap(name, getattr(os, name))
    return made


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.campaign)])
def test_whichever_call_fails_nothing_is_lost_and_the_next_run_finishes(tmp_path, whole, code, step):
    with pytest.MonkeyPatch.context() as count:
        calls = failing_call(count, 0, code)
        World(tmp_path / "count").fill()
    assert len(calls) > 200
    numbers = range(1 + code % step, len(calls) + 1, step)
    refused = 0
    for number in numbers:
        world = World(tmp_path / f"{number}")
        with pytest.MonkeyPatch.context() as broken:
            failing_call(broken, number, code)
            message = fill_or_error(world)
        refused += message is not None
        assert message is None or os.strerror(code) in message
        assert_finishes(world, whole)
    print(f"{errno.errorcode[code]}: at {len(numbers)} of {len(calls)} calls, {refused} refused")


UPKEEP = {
    "rm": lambda world: rm(world.store, world.key),
    "gc": lambda world: gc(world.store, unused_days=0, dry_run=False).problems,
    "tag": lambda world: tag(world.store, world.key, "new"),
    "untag": lambda world: untag(world.store, "old"),
    "ls": lambda world: world.store.summaries(),
    "open": lambda world: open_cache(world.store, world.key),
}
FAULTS = ["EIO", "ENOSPC", "EDQUOT", "EPERM", "ESTALE", "EINTR", "ENOLCK"]


def upkeep_world(folder):
    """A cache to remove, one that its tag keeps, and one whose tag may go."""
    world = World(folder)
    world.fill()
    for seed, name in ((8, "old"), (9, "kept")):
        other = World(folder)
        other.recipe["groups"]["seed"] = seed
        tag(world.store, other.fill().key, name)
    return world


def failing_upkeep(monkeypatch, number, code):
    """The number-th call fails by which tags, notes, locks and files are reached; returns the list that counts them."""
    made = failing_call(monkeypatch, number, code, [*CALLS, "lstat", "stat", "listdir", "utime", "rmdir", "replace"])
    real = fcntl.flock

    def flock(*args):
        made.append("flock")
        if len(made) == number:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    return made


def refusals(command, world):
    """What a user is told, one string per line."""
    try:
        said = command(world)
    except CacheError as error:
        return [str(error)]
    return said if isinstance(said, list) and all(isinstance(line, str) for line in said) else []


@pytest.mark.parametrize("command", UPKEEP)
@pytest.mark.parametrize(
    ("fault", "step"), [("EIO", 23), *(pytest.param(f, 3, marks=pytest.mark.campaign) for f in FAULTS)]
)
def test_whichever_call_of_upkeep_fails_it_is_one_line_and_no_traceback(tmp_path, command, fault, step):
    code = getattr(errno, fault)
    whole = upkeep_world(tmp_path / "whole")

    def copied(name):
        return World(shutil.copytree(whole.store.root, tmp_path / name))

    with pytest.MonkeyPatch.context() as count:
        world = copied("count")
        calls = failing_upkeep(count, 0, code)
        UPKEEP[command](world)
    refused = 0
    for number in range(1 + code % step, len(calls) + 1, step):
        world = copied(f"{number}")
        with pytest.MonkeyPatch.context() as broken:
            failing_upkeep(broken, number, code)
            said = refusals(UPKEEP[command], world)
        refused += bool(said)
        assert all("\n" not in line for line in said)
        assert "kept" in world.store.tags()
        keys = world.store.keys()
        assert all(verify(world.store, key).ok for key in keys)
        assert gc(world.store, dry_run=False).problems == []
    print(f"{fault} in {command}: {len(calls)} calls, {refused} refused")


def test_gc_goes_on_after_a_cache_that_it_cannot_look_at(tmp_path, monkeypatch):
    world, other = World(tmp_path), World(tmp_path)
    other.recipe["groups"]["seed"] = 8
    keys = sorted([world.fill().key, other.fill().key])
    real = os.lstat

    def lstat(path, **kwargs):
        if str(path).endswith(f"uses/{keys[0]}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **kwargs)

    monkeypatch.setattr(os, "lstat", lstat)
    found = gc(world.store, unused_days=0, dry_run=False)
    assert [(item.key, item.removed) for item in found.items] == [(keys[1], True)]
    assert found.problems == [
        f"cannot read {tmp_path}/.state/uses/{keys[0]}: Input/output error; "
        "the disk reports a failure: check it, then run the same command again"
    ]


@pytest.mark.parametrize("name", ["open", "lstat", "listdir"])
def test_a_disk_that_fails_while_reading_is_no_damage_of_the_cache(tmp_path, monkeypatch, name):
    world = World(tmp_path)
    key = world.fill().key
    cache = open_cache(world.store, key)

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, broken)
    readings = {
        "open": lambda: cache.shard(0),
        "lstat": lambda: open_cache(world.store, key),
        "listdir": world.store.keys,
    }
    with pytest.raises(CacheError, match="Input/output error; the disk reports a failure") as caught:
        readings[name]()
    assert type(caught.value) is CacheError


@contextmanager
def limit(which, soft):
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def test_too_many_open_files_say_what_to_raise(tmp_path, whole):
    world = World(tmp_path)
    writer = world.writer()
    free = os.dup(0)
    os.close(free)
    with limit(resource.RLIMIT_NOFILE, free), pytest.raises(CacheError, match="Too many open files; raise the limit"):
        writer.write(0, world.shard(0), {})
    assert_finishes(world, whole)


@pytest.mark.parametrize("size", [0, 100, 4096, 6000])
def test_a_write_that_breaks_off_in_the_middle_of_a_file_leaves_no_part_of_it(tmp_path, whole, size):
    """A limit of the file size: the kernel writes the beginning and refuses the rest."""
    world = World(tmp_path)
    writer = world.writer()
    with limit(resource.RLIMIT_FSIZE, size), pytest.raises(CacheError, match="File too large"):
        writer.write(0, world.shard(0), {})
    assert os.listdir(writer.folder.root / "shards") == os.listdir(writer.folder.root / "tmp") == []
    assert_finishes(world, whole)


@pytest.fixture
def public():
    """A folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(script, *args):
    """What the script prints when a user runs it who owns nothing."""
    if not ROOT:
        pytest.skip("needs the right to change users")
    here = Path(__file__).parent
    # Python itself may lie where only root reads: import first, then become the other user.
    head = f"import logging, os, sys; sys.path[:0] = [{str(here)!r}]\n"
    head += "import zarr; from store_cases import World; from fpo.store import *; from fpo.errors import CacheError\n"
    head += "args = sys.argv[1:]\n"
    head += f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    command = [sys.executable, "-c", head + script, *map(str, args)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_another_user_reads_a_complete_cache_and_finds_nothing_to_write(public):
    world = World(public / "store")
    key = world.fill().key
    script = """
world = World(args[0])
cache = open_cache(args[0], args[1], columns=world.specs)
print(sum(len(cache.shard(sid)) for sid in range(3)), verify(args[0], args[1]).problems, world.writer().missing())
print([summary.complete for summary in world.store.summaries()])
"""
    assert as_nobody(script, public / "store", key) == ["5 [] []", "[True]"]


def test_another_user_is_told_that_the_store_is_not_theirs(public, whole):
    world = World(public / "store")
    world.writer().write(1, world.shard(1), {})
    script = """
for folder in args:
    try:
        World(folder).fill()
    except CacheError as error:
        print(error)
"""
    lines = as_nobody(script, public / "store", public / "new")
    assert len(lines) == 2
    assert all(
        "Permission denied; check its permissions, or choose another store with --store" in line for line in lines
    )
    look(world)
    assert_finishes(world, whole)


def test_what_another_user_may_not_read_is_named_and_hides_nothing_else(public):
    world, closed = World(public / "store"), World(public / "store")
    closed.recipe["groups"]["seed"] = 8
    key, closed_key = world.fill().key, closed.fill().key
    world.store.path(closed_key).chmod(0o700)
    shard = world.store.path(key) / "shards/000001.zarr.zip"
    shard.chmod(0)
    script = """
try:
    open_cache(args[0], args[1]).shard(1)
except CacheError as error:
    print(error)
for problem in verify(args[0], args[1]).problems:
    print(problem)
for summary in Store(args[0]).summaries():
    print(summary.key[:8], summary.complete, "Permission denied" in (summary.problem or ""))
"""
    reading, verifying, *listed = as_nobody(script, public / "store", key)
    assert (
        reading
        == verifying
        == f"cannot read {shard}: Permission denied; check its permissions, "
        + ("or choose another store with --store or FPO_STORE")
    )
    assert sorted(listed) == sorted([f"{key[:8]} True False", f"{closed_key[:8]} False True"])


USE = """
os.umask(0o077)
open_cache(args[0], args[1])
print("open")
"""


def days_since_use(world, key):
    return (time.time() - world.store.use_file(key).stat().st_mtime) / 86400


def unused(world, key, days=400):
    os.utime(world.store.use_file(key), (time.time() - days * 86400,) * 2)


@pytest.mark.parametrize("mode", [0o755, 0o2775, 0o1777])
def test_what_another_user_reads_is_noted_and_kept(public, mode):
    """Whoever may read the store may note that they do, whatever the umask of its owner."""
    before = os.umask(0o077)
    try:
        (public / "store").mkdir()
        (public / "store").chmod(mode)
        world = World(public / "store")
        key = world.fill().key
    finally:
        os.umask(before)
    for path in [world.store.path(key), *world.store.path(key).rglob("*")]:
        path.chmod(0o755)
    unused(world, key)
    assert as_nobody(USE, public / "store", key) == ["open"]
    assert days_since_use(world, key) < 1
    assert gc(world.store, unused_days=30, dry_run=False).items == []


def test_a_note_that_shuts_readers_out_says_nothing_of_disuse(public):
    """Made before by other rules: the reader is told, gc keeps the cache and counts from then on."""
    world = World(public / "store")
    key = world.fill().key
    world.store.use_file(key).chmod(0o644)
    unused(world, key)
    said = as_nobody("logging.basicConfig(stream=sys.stdout)" + USE, public / "store", key)
    assert len(said) == 2
    assert f"cannot note in {public}/store/.state/uses that cache {key[:12]} is used (Permission denied)" in said[0]
    assert days_since_use(world, key) > 399
    (note,) = gc(world.store, unused_days=30, dry_run=False).notes
    assert f"{key[:12]} stays" in note
    assert verify(world.store, key).ok
    unused(world, key)
    assert as_nobody(USE, public / "store", key) == ["open"]
    assert days_since_use(world, key) < 1
    unused(world, key)
    assert [item.removed for item in gc(world.store, unused_days=30, dry_run=False).items] == [True]


def test_a_store_that_is_closed_to_others_needs_no_account_of_them(tmp_path):
    world = World(tmp_path / "store")
    world.store.root.mkdir(mode=0o700)
    key = world.fill().key
    assert stat.S_IMODE(world.store.use_file(key).stat().st_mode) == 0o600
    unused(world, key)
    assert [item.removed for item in gc(world.store, unused_days=30, dry_run=False).items] == [True]


def test_files_are_as_public_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        world = World(tmp_path)
        folder = world.store.path(world.fill().key)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert Store(tmp_path).keys() == [folder.name]
