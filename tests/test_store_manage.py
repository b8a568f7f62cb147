"""Tags, uses, removing and collecting: a cache in use stays, one that goes goes whole."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from store_cases import TOP_LOGITS, World, make_groups, make_recipe, tree, unmarked

from fpo.errors import CacheDamaged, CacheError, CacheInUse, CacheMissing
from fpo.store import CacheWriter, Claims, Store, gc, open_cache, rm, tag, untag, verify
from fpo.store.upkeep import collect

DAY = 86400


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "store")
    world.fill()
    return world


def another(world: World, n: int = 2, complete: bool = True, provenance=None) -> str:
    """A cache of n groups in the same store; returns its key."""
    groups = make_groups([(1, (2, 3))] * n, seed=n)
    plan = [np.array([i]) for i in range(n)]
    writer = CacheWriter(world.store, make_recipe(groups, plan), plan)
    for sid in range(n if complete else 1):
        writer.write(sid, groups.take(plan[sid]), provenance or {})
    if complete:
        writer.seal({})
    return writer.key


def age(world: World, key: str, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(world.store.use_file(key), (then, then))


def in_another_process(world: World, key: str) -> subprocess.Popen[str]:
    """Holds the cache open until its stdin closes."""
    root = str(world.store.root)
    code = f"from fpo.store import open_cache; c = open_cache({root!r}, {key!r}); print('open', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


# Tags


def test_a_tag_works_wherever_a_key_does(world):
    other = another(world)
    assert tag(world.store, world.key[:10], "gemma-train").key == world.key
    assert open_cache(world.store, "gemma-train").key == world.key
    assert verify(world.store, "gemma-train").ok
    assert {s.key: s.tags for s in world.store.summaries()} == {world.key: ("gemma-train",), other: ()}


def test_a_tag_moves_and_says_from_where(world):
    other = another(world)
    assert tag(world.store, world.key, "best").before is None
    assert tag(world.store, other, "best").before == world.key
    assert tag(world.store, "best", "best").before is None
    assert world.store.resolve("best") == other
    assert untag(world.store, "best").key == other
    with pytest.raises(CacheMissing, match="no tag 'best'"):
        untag(world.store, "best")


@pytest.mark.parametrize(
    "name", ["", "A", "a/b", "../x", ".hidden", "-x", "x y", "ü", "x" * 101, "beef", "0", "a" * 64]
)
def test_a_name_that_is_none_or_looks_like_a_key_is_refused(world, name):
    with pytest.raises(CacheError, match="cannot be a tag"):
        tag(world.store, world.key, name)
    assert world.store.tags() == {}


def test_a_tag_whose_cache_is_not_here_says_so(world):
    tag(world.store, world.key, "mine")
    os.rename(world.store.path(world.key), world.store.root / "elsewhere")
    with pytest.raises(CacheMissing, match=f"the tag mine in .* stands for {world.key[:12]}, which is not here"):
        open_cache(world.store, "mine")


def test_a_damaged_tag_is_refused_and_never_followed(world):
    tag(world.store, world.key, "mine")
    (world.store.root / "tags/mine").write_text("../../etc\n")
    with pytest.raises(CacheDamaged, match="tags/mine holds no key"):
        open_cache(world.store, "mine")
    assert world.store.tags() == {}


def test_a_misspelled_tag_names_the_nearest(world):
    tag(world.store, world.key, "gemma-train")
    with pytest.raises(CacheMissing, match="did you mean gemma-train"):
        untag(world.store, "gema-train")


# Uses


def test_opening_and_writing_count_as_use(world):
    age(world, world.key, 3)
    before = world.store.summary(world.key).used
    open_cache(world.store, world.key)
    after = world.store.summary(world.key).used
    assert (after - before).total_seconds() == pytest.approx(3 * DAY, abs=60)


def test_listing_is_no_use(world):
    age(world, world.key, 3)
    world.store.summaries()
    assert time.time() - world.store.summary(world.key).used.timestamp() > 2 * DAY


def test_checking_a_cache_is_no_use_but_nobody_removes_it_meanwhile(world):
    age(world, world.key, 3)

    def remove_it(*_):
        with pytest.raises(CacheInUse):
            rm(world.store, world.key)

    assert verify(world.store, world.key, remove_it).ok
    assert time.time() - world.store.summary(world.key).used.timestamp() > 2 * DAY
    world.store.use_file(world.key).unlink()
    assert verify(world.store, world.key).ok
    assert world.store.summary(world.key).used is None


def test_a_store_that_cannot_be_written_is_read_without_account(world, monkeypatch):
    world.store.use_file(world.key).unlink()
    world.store.use_file(world.key).parent.rmdir()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fpo.store.upkeep.use.make_durable_dirs", refuse)
    assert open_cache(world.store, world.key).n_groups == 5
    assert world.store.summary(world.key).used is None


def test_a_pickled_cache_is_a_use_of_its_own(world):
    copy = pickle.loads(pickle.dumps(open_cache(world.store, world.key)))
    with pytest.raises(CacheInUse):
        rm(world.store, world.key)
    assert len(copy.shard(0)) == 2
    del copy
    rm(world.store, world.key)


# rm


def test_rm_removes_the_cache_and_its_uses(world):
    other = another(world)
    tag(world.store, other, "theirs")
    size = sum(map(len, tree(world.store.path(world.key)).values()))
    report = rm(world.store, world.key[:4])
    assert (report.key, report.n_bytes) == (world.key, size)
    assert world.store.keys() == [other]
    assert world.store.tags() == {"theirs": other}
    assert list((world.store.root / ".state/removed").iterdir()) == []
    assert [path.name for path in (world.store.root / ".state/uses").iterdir()] == [other]


def test_rm_refuses_a_tagged_cache_and_says_how_to_let_it_go(world):
    tag(world.store, world.key, "mine")
    for name in (world.key, "mine"):
        with pytest.raises(CacheError, match=r"has the tag mine, which keeps it; .* fpo store untag mine"):
            rm(world.store, name)
    untag(world.store, "mine")
    rm(world.store, world.key)
    assert world.store.keys() == []


@pytest.mark.parametrize("digits", [1, 3])
def test_rm_takes_no_key_of_fewer_than_four_digits(world, digits):
    with pytest.raises(CacheError, match="give at least 4 digits"):
        rm(world.store, world.key[:digits])
    assert world.store.keys() == [world.key]


def test_rm_refuses_a_cache_that_another_process_reads_and_names_it(world):
    process = in_another_process(world, world.key)
    with process, pytest.raises(CacheInUse, match=rf"is in use by process {process.pid} \(.*open_cache") as refusal:
        rm(world.store, world.key)
    assert "wait for them" in str(refusal.value)
    assert verify(world.store, world.key).ok
    rm(world.store, world.key)


def test_a_killed_reader_uses_nothing(world):
    process = in_another_process(world, world.key)
    process.kill()
    with process:
        process.wait()
    rm(world.store, world.key)
    assert world.store.keys() == []


def test_rm_refuses_a_cache_that_is_being_written(world):
    writer = world.writer()
    with pytest.raises(CacheInUse, match="in use"):
        rm(world.store, writer.key)
    assert verify(world.store, writer.key).ok


def test_a_removed_cache_can_be_built_again(world):
    expected = tree(world.store.path(world.key))
    rm(world.store, world.key)
    assert tree(world.store.path(world.fill().key)) == expected


def test_rm_of_a_linked_cache_removes_the_link_only(world, tmp_path):
    os.rename(world.store.path(world.key), tmp_path / "far")
    os.symlink(tmp_path / "far", world.store.path(world.key))
    before = tree(tmp_path / "far")
    rm(world.store, world.key)
    assert world.store.keys() == []
    assert tree(tmp_path / "far") == before


def test_rm_where_locks_do_not_work_says_what_to_do(world, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fpo.store.upkeep.use.fcntl.flock", no_locks)
    with pytest.raises(CacheError, match=r"has no locks.*delete its folder yourself"):
        rm(world.store, world.key)


# gc


def test_gc_looks_first_and_changes_nothing(world):
    key = another(world, complete=False)
    age(world, world.key, 40)
    age(world, key, 40)
    before = tree(world.store.root)
    report = gc(world.store, unused_days=30)
    assert {(item.kind, item.key) for item in report.items} == {("unused", world.key), ("unfinished", key)}
    size = sum(len(data) for name, data in before.items() if not name.startswith(".state"))
    assert report.n_bytes == size
    assert tree(world.store.root) == before
    assert time.time() - world.store.summary(key).used.timestamp() > 39 * DAY


def test_gc_removes_what_it_showed(world):
    key = another(world, complete=False)
    age(world, key, 15)
    shown = gc(world.store)
    assert [(item.kind, item.key, item.removed) for item in shown.items] == [("unfinished", key, False)]
    assert shown.items[0].reason == "1 of 2 shards, unused for 15 days"
    done = gc(world.store, dry_run=False)
    assert [item.removed for item in done.items] == [True]
    assert done.n_bytes == shown.n_bytes > 0
    assert world.store.keys() == [world.key]
    assert gc(world.store, dry_run=False).items == []


def test_gc_keeps_what_is_young_tagged_or_damaged(world):
    tagged, damaged = another(world, 3), another(world, 4)
    for key in (tagged, damaged):
        age(world, key, 400)
    tag(world.store, tagged, "paper")
    age(world, world.key, 29)
    (world.store.path(damaged) / "recipe.json").write_text("{}")
    assert gc(world.store, unused_days=30, dry_run=False).items == []
    assert len(world.store.keys()) == 3


def between_look_and_removal(monkeypatch, deed) -> None:
    """Another process does this once gc has looked at the cache and before it takes the lock."""
    real = collect.is_used

    def look(path):
        said = real(path)
        deed()
        return said

    monkeypatch.setattr("fpo.store.upkeep.collect.is_used", look)


@pytest.mark.parametrize("deed", ["open", "tag"])
def test_what_is_used_or_tagged_since_gc_looked_stays(world, monkeypatch, deed):
    """Opened and closed again, so no lock tells of it."""
    age(world, world.key, 400)
    code = {"open": "open_cache(sys.argv[1], sys.argv[2])", "tag": "tag(sys.argv[1], sys.argv[2], 'kept')"}[deed]
    script = [sys.executable, "-c", f"import sys; from fpo.store import *; {code}", str(world.store.root), world.key]
    between_look_and_removal(monkeypatch, lambda: subprocess.run(script, check=True))
    (item,) = gc(world.store, unused_days=30, dry_run=False).items
    assert (item.in_use, item.removed) == (True, False)
    assert verify(world.store, world.key).ok


def test_an_unfinished_cache_that_was_finished_since_gc_looked_stays(world, monkeypatch):
    key = another(world, complete=False)
    age(world, key, 400)
    between_look_and_removal(monkeypatch, lambda: (another(world), age(world, key, 400)))
    (item,) = gc(world.store, dry_run=False).items
    assert (item.kind, item.in_use, item.removed) == ("unfinished", True, False)
    assert verify(world.store, key).ok


def test_gc_never_touches_what_is_in_use(world):
    age(world, world.key, 400)
    cache = open_cache(world.store, world.key)
    age(world, world.key, 400)
    for dry_run in (True, False):
        report = gc(world.store, unused_days=1, dry_run=dry_run)
        assert [(item.in_use, item.removed) for item in report.items] == [(True, False)]
        assert report.n_bytes == 0
    assert len(cache.shard(2)) == 1


def test_gc_clears_the_temporary_files_of_dead_writers_only(world):
    tmp = world.store.path(world.key) / "tmp"
    for name, hours in (("old", 2), ("young", 0)):
        (tmp / name).write_bytes(b"1234")
        os.utime(tmp / name, (time.time() - hours * 3600,) * 2)
    with_writer = world.writer()
    assert [item.in_use for item in gc(world.store, dry_run=False).items] == [True]
    del with_writer
    report = gc(world.store, dry_run=False)
    assert [(item.path.name, item.n_bytes) for item in report.items] == [("old", 4)]
    assert os.listdir(tmp) == ["young"]
    assert verify(world.store, world.key).ok


def test_gc_collects_a_folder_whose_writer_died_before_its_recipe(world):
    (world.store.root / ("cd" * 32) / "tmp").mkdir(parents=True)
    folder = world.store.root / ("cd" * 32)
    os.utime(folder, (time.time() - 20 * DAY,) * 2)
    assert [item.path for item in gc(world.store, dry_run=False).items] == [folder]
    assert not folder.exists()


def test_a_complete_cache_without_account_is_counted_from_the_first_collection_on(world):
    """Unpacked or copied: that nobody noted a use does not say that there was none."""
    world.store.use_file(world.key).unlink()
    for path in [*world.store.path(world.key).rglob("*"), world.store.path(world.key)]:
        os.utime(path, (time.time() - 400 * DAY,) * 2)
    looked = gc(world.store, unused_days=30)
    assert (looked.items, world.store.use_file(world.key).exists()) == ([], False)
    assert "with --yes its use counts from now on" in looked.notes[0]
    done = gc(world.store, unused_days=30, dry_run=False)
    assert (done.items, len(done.notes)) == ([], 1)
    assert gc(world.store, unused_days=30).notes == []
    age(world, world.key, 31)
    assert [item.removed for item in gc(world.store, unused_days=30, dry_run=False).items] == [True]


def test_gc_collects_the_tags_of_caches_that_are_no_more(world):
    other = another(world)
    tag(world.store, other, "kept")
    tag(world.store, world.key, "left")
    shutil.rmtree(world.store.path(world.key))
    (looked,) = gc(world.store).items
    assert (looked.kind, looked.reason) == ("tag", f"a tag of {world.key[:12]}, which is not here")
    assert [item.removed for item in gc(world.store, dry_run=False).items] == [True]
    assert world.store.tags() == {"kept": other}


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="a file system that holds any time")
def test_times_that_no_calendar_knows_stop_neither_ls_nor_gc():
    """A stranger's tarball sets any time: before 1970, or beyond the year 9999."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world = World(Path(folder))
        future, past = world.fill().key, another(world)
        for key, seconds in ((future, 2**40), (past, -(2**31))):
            for path in [*world.store.path(key).rglob("*"), world.store.use_file(key)]:
                os.utime(path, (seconds, seconds))
        shown = {summary.key: summary for summary in world.store.summaries()}
        assert (shown[future].created.year, shown[future].used.year) == (9999, 9999)
        assert (shown[past].created.year, shown[past].used) == (1970, None)
        found = gc(world.store, unused_days=30)
        assert (found.items, found.problems) == ([], [])


