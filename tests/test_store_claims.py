"""Claims on shards: honoured while their holder lives and works, and never needed for a right cache."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import World

from fpo.errors import CacheConflict
from fpo.store import CacheWriter, claims, verify
from fpo.store.claims import Claims
from fpo.store.files import Folder

HOLDER = """
import sys
from pathlib import Path
from fpo.store.claims import Claims
from fpo.store.files import Folder
claim = Claims(Folder(Path(sys.argv[1]), Path(sys.argv[1]).parent)).take(3)
print("held", flush=True)
while sys.stdin.readline():
    claim.renew()
    print("renewed", flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path / ("ab" * 32), tmp_path)
    folder.prepare()
    return folder


@pytest.fixture
def holder(folder):
    """Another process that holds the claim on shard 3, and renews it for every line that it gets."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_shard_is_claimed_by_one_process_until_it_ends(folder, holder):
    ours = Claims(folder)
    assert ours.take(3) is None
    other = ours.take(4)
    assert other is not None
    other.end()
    assert os.listdir(folder.root / "tmp") == ["000003.claim"]
    holder.kill()
    holder.wait()
    assert ours.take(3) is not None


def test_a_holder_without_a_sign_of_life_is_given_up_and_one_that_renews_is_not(folder, holder, monkeypatch):
    """Stopped, so its lock stays. Only our own monotonic clock counts, so clocks may jump or differ."""
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    ours = Claims(folder)
    assert ours.take(3) is None
    for _ in range(3):
        now[0] += claims.PATIENCE_SECONDS - 1
        holder.stdin.write("\n")
        assert holder.stdout.readline() == "renewed\n"
        assert ours.take(3) is None
    holder.send_signal(signal.SIGSTOP)
    os.utime(folder.root / "tmp/000003.claim", (2**31, 2**31))  # a clock that jumped
    assert ours.take(3) is None
    now[0] += claims.PATIENCE_SECONDS + 1
    assert ours.take(3) is not None


def test_without_locks_everybody_gets_every_claim(folder, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fpo.store.upkeep.use.fcntl.flock", no_locks)
    assert Claims(folder).take(3) is not None
    assert Claims(folder).take(3) is not None


def late_listings(monkeypatch):
    """Every folder is listed as it was when somebody first asked."""
    first: dict[tuple[Path, str], list[str]] = {}
    real = Folder.names

    def names(self, subfolder=""):
        return first.setdefault((self.root, subfolder), real(self, subfolder))

    monkeypatch.setattr(Folder, "names", names)


def test_listings_that_come_late_hide_no_shard(tmp_path, monkeypatch):
    """As on some shared disks: two writers see each other's files by name, and their listings say nothing of them."""
    world = World(tmp_path)
    with monkeypatch.context() as late:
        late_listings(late)
        first, second = world.writer(), world.writer()
        for sid in range(3):
            assert not second.stands(sid)
            first.write(sid, world.shard(sid), {})
            assert second.stands(sid)
            second.write(sid, world.shard(sid), {})
        assert first.missing() == second.missing() == []
        assert first.seal({}) == second.seal({})
    assert verify(world.store, first.key).ok


def test_a_committed_shard_is_never_replaced_by_a_writer_with_other_groups(tmp_path):
    """The same tokens under one key, in other rows: each writer's plan is sound by itself."""
    world = World(tmp_path)
    writer = world.writer()
    late = CacheWriter(world.store, world.recipe, [ids + 10 for ids in world.plan])
    writer.write(0, world.shard(0), {})
    path = writer.folder.root / "shards/000000.zarr.zip"
    before = (path.stat().st_ino, path.read_bytes())
    theirs = dataclasses.replace(world.shard(0), group_id=world.shard(0).group_id + 10)
    with pytest.raises(CacheConflict, match=r"is committed with the groups \[3, 0\], this writer has \[13, 10\] there"):
        late.write(0, theirs, {})
    with pytest.raises(CacheConflict, match="the rows of another dataset"):
        CacheWriter(world.store, world.recipe, [ids + 10 for ids in world.plan])
    assert (path.stat().st_ino, path.read_bytes()) == before
    world.fill()
    assert verify(world.store, writer.key).ok
