"""Links below the root of a store, planted in a tarball or a shared store: nothing behind them changes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_cases import FEATURES, World

from fpo.errors import CacheError
from fpo.store import Store, gc, open_cache, pull, push, rm, tag, untag, verify

DAY = 86400
OLD = time.time() - 400 * DAY
PLACES = [".state", ".state/removed", ".state/uses", ".state/uses/KEY", "KEY", "KEY/tmp", "KEY/shards", "KEY/records"]
PLACES += ["tags"]
COLUMN_PLACES = ["KEY/columns", "KEY/columns/COLUMN"]
COLUMN_PLACES += [f"KEY/columns/COLUMN/{name}" for name in ("tmp", "shards", "records")]


def unfinished(world: World) -> str:
    """Of the base one shard, and one of its column."""
    for writer, rows in ((world.writer(), world.shard(1)), (world.column_writer(0), world.column_shard(0, 1))):
        writer.write(1, rows, {})
    return world.key


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "store", specs=(FEATURES,))
    unfinished(world)
    tag(world.store, world.key, "mine")
    (world.store.root / ".state/removed").mkdir()
    return world


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of everything inside, the folder itself included."""
    paths = [folder, *folder.rglob("*")]
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


def plant(world: World, place: str, victim: Path) -> Path:
    """Put what lies there among the victim's files, all of them old, and a link in its place."""
    link = world.store.root / place.replace("KEY", world.key).replace("COLUMN", world.column_key(0))
    victim.mkdir()
    target = victim / "folder"
    shutil.move(link, target)
    if target.is_dir():
        for name in ("precious", f"{world.key}.0123456789abcdef", ".old", "old"):
            (target / name).write_text("mine")
        (target / "inside").mkdir(exist_ok=True)
        (target / "inside" / "precious").write_text("mine")
    for path in [*victim.rglob("*"), victim]:
        os.utime(path, (OLD, OLD))
    link.symlink_to(target)
    return link


def refusal(command: Callable[[World], object], world: World) -> str:
    """What a user is told, "" where nothing is refused."""
    try:
        command(world)
    except CacheError as error:
        return str(error)
    return ""


def gc_all(world: World) -> None:
    """Raises what it could not do, as the command does."""
    found = gc(world.store, unused_days=0, unfinished_days=0, dry_run=False)
    if found.problems:
        raise CacheError("; ".join(found.problems))


def remove_column(world: World) -> None:
    untag(world.store, "mine")
    rm(world.store, world.key, world.column_key(0))


def remove_untagged(world: World) -> None:
    untag(world.store, "mine")
    rm(world.store, world.key)


def pull_here(world: World) -> None:
    other = World(world.store.root.parent / "other", world.specs)
    pull(other.store, other.fill().key, world.store)


COMMANDS = {
    "gc": gc_all,
    "rm": remove_untagged,
    "rm --column": remove_column,
    "tag": lambda world: tag(world.store, world.key, "other"),
    "untag": lambda world: untag(world.store, "mine"),
    "write": lambda world: world.fill(),
    "open": lambda world: open_cache(world.store, world.key, columns="all"),
    "verify": lambda world: verify(world.store, world.key),
    "ls": lambda world: world.store.summaries(),
    "push": lambda world: push(world.store, world.key, world.store.root.parent / "third"),
    "pull": pull_here,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES + COLUMN_PLACES)
def test_no_command_changes_anything_behind_a_link(world, tmp_path, place, command):
    if place in COLUMN_PLACES:
        world.fill()
    victim = tmp_path / "victim"
    link = plant(world, place, victim)
    before = snapshot(victim)
    said = refusal(COMMANDS[command], world)
    assert "\n" not in said
    assert snapshot(victim) == before
    # Gone only with the cache, or where the cache itself is one: never the way to something else.
    assert link.is_symlink() or not os.path.lexists(link)


def test_gc_deletes_nothing_of_a_victim_and_names_the_link(world, tmp_path):
    """A tarball whose tmp/ leads to somebody's folder: what lies there is old, and no leftover of ours."""
    plant(world, "KEY/tmp", tmp_path / "victim")
    found = gc(world.store, dry_run=False)
    assert found.items == []
    assert [f"{world.key}/tmp is a link" in problem for problem in found.problems] == [True]
    plant(world, ".state/removed", tmp_path / "second victim")
    assert any(".state/removed is a link" in problem for problem in gc(world.store, dry_run=False).problems)


def test_a_folder_that_becomes_a_link_while_it_is_deleted_is_not_followed(world, tmp_path, monkeypatch):
    """Swapped after the look: the way down is opened without following."""
    victim = tmp_path / "victim"
    plant(world, "KEY/tmp", victim)
    before = snapshot(victim)
    monkeypatch.setattr("fpo.store.files.refuse_links", lambda *_: None)
    with pytest.raises(CacheError, match="cannot remove"):
        world.store.folder(world.key).delete("tmp/precious")
    assert snapshot(victim) == before


def test_the_root_of_a_store_may_be_a_link(world, tmp_path):
    (tmp_path / "alias").symlink_to(world.store.root)
    alias = World(tmp_path / "alias", world.specs)
    assert verify(alias.store, alias.fill().key).ok
    untag(alias.store, "mine")
    rm(alias.store, alias.fill().key)
    assert Store(world.store.root).keys() == []