def test_gc_of_no_store_finds_nothing(tmp_path):
    assert gc(tmp_path / "none").items == []
    assert not (tmp_path / "none").exists()


# Columns


def old(folder: Path, days: float) -> None:
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - days * DAY,) * 2)


def test_rm_of_a_column_leaves_the_base_and_the_other_columns(world):
    before = tree(world.path)
    gone = tree(world.column_path(0))
    removed = rm(world.store, world.key[:8], world.column_key(0)[:4])
    assert (removed.key, removed.n_bytes) == (world.column_key(0), sum(map(len, gone.values())))
    place = f"columns/{world.column_key(0)}/"
    assert tree(world.path) == {name: data for name, data in before.items() if not name.startswith(place)}
    assert verify(world.store, world.key).columns == {world.column_key(1): 3}
    world.fill_column(0)
    assert unmarked(tree(world.path)) == unmarked(before)


def test_rm_of_a_column_is_as_careful_as_of_a_cache(world):
    column = world.column_key(0)
    with pytest.raises(CacheError, match="give at least 4 digits"):
        rm(world.store, world.key, column[:3])
    with pytest.raises(CacheMissing, match=f"no column whose key starts with 'nothing'; it has\n  .*{column}"):
        rm(world.store, world.key, "nothing")
    cache = open_cache(world.store, world.key)
    with pytest.raises(CacheInUse):
        rm(world.store, world.key, column)
    del cache
    tag(world.store, world.key, "mine")
    with pytest.raises(CacheError, match="has the tag mine, which keeps it"):
        rm(world.store, world.key, column)
    assert verify(world.store, world.key).columns[column] == 5


