import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import World, same, tree

from fpo.errors import CacheIncomplete, CacheMissing
from fpo.store import open_cache, verify
from fpo.store.format.encoding import decode_shard
from fpo.store.local import finished_shards

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")


@pytest.fixture(scope="module")
def graves(tmp_path_factory):
    """The stores of writers killed before every system call."""
    folder = tmp_path_factory.mktemp("killed")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    script = [sys.executable, str(here / "store_killed_writer.py"), str(folder)]
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 3 shards, 3 records, recipe and manifest: each at least open, write, fsync, link, unlink, open, fsync.
    assert int(done.stdout) >= 8 * 7
    return sorted(folder.iterdir())


def without_provenance(files: dict[str, bytes]) -> dict[str, bytes]:
    """A record says how its shard came to be; an adopted shard came to be otherwise."""
    return {name: data for name, data in files.items() if not name.startswith("records/")}


def test_a_killed_and_resumed_cache_has_the_same_bytes(graves, tmp_path):
    whole = World(tmp_path)
    expected = tree(whole.store.path(whole.fill().key))
    for grave in graves:
        world = World(grave)
        found = tree(world.store.path(world.fill().key))
        assert without_provenance(found) == without_provenance(expected), grave.name
        assert set(found) == set(expected), grave.name
        report = verify(world.store, world.writer().key)
        assert report.ok, (grave.name, report.problems)


def test_what_a_killed_writer_committed_is_whole_and_nothing_else_is_read(graves):
    for grave in graves:
        world = World(grave)
        for summary in world.store.summaries():
            key, folder = summary.key, world.store.folder(summary.key)
            for sid in finished_shards(folder, 3):
                data = folder.read(f"shards/{sid:06d}.zarr.zip", 10**6)
                assert same(decode_shard(data, key, sid, world.bounds), world.shard(sid))


def test_a_killed_cache_opens_only_when_sealed(tmp_path):
    world = World(tmp_path)
    with pytest.raises(CacheMissing, match="it is empty"):
        open_cache(world.store, "ab")
    writer = world.writer()
    writer.write(1, world.shard(1), {})
    with pytest.raises(CacheIncomplete, match=r"1 of 3 shards are done; finish it with: fpo cache RECIPE"):
        open_cache(world.store, writer.key[:8])
