"""A store in a dataset repository: the real huggingface_hub against a small hub on this machine."""

import contextlib

import pytest
from store_cases import FEATURES, TOP_LOGITS, World, same, tree
from store_fake_hub import REPO, _Handler, fake_hub
from store_servers import OtherWorld, sealed

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from fpo.store import Shelf, Store, open_cache, open_store, pull, push, verify

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

URL = f"hf://datasets/{REPO}/shared"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import HfApi, constants

    with fake_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=hub.url, token=False))
        yield hub


@pytest.fixture
def world(tmp_path):
    return sealed(World, tmp_path / "here")


def test_a_cache_on_the_hub_reads_verifies_and_pulls_with_the_same_bytes(world, hub, tmp_path, capfd):
    report = push(world.store, world.key, URL)
    assert (report.moved, report.present) == (8, 0)
    # The claim, then recipe, shards and records in one commit, then the manifest alone.
    names = [set(after) - set(before) for (_, before), (_, after) in zip(hub.commits, hub.commits[1:], strict=False)]
    assert [len(added) for added in names] == [1, 7, 1]
    assert names[-1] == {f"shared/{world.key}/manifest.json"}
    assert open_store(URL).keys() == [world.key]
    cache = open_cache(URL, world.key[:8], Shelf(tmp_path / "shelf"))
    assert all(same(cache.shard(sid), world.shard(sid)) for sid in range(3))
    assert verify(URL, world.key).ok
    pull(URL, world.key[:8], tmp_path / "there")
    assert tree(Store(tmp_path / "there").path(world.key)) == tree(world.store.path(world.key))
    again = push(world.store, world.key, URL)
    assert (again.moved, again.present) == (0, 8)
    summary = open_store(URL).summaries()[0]
    assert (summary.complete, summary.created.isoformat()) == (True, "2026-01-02T03:04:05+00:00")
    # One progress bar at a time is ours.
    assert capfd.readouterr().err == ""


def test_an_interrupted_push_to_the_hub_uploads_no_shard_twice(world, hub, monkeypatch):
    from fpo.store.remote.hub import HubRepo

    real = HubRepo.publish
    monkeypatch.setattr(HubRepo, "publish", lambda self: real(self) if len(self.pending) == 1 else _cut())
    with pytest.raises(CacheError, match="the line is cut"):
        push(world.store, world.key, URL)
    # The claim alone is there.
    with pytest.raises((CacheMissing, CacheIncomplete)):
        open_cache(URL, world.key)
    monkeypatch.setattr(HubRepo, "publish", real)
    push(world.store, world.key, URL)
    assert sorted(hub.uploads.values()) == [1, 1, 1]
    assert verify(URL, world.key).ok


def _cut():
    raise CacheError("the line is cut")


def test_somebody_elses_commit_in_between_is_no_harm(world, hub):
    hub.before_commit = lambda: hub.add({"README.md": b"others write here too"})
    push(world.store, world.key, URL)
    assert "README.md" in hub.files
    assert verify(URL, world.key).ok


def test_two_pushers_of_the_same_bytes_both_end_well(world, hub):
    mine = {f"shared/{world.key}/{name}": data for name, data in tree(world.store.path(world.key)).items()}
    hub.before_commit = lambda: hub.add(mine)
    push(world.store, world.key, URL)
    assert verify(URL, world.key).ok


def test_other_bytes_are_a_conflict_and_stay(world, hub, tmp_path):
    push(world.store, world.key, URL)
    other = OtherWorld(tmp_path / "other")
    key = other.fill().key
    before = dict(hub.files)
    with pytest.raises(CacheConflict) as error:
        push(other.store, key, URL)
    assert open_cache(world.store, key).digest[:12] in str(error.value)
    assert open_cache(other.store, key).digest[:12] in str(error.value)
    assert hub.files == before