@pytest.fixture
def growing(tmp_path):
    """A complete cache with a column of which one shard is written, 20 days ago."""
    world = World(tmp_path / "growing")
    world.fill_base()
    world.column_writer(0).write(1, world.column_shard(0, 1), {})
    world.fill_column(1)
    old(world.column_path(0), 20)
    return world


def test_gc_collects_a_column_that_nobody_finished_and_nothing_else(growing):
    (shown,) = gc(growing.store).items
    assert (shown.kind, shown.key, shown.column) == ("unfinished", growing.key, growing.column_key(0))
    assert shown.reason == "features at model.layers.0, top 4, 1 of 5 shards, nobody worked on it for 20 days"
    assert growing.column_path(0).exists()
    assert [item.removed for item in gc(growing.store, dry_run=False).items] == [True]
    report = verify(growing.store, growing.key)
    assert (report.ok, report.notes, report.columns) == (True, [], {growing.column_key(1): 3})


def test_gc_keeps_a_column_that_is_young_in_use_or_of_a_tagged_cache(growing):
    assert gc(growing.store, unfinished_days=30, dry_run=False).items == []
    cache = open_cache(growing.store, growing.key)
    assert [item.in_use for item in gc(growing.store, dry_run=False).items] == [True]
    del cache
    tag(growing.store, growing.key, "mine")
    assert gc(growing.store, dry_run=False).items == []
    untag(growing.store, "mine")
    (growing.column_path(0) / "recipe.json").write_text("{}")
    old(growing.column_path(0), 20)
    assert gc(growing.store, dry_run=False).items == []
    assert growing.column_path(0).exists()


