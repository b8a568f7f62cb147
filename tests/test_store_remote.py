"""Stores at a URL: push, pull and read, against moto's S3 and a plain web server, with what goes wrong on the way."""

import contextlib
import multiprocessing
import shutil
import time

import numpy as np
import pytest
from store_cases import World, same, tree
from store_servers import BUCKET, OtherWorld, dropping_proxy, s3_environment, s3_server, web_server

from errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from store import Shelf, Store, open_cache, open_store, pull, push, verify
from store.bucket import BucketFolder
from store.transfer import CLAIM

obstore = pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def s3_port():
    pytest.importorskip("moto")
    with s3_server() as port:
        yield port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is worth waiting for."""
    monkeypatch.setattr("store.bucket.RETRY_SECONDS", 1.0)
    monkeypatch.setattr("store.shards._FIRST_PAUSE", 0.001)


@pytest.fixture
def s3(s3_port, monkeypatch, request):
    """The URL of an empty store."""
    for name, value in s3_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def world(tmp_path):
    """A complete cache; `world.key` is its key."""
    world = World(tmp_path / "here")
    world.key = world.fill().key
    return world


@pytest.fixture
def other(tmp_path):
    """The same key with other bytes."""
    other = OtherWorld(tmp_path / "other")
    other.key = other.fill().key
    return other


def digest(world: World) -> str:
    return open_cache(world.store, world.key).digest


def remote_names(url: str, key: str) -> set[str]:
    paths = [meta["path"] for batch in obstore.list(BucketFolder(url)._store) for meta in batch]
    return {path.removeprefix(f"{key}/") for path in paths}


def drop(url: str, key: str, name: str) -> None:
    obstore.delete(BucketFolder(url)._store, f"{key}/{name}")


def bytes_there(url: str, key: str, name: str) -> bytes:
    return BucketFolder(url).inside(key).read(name, 10**6)


# S3


def test_a_pushed_cache_reads_verifies_and_pulls_with_the_same_bytes(world, s3, tmp_path):
    seen = []
    report = push(world.store, world.key[:8], s3, on_object=lambda done, total: seen.append((done, total)))
    # recipe, manifest, and a shard and a record for each of three shards
    assert (report.moved, report.present, report.repaired) == (8, 0, ())
    assert report.manifest_digest == digest(world)
    n_bytes = open_cache(world.store, world.key).manifest.n_bytes
    assert [total for _, total in seen] == [n_bytes] * 3
    assert seen[-1][0] == n_bytes
    assert open_store(s3).keys() == [world.key]
    cache = open_cache(s3, world.key[:8], Shelf(tmp_path / "shelf"))
    assert all(same(cache.shard(sid), world.shard(sid)) for sid in range(3))
    assert verify(s3, world.key[:5]).ok
    pulled = pull(s3, world.key[:8], tmp_path / "there")
    assert pulled.moved == 8
    assert tree(Store(tmp_path / "there").path(world.key)) == tree(world.store.path(world.key))
    summary = open_store(s3).summaries()[0]
    assert (summary.key, summary.complete, summary.shards_done, summary.n_pairs) == (world.key, True, 3, 5)


def test_only_missing_objects_move(world, s3):
    push(world.store, world.key, s3)
    again = push(world.store, world.key, s3)
    assert (again.moved, again.present, again.n_bytes) == (0, 8, 0)
    drop(s3, world.key, "shards/000001.zarr.zip")
    mended = push(world.store, world.key, s3)
    assert (mended.moved, mended.present) == (1, 7)
    assert mended.repaired == (f"{s3}/{world.key}/shards/000001.zarr.zip",)
    assert verify(s3, world.key).ok


def test_an_interrupted_push_continues_and_moves_the_rest(world, s3, monkeypatch):
    real = BucketFolder.create

    def failing(self, name, data):
        if name == "shards/000002.zarr.zip":
            raise CacheError("the line is cut")
        return real(self, name, data)

    monkeypatch.setattr(BucketFolder, "create", failing)
    with pytest.raises(CacheError, match="the line is cut"):
        push(world.store, world.key, s3, threads=1)
    with pytest.raises(CacheIncomplete, match=r"it has no manifest\.json; push it again"):
        open_cache(s3, world.key)
    monkeypatch.setattr(BucketFolder, "create", real)
    rest = push(world.store, world.key, s3)
    assert (rest.moved, rest.present) == (3, 5)
    assert verify(s3, world.key).ok


def test_other_bytes_under_the_same_key_are_a_conflict_that_names_both_manifests(world, other, s3, tmp_path):
    assert other.key == world.key
    push(world.store, world.key, s3)
    before = {name: bytes_there(s3, world.key, name) for name in remote_names(s3, world.key)}
    for attempt in (lambda: push(other.store, other.key, s3), lambda: pull(s3, world.key, other.store)):
        with pytest.raises(CacheConflict) as error:
            attempt()
        assert digest(world)[:12] in str(error.value)
        assert digest(other)[:12] in str(error.value)
        assert "\n" not in str(error.value)
    assert {name: bytes_there(s3, world.key, name) for name in remote_names(s3, world.key)} == before


def test_an_unfinished_push_keeps_its_place_against_other_bytes(world, other, s3, monkeypatch):
    real = BucketFolder.create

    def failing(self, name, data):
        if name.startswith("records/"):
            raise CacheError("the line is cut")
        return real(self, name, data)

    monkeypatch.setattr(BucketFolder, "create", failing)
    with pytest.raises(CacheError, match="the line is cut"):
        push(world.store, world.key, s3)
    monkeypatch.setattr(BucketFolder, "create", real)
    with pytest.raises(CacheConflict, match="left unfinished, by a push of other bytes") as error:
        push(other.store, other.key, s3)
    assert digest(world)[:12] in str(error.value)
    assert digest(other)[:12] in str(error.value)
    push(world.store, world.key, s3)
    assert open_cache(s3, world.key).digest == digest(world)


def test_an_incomplete_cache_is_not_pushed(tmp_path, s3):
    world = World(tmp_path)
    writer = world.writer()
    writer.write(1, world.shard(1), {})
    with pytest.raises(CacheIncomplete, match="1 of 3 shards are done; finish it with: fpo cache RECIPE"):
        push(world.store, writer.key, s3)
    assert remote_names(s3, writer.key) == set()


def test_a_damaged_shard_does_not_leave_this_machine(world, s3):
    path = world.store.path(world.key) / "shards/000001.zarr.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match=r"shards/000001\.zarr\.zip has .* the manifest says"):
        push(world.store, world.key, s3)
    assert not {"shards/000001.zarr.zip", "records/000001.json", "manifest.json"} & remote_names(s3, world.key)


def test_a_shard_that_arrives_damaged_is_told(world, s3, monkeypatch):
    real = obstore.put

    def flipping(store, path, data, **options):
        if path.endswith("000001.zarr.zip"):
            data = bytes([data[0] ^ 1]) + data[1:]
        return real(store, path, data, **options)

    monkeypatch.setattr(obstore, "put", flipping)
    with pytest.raises(CacheDamaged, match=r"shards/000001\.zarr\.zip arrived damaged; delete it"):
        push(world.store, world.key, s3)
    assert "manifest.json" not in remote_names(s3, world.key)


def test_dropped_connections_on_the_way_to_s3_are_survived(world, s3, s3_port, monkeypatch, tmp_path):
    monkeypatch.setattr("store.bucket.RETRY_SECONDS", 10.0)
    with dropping_proxy(s3_port, [0, 20, 150, 0, 400, 10, 1000]) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        push(world.store, world.key, s3)
    with dropping_proxy(s3_port, [0, 300, 2000, 700, 3000]) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        pull(s3, world.key, tmp_path / "there", threads=2)
    assert tree(Store(tmp_path / "there").path(world.key)) == tree(world.store.path(world.key))


def _push_in_process(world_class, root, url, environment, start, results):
    import os

    os.environ.update(environment)
    world = world_class(root)
    key = world.writer().key
    start.wait()
    try:
        push(world.store, key, url, threads=2)
        results.put((world_class.__name__, "pushed"))
    except CacheConflict:
        results.put((world_class.__name__, "conflict"))


@pytest.mark.parametrize("theirs", [World, OtherWorld])
def test_two_pushers_at_once_cannot_harm_each_other(world, other, s3, s3_port, theirs):
    """The same bytes: both end well. Other bytes: one ends well and its cache is whole, the other is told."""
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    second = (World, world) if theirs is World else (OtherWorld, other)
    jobs = [
        spawn.Process(target=_push_in_process, args=(kind, own.store.root, s3, s3_environment(s3_port), start, results))
        for kind, own in ((World, world), second)
    ]
    for job in jobs:
        job.start()
    answers = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    ended = [how for _, how in answers]
    winner = next(name for name, how in answers if how == "pushed")
    assert sorted(ended) == (["pushed", "pushed"] if theirs is World else ["conflict", "pushed"])
    assert verify(s3, world.key).ok
    assert open_cache(s3, world.key).digest == digest(world if winner == "World" else other)
    assert CLAIM in remote_names(s3, world.key)


# A plain web server


@pytest.fixture
def web(world):
    with web_server(world.store.root) as server:
        yield server


def test_a_web_server_is_enough_to_pull_and_read(world, web, tmp_path):
    report = pull(web.url, world.key, tmp_path / "there")
    assert report.moved == 8
    assert tree(Store(tmp_path / "there").path(world.key)) == tree(world.store.path(world.key))
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    assert same(cache.shard(2), world.shard(2))
    assert verify(web.url, world.key).ok


def test_a_web_server_has_no_listing_so_the_full_key_is_needed(world, web):
    with pytest.raises(CacheMissing, match=r"is no full key, and http.* no listing: give the 64 digits"):
        open_cache(web.url, world.key[:8])
    with pytest.raises(CacheMissing, match=r"no cache ababab.*give the 64 digits"):
        open_cache(web.url, "ab" * 32)


def test_a_web_server_is_read_only(world, web):
    with pytest.raises(CacheError, match=r"is read-only \(plain https\)"):
        push(world.store, world.key, web.url)


SHARD = "shards/000001.zarr.zip"
FAULTS = {
    "drops the connection": lambda body: (200, body[: len(body) // 2], len(body)),
    "sends nothing": lambda body: (200, b"", len(body)),
    "truncates": lambda body: (200, body[:-1], len(body) - 1),
    "flips a bit": lambda body: (200, bytes([body[0] ^ 1]) + body[1:], len(body)),
    "appends": lambda body: (200, body + b"x", len(body) + 1),
    "is overloaded": lambda body: (503, b"", 0),
}


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "records/000001.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_survived(world, web, tmp_path, fault, name):
    monkey = FAULTS[fault]
    web.fault = lambda asked, n, body: monkey(body) if asked == name and n <= 2 else (200, body, len(body))
    pull(web.url, world.key, tmp_path / "there")
    assert web.requests["GET", name] == 3
    assert tree(Store(tmp_path / "there").path(world.key)) == tree(world.store.path(world.key))


@pytest.mark.parametrize("fault", ["drops the connection", "truncates", "flips a bit", "appends"])
def test_a_fault_that_stays_is_refused_and_nothing_of_it_is_kept(world, web, tmp_path, fault):
    monkey = FAULTS[fault]
    web.fault = lambda asked, n, body: monkey(body) if asked == SHARD else (200, body, len(body))
    with pytest.raises(CacheError, match=r"shards/000001\.zarr\.zip") as error:
        pull(web.url, world.key, tmp_path / "there")
    assert "\n" not in str(error.value)
    there = tree(Store(tmp_path / "there").path(world.key))
    assert not {SHARD, "records/000001.json", "manifest.json"} & set(there)
    with pytest.raises(CacheIncomplete):
        open_cache(tmp_path / "there", world.key)
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    with pytest.raises(CacheError, match=r"shards/000001\.zarr\.zip"):
        cache.shard(1)
    web.fault = None
    # recipe, two shards and two records stand: a shard, its record and the manifest are missing
    assert pull(web.url, world.key, tmp_path / "there").moved >= 3
    assert verify(tmp_path / "there", world.key).ok


def test_a_server_that_sends_without_end_is_cut_off(world, web, tmp_path):
    web.fault = lambda asked, n, body: (200, b" " * 2**25, 2**25) if asked == "recipe.json" else (200, body, len(body))
    with pytest.raises(CacheDamaged, match=r"has more than the .* bytes that are read"):
        pull(web.url, world.key, tmp_path / "there")


def test_a_missing_shard_shows_when_the_cache_opens(world, web):
    (world.store.path(world.key) / SHARD).unlink()
    with pytest.raises(CacheDamaged, match=r"http://.*/shards/000001\.zarr\.zip is missing"):
        open_cache(web.url, world.key)


# Pull, and stores in folders


def test_a_pull_meets_what_stands_here(world, other, tmp_path):
    mine = Store(tmp_path / "mine")
    writer = OtherWorld(tmp_path / "mine").writer()
    writer.write(1, other.shard(1), {})
    with pytest.raises(CacheConflict, match=r"records/000001\.json commits a shard with the sha256 .* other bytes"):
        pull(world.store, world.key, mine)
    shutil.rmtree(mine.path(world.key))
    assert pull(world.store, world.key, mine).moved == 8
    assert pull(world.store, world.key, mine).moved == 0


def test_a_pull_repairs_a_damaged_copy(world, tmp_path):
    mine = Store(tmp_path / "mine")
    pull(world.store, world.key, mine)
    folder = mine.path(world.key)
    (folder / "shards/000000.zarr.zip").unlink()
    (folder / "shards/000002.zarr.zip").write_bytes(b"short")
    assert len(pull(world.store, world.key, mine).repaired) == 2
    flipped = bytearray((folder / SHARD).read_bytes())
    flipped[100] ^= 4
    (folder / SHARD).write_bytes(flipped)
    (folder / "records/000000.json").write_bytes(b"{}")
    # Names and sizes are right: only who reads the bytes sees it.
    assert not verify(mine, world.key).ok
    report = pull(world.store, world.key, mine, repair=True)
    assert [name.rsplit("/", 1)[1] for name in report.repaired] == ["000000.json", "000001.zarr.zip"]
    assert tree(folder) == tree(world.store.path(world.key))


def test_a_pull_goes_to_a_folder(world):
    with pytest.raises(CacheError, match="is no folder of this machine"):
        pull(world.store, world.key, "s3://bucket/path")


# What a user can get wrong


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/path", "a store is a folder or begins with s3://, gs://, az://, https://, hf://"),
        ("http://example.org/caches", "plain http is for this machine only"),
        ("https://me:secret@example.org/caches", "holds no login and no query"),
        ("https://example.org/caches?token=1", "holds no login and no query"),
        ("az://container/path", "no storage account; set AZURE_STORAGE_ACCOUNT_NAME"),
        ("hf://models/owner/name", "write hf://datasets/owner/name"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url, says, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(CacheError) as error:
        open_store(url)
    assert says in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_made_from_a_url_is_still_a_url(tmp_path):
    from pathlib import Path

    assert open_store(Path("s3://bucket/some/path")).root == "s3://bucket/some/path"
    assert isinstance(open_store(tmp_path), Store)


def test_a_bucket_that_is_not_there_is_named(world, s3):
    for attempt in (
        lambda: open_cache("s3://no-such-bucket/path", world.key),
        lambda: push(world.store, world.key, "s3://no-such-bucket/path"),
    ):
        with pytest.raises(CacheError, match="there is no bucket s3://no-such-bucket; check its name") as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_server_that_is_not_there_is_named(world, monkeypatch):
    for name, value in s3_environment(1).items():
        monkeypatch.setenv(name, value)
    for url in (f"s3://{BUCKET}/path", "http://127.0.0.1:1/path"):
        with pytest.raises(CacheError, match="is not reachable; check the network") as error:
            open_cache(url, world.key)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "says"), [(401, "no credentials that"), (403, "access denied")])
def test_a_refusal_says_how_to_log_in(world, web, status, says):
    web.fault = lambda asked, n, body: (status, b"", 0)
    with pytest.raises(CacheError, match=says) as error:
        open_cache(web.url, world.key)
    assert "\n" not in str(error.value)


def test_a_key_that_no_cache_has_lists_what_is_there(world, s3):
    with pytest.raises(CacheMissing, match="it is empty; fill it with fpo store push"):
        open_cache(s3, "ab")
    push(world.store, world.key, s3)
    wrong = "0" if world.key[0] != "0" else "1"
    with pytest.raises(CacheMissing, match=f"it holds 1 caches\n  {world.key}"):
        open_cache(s3, wrong)


# Streaming


def bytes_in(folder):
    """Of whole and unfinished shards; some may go while we look."""
    total = 0
    for path in folder.glob("*.zarr.zip*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_cache_streams_with_less_disk_than_it_has(world, web, tmp_path):
    cache = open_cache(web.url, world.key)
    largest = max(entry.size for entry in cache.manifest.shards)
    assert cache.manifest.n_bytes > 2.5 * largest
    shelf = Shelf(tmp_path / "shelf", max_bytes=int(2.2 * largest))
    cache = open_cache(web.url, world.key, shelf)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(3), (10, 1)), axis=1).ravel().tolist()
    cache.prefetch(order)
    for sid in order:
        assert same(cache.shard(sid), world.shard(sid))
        assert bytes_in(shelf.root) <= shelf.max_bytes


def test_what_is_expected_is_fetched_ahead_once(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([2, 0, 1])
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "shelf").glob("*.zarr.zip"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    asked = {name: n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name}
    assert asked == {f"shards/{sid:06d}.zarr.zip": 1 for sid in range(3)}
    for sid in (2, 0, 1):
        assert same(cache.shard(sid), world.shard(sid))
    # Another process with the same shelf fetches nothing.
    assert same(open_cache(web.url, world.key, Shelf(tmp_path / "shelf")).shard(0), world.shard(0))
    assert sum(n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name) == 3


def test_a_damaged_shard_on_the_shelf_is_fetched_again(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.shard(0)
    (path,) = (tmp_path / "shelf").glob("*.zarr.zip")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert same(cache.shard(0), world.shard(0))
    assert web.requests["GET", "shards/000000.zarr.zip"] == 2


def test_a_shelf_that_cannot_be_written_only_costs_speed(world, web, tmp_path, caplog):
    (tmp_path / "shelf").write_text("a file, not a folder")
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([0, 1, 2])
    for sid in (0, 1, 2, 0):
        assert same(cache.shard(sid), world.shard(sid))
    assert sum("shards are not kept" in line for line in caplog.messages) == 1


def test_a_fault_ahead_is_told_when_its_shard_is_read(world, web, tmp_path):
    def flip(asked, n, body):
        return FAULTS["flips a bit"](body) if asked == SHARD else (200, body, len(body))

    web.fault = flip
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([0, 1, 2])
    assert same(cache.shard(0), world.shard(0))
    with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip has .* bytes with the sha256"):
        cache.shard(1)
    assert same(cache.shard(2), world.shard(2))


def test_the_bound_is_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FPO_SHARDS", str(tmp_path))
    monkeypatch.setenv("FPO_SHARDS_GIB", "0.5")
    assert (Shelf().root, Shelf().max_bytes) == (tmp_path, 2**29)
    monkeypatch.setenv("FPO_SHARDS_GIB", "much")
    with pytest.raises(CacheError, match="FPO_SHARDS_GIB is 'much'"):
        Shelf()