def test_other_bytes_that_come_in_between_are_a_conflict(world, hub, tmp_path):
    other = OtherWorld(tmp_path / "other")
    key = other.fill().key
    theirs = {f"shared/{key}/{name}": data for name, data in tree(other.store.path(key)).items()}

    def once_claimed():
        hub.before_commit = lambda: hub.add(theirs)

    hub.before_commit = once_claimed
    with pytest.raises(CacheConflict, match="has other bytes than those to write; nothing is replaced"):
        push(world.store, world.key, URL)
    assert open_cache(URL, key).digest == open_cache(other.store, key).digest


def test_a_gitignore_that_drops_shards_is_told(world, hub):
    hub.ignored = "000001.zarr.zip"
    with pytest.raises(CacheError, match=r"left .*000001\.zarr\.zip out of a commit: .* has a \.gitignore"):
        push(world.store, world.key, URL)
    with pytest.raises(CacheIncomplete):
        open_cache(URL, world.key)


def test_a_repository_that_is_not_there_is_not_made(world, hub):
    for attempt in (
        lambda: push(world.store, world.key, "hf://datasets/someone/else"),
        lambda: open_cache("hf://datasets/someone/else", world.key),
    ):
        with pytest.raises(CacheError, match="no dataset someone/else that this token may see; make it with") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["recipe.json", "shards/000001.zarr.zip"])
def test_a_file_that_is_longer_than_the_hub_lists_is_not_read_to_its_end(world, hub, tmp_path, monkeypatch, name):
    """And never kept on a disk: it could have no end."""
    push(world.store, world.key, URL)
    answer, sent = _Handler.answer, []

    def endless(self, body, *args, **kwargs):
        if not self.path.endswith(name) or self.command == "HEAD":
            return answer(self, body, *args, **kwargs)
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while len(sent) < 2**12:
                self.wfile.write(bytes(2**16))
                sent.append(2**16)
        return None

    monkeypatch.setattr(_Handler, "answer", endless)
    with pytest.raises(CacheDamaged, match=rf"{name} has more than the \d+ bytes that the hub lists"):
        pull(URL, world.key, tmp_path / "there")
    assert sum(sent) < 2**26


def test_a_listing_without_an_end_is_given_up(world, hub, monkeypatch):
    monkeypatch.setattr("fpo.store.remote.pace.MAX_LISTED", 5)
    for n in range(7):
        hub.add({f"shared/{n}.txt": b"x"})
    with pytest.raises(CacheError, match="has more than 5 names; use a place for caches alone"):
        open_store(URL).keys()


def test_a_missing_key_lists_what_is_there(world, hub):
    with pytest.raises(CacheMissing, match="it is empty; fill it with fpo store push"):
        open_cache(URL, world.key)


def test_the_offline_switch_is_named(world, hub, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse(*args, **kwargs):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub._commit_api.http_backoff", refuse)
    with pytest.raises(CacheError, match="the hub is switched off by HF_HUB_OFFLINE; unset it"):
        push(world.store, world.key, URL)


def test_an_upload_that_fails_is_one_line(world, hub, monkeypatch):
    monkeypatch.setattr("store_fake_hub._Handler.do_PUT", lambda self: self.answer(b"", 403))
    with pytest.raises(CacheError, match=r"cannot write .*zip: the hub refuses \(403\); run hf auth login") as error:
        push(world.store, world.key, URL)
    assert "\n" not in str(error.value)


def test_columns_stand_on_the_hub_behind_their_base(hub, tmp_path):
    wide = sealed(World, tmp_path / "wide", specs=(FEATURES, TOP_LOGITS))
    push(wide.store, wide.key, URL, columns=())
    report = push(wide.store, wide.key, URL)
    assert (report.base.moved, [part.moved for part in report.columns]) in ((0, [12, 8]), (0, [8, 12]))
    assert verify(URL, wide.key).columns == {wide.column_key(0): 5, wide.column_key(1): 3}
    cache = open_cache(URL, wide.key, Shelf(tmp_path / "shelf"), columns="all")
    assert len(cache.columns) == 2
    pull(URL, wide.key, tmp_path / "there")
    assert tree(Store(tmp_path / "there").path(wide.key)) == tree(wide.path)
    (summary,) = open_store(URL).summaries()
    assert sorted(column.state for column in summary.columns) == ["complete", "complete"]