def test_a_column_that_was_finished_since_gc_looked_stays(growing, monkeypatch):
    between_look_and_removal(monkeypatch, lambda: growing.fill_column(0))
    (item,) = gc(growing.store, dry_run=False).items
    assert (item.kind, item.in_use, item.removed) == ("unfinished", True, False)
    assert verify(growing.store, growing.key).columns[growing.column_key(0)] == 5


def test_gc_clears_what_killed_writers_left_beside_a_base(world):
    """Temporary files of a complete column, and the folder of one that never began."""
    leftover = world.column_path(0) / "tmp/000001.json.0123456789abcdef"
    leftover.write_bytes(b"1234")
    os.utime(leftover, (time.time() - 7200,) * 2)
    empty = world.path / "columns" / ("cd" * 32)
    (empty / "shards").mkdir(parents=True)
    old(empty, 20)
    report = gc(world.store, dry_run=False)
    assert {(item.kind, item.path, item.removed) for item in report.items} == {
        ("temporary", leftover, True),
        ("unfinished", empty, True),
    }
    assert verify(world.store, world.key).notes == []


def test_a_claim_is_taken_on_a_complete_base_whose_tmp_is_gone(world):
    """Unpacked from an archive that left empty folders out: columns are still filled side by side."""
    (world.path / "tmp").rmdir()
    claim = Claims(world.store.folder(world.key)).take(1)
    assert Claims(world.store.folder(world.key)).take(1) is None
    claim.end()
    assert os.listdir(world.path / "tmp") == []


# Killed while removing


@pytest.mark.long
@pytest.mark.parametrize("how", ["rm", "gc"])
def test_a_removal_killed_anywhere_leaves_all_of_a_cache_or_none(tmp_path, how):
    """SIGKILL before every call with which rm or gc changes the disk; then the next gc and writer find order."""
    here = Path(__file__).parent
    script = [sys.executable, str(here / "store_killed_removal.py"), how, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = World(tmp_path / "whole", specs=(TOP_LOGITS,))
    expected = unmarked(tree(whole.store.path(whole.fill().key)))
    states = set()
    graves = sorted(path for path in tmp_path.iterdir() if path.name.isdigit())
    for grave in graves:
        store = Store(grave)
        left = {summary.key: unmarked(tree(store.path(summary.key))) for summary in store.summaries()}
        assert left in ({}, {whole.key: expected}), grave.name
        states.add(bool(left))
        report = gc(store, dry_run=False)
        assert gc(store).items == [], (grave.name, report)
        assert not list((grave / ".state/removed").glob("*"))
        refilled = World(grave, specs=(TOP_LOGITS,))
        assert unmarked(tree(store.path(refilled.fill().key))) == expected
    # rename away; then shards, records, recipes and manifests: both outcomes occur, the second nearly always.
    assert states == {True, False}
    assert len(graves) > 8


@pytest.mark.long
def test_the_removal_of_a_column_killed_anywhere_leaves_all_of_it_or_none(tmp_path):
    here = Path(__file__).parent
    script = [sys.executable, str(here / "store_killed_removal.py"), "column", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = set()
    for grave in (path for path in tmp_path.iterdir() if path.name.isdigit()):
        world = World(grave, specs=(TOP_LOGITS,))
        gc(grave, dry_run=False)
        assert not list((grave / ".state/removed").glob("*"))
        report = verify(grave, world.key)
        assert (report.ok, report.notes, report.shards) == (True, [], 3), (grave.name, report)
        assert report.columns in ({}, {world.column_key(0): 5}), grave.name
        states.add(bool(report.columns))
    assert states == {True, False}


READER = """
import sys
from fpo.errors import CacheIncomplete, CacheMissing
from fpo.store import open_cache
whole = missing = 0
print("ready", flush=True)
while not (whole and missing) or whole + missing < 400:
    try:
        cache = open_cache(sys.argv[1], sys.argv[2])
        assert sum(len(cache.shard(sid)) for sid in range(3)) == 5
        whole += 1
    except (CacheMissing, CacheIncomplete):
        missing += 1
    cache = None
print(whole, missing)
"""


def test_readers_see_a_cache_that_comes_and_goes_whole_or_not_at_all(world):
    """Two processes open and read it in a loop while it is removed and built again."""
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(world.store.root), world.key],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    removed = refused = 0
    while any(reader.poll() is None for reader in readers):
        try:
            rm(world.store, world.key)
            removed += 1
            world.fill()
        except CacheInUse:
            refused += 1
    for reader in readers:
        out, err = reader.communicate()
        assert reader.returncode == 0, err
        _, whole, missing = out.split()
        assert int(whole) > 0
        assert int(missing) > 0
    assert removed > 0
    assert refused > 0
