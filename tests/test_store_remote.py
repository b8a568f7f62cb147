"""Stores in an object store: push, pull and read, against moto's S3, with what goes wrong on the way."""

import dataclasses
import multiprocessing

import numpy as np
import pytest
from store_cases import FEATURES, TOP_LOGITS, World, make_groups, make_recipe, same, tree
from store_servers import BUCKET, OtherWorld, dropping_proxy, s3_environment, s3_server, sealed

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from fpo.store import CacheWriter, Shelf, Store, open_cache, open_store, pull, push, tag, verify
from fpo.store.remote.bucket import BucketFolder
from fpo.store.remote.transfer import CLAIM

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def s3_port():
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port, monkeypatch, request):
    """The URL of an empty store."""
    for name, value in s3_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is worth waiting for."""
    monkeypatch.setattr("fpo.store.remote.bucket.RETRY_SECONDS", 1.0)
    monkeypatch.setattr("fpo.store.shards._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("fpo.store.remote.streaming.PATIENCE_SECONDS", 0.1)


@pytest.fixture
def world(tmp_path):
    return sealed(World, tmp_path / "here")


@pytest.fixture
def other(tmp_path):
    """The same key with other bytes."""
    return sealed(OtherWorld, tmp_path / "other")


def digest(world: World) -> str:
    return open_cache(world.store, world.key).digest


def remote_names(url: str, key: str) -> set[str]:
    paths = [meta["path"] for batch in obstore.list(BucketFolder(url)._store) for meta in batch]
    return {path.removeprefix(f"{key}/") for path in paths}


def drop(url: str, key: str, name: str) -> None:
    obstore.delete(BucketFolder(url)._store, f"{key}/{name}")


def bytes_there(url: str, key: str, name: str) -> bytes:
    return BucketFolder(url).inside(key).read(name, 10**6)


def test_a_tag_travels_with_the_cache_that_it_names(world, s3, tmp_path):
    tag(world.store, world.key, "uf-v1")
    assert push(world.store, "uf-v1", s3).tag == "uf-v1"
    assert open_cache(s3, "uf-v1", Shelf(tmp_path / "shelf")).key == world.key
    (summary,) = open_store(s3).summaries()
    assert summary.tags == ("uf-v1",)
    assert pull(s3, "uf-v1", tmp_path / "there").tag == "uf-v1"
    assert Store(tmp_path / "there").tags() == {"uf-v1": world.key}
    # Again, and by its key: nothing more is said.
    assert push(world.store, "uf-v1", s3).moved == 0
    assert push(world.store, world.key, s3).tag is None


@pytest.mark.parametrize("there", ["url", "folder"])
def test_a_tag_of_another_cache_is_not_moved_and_nothing_is_copied(world, s3, tmp_path, there):
    target = s3 if there == "url" else tmp_path / "target"
    small = make_groups([(1, (1, 1))])
    writer = CacheWriter(tmp_path / "small", make_recipe(small, [np.array([0])]), [np.array([0])])
    writer.write(0, small, {})
    writer.seal({})
    tag(tmp_path / "small", writer.key, "mine")
    push(tmp_path / "small", "mine", target)
    tag(world.store, world.key, "mine")
    with pytest.raises(CacheConflict, match=rf"the tag mine in .* stands for {writer.key[:12]}, not for") as caught:
        push(world.store, "mine", target)
    assert "\n" not in str(caught.value)
    assert open_store(target).keys() == [writer.key]
    assert open_store(target).tags() == {"mine": writer.key}


def test_ls_at_a_url_says_what_a_cache_was_made_from(tmp_path, s3):
    world = World(tmp_path / "here", specs=())
    writer = world.writer()
    inputs = {"reference": {"model": "google/gemma-2-2b-it"}, "data": {"source": "ultrafeedback", "split": "train"}}
    for sid in range(3):
        writer.write(sid, world.shard(sid), {"inputs": inputs})
    writer.seal({})
    push(world.store, writer.key, s3)
    (summary,) = open_store(s3).summaries()
    assert (summary.reference, summary.data) == ("google/gemma-2-2b-it", "ultrafeedback train")


@pytest.mark.parametrize("odd", ["a\x01b", "../x", "\x1b[2J"])
def test_an_object_whose_name_is_no_path_is_named_and_full_keys_still_work(world, s3, s3_port, odd, tmp_path):
    boto3 = pytest.importorskip("boto3")
    push(world.store, world.key, s3)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")
    client.put_object(Bucket=BUCKET, Key=f"{s3.removeprefix(f's3://{BUCKET}/')}/{odd}", Body=b"x")
    with pytest.raises(CacheError, match=r"an object with a name that is no path .* by all 64") as caught:
        open_store(s3).keys()
    assert str(caught.value).isprintable()
    assert pull(s3, world.key, tmp_path / "there").moved == 8


def test_a_listing_that_does_not_end_is_given_up_in_one_line(world, s3, monkeypatch):
    push(world.store, world.key, s3)
    monkeypatch.setattr("fpo.store.remote.pace.LISTING_SECONDS", 0.0)
    with pytest.raises(CacheError, match=r"cannot list .*: it did not end in 0 s; give the full key") as caught:
        open_store(s3).keys()
    assert "\n" not in str(caught.value)


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
    assert (summary.key, summary.complete, summary.base.shards_done, summary.n_groups) == (world.key, True, 3, 5)


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
    world = World(tmp_path, specs=())
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


def test_a_server_without_conditional_writes_is_refused(world, s3, monkeypatch):
    real = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, path, data, **options: real(store, path, data))
    with pytest.raises(CacheError, match="ignores conditional writes"):
        push(world.store, world.key, s3)
    assert remote_names(s3, world.key) == {CLAIM}


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
    monkeypatch.setattr("fpo.store.remote.bucket.RETRY_SECONDS", 10.0)
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
    key = world_class(root, specs=()).key
    store = Store(root)
    start.wait()
    try:
        push(store, key, url, threads=2)
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


def test_a_bucket_that_is_not_there_is_named(world, s3):
    for attempt in (
        lambda: open_cache("s3://no-such-bucket/path", world.key),
        lambda: push(world.store, world.key, "s3://no-such-bucket/path"),
    ):
        with pytest.raises(CacheError, match="there is no bucket s3://no-such-bucket; check its name") as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_key_that_no_cache_has_lists_what_is_there(world, s3):
    with pytest.raises(CacheMissing, match="it is empty; fill it with fpo store push"):
        open_cache(s3, "ab")
    push(world.store, world.key, s3)
    wrong = "0" if world.key[0] != "0" else "1"
    with pytest.raises(CacheMissing, match=f"it holds 1 caches\n  {world.key}"):
        open_cache(s3, wrong)


# Columns


@pytest.fixture
def wide(tmp_path):
    """A cache with two columns, of five shards and of three."""
    return sealed(World, tmp_path / "wide", specs=(FEATURES, TOP_LOGITS))


def test_columns_travel_behind_their_base_and_read_as_here(wide, s3, tmp_path, monkeypatch):
    real, written, seen = BucketFolder.create, [], []

    def noting(self, name, data):
        written.append(self.where(name))
        return real(self, name, data)

    monkeypatch.setattr(BucketFolder, "create", noting)
    report = push(wide.store, wide.key, s3, threads=1, on_object=lambda done, total: seen.append((done, total)))
    # Recipe, manifest, and a shard and a record for each shard.
    moved = {part.key: part.moved for part in report.parts}
    assert moved == {wide.key: 8, wide.column_key(0): 12, wide.column_key(1): 8}
    n_bytes = wide.store.summary(wide.key).n_bytes
    assert {total for _, total in seen} == {n_bytes}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == n_bytes
    sealed_at = written.index(f"{s3}/{wide.key}/manifest.json")
    assert all("/columns/" in name for name in written[sealed_at + 1 :])
    assert not any("/columns/" in name for name in written[:sealed_at])
    cache = open_cache(s3, wide.key, Shelf(tmp_path / "shelf"), columns=wide.specs)
    assert all(same(cache.shard(sid), wide.beside(sid)) for sid in range(3))
    assert verify(s3, wide.key).columns == {wide.column_key(0): 5, wide.column_key(1): 3}
    pull(s3, wide.key, tmp_path / "there")
    assert tree(Store(tmp_path / "there").path(wide.key)) == tree(wide.path)
    (summary,) = open_store(s3).summaries()
    assert {column.key for column in summary.columns} == {wide.column_key(0), wide.column_key(1)}
    assert push(wide.store, wide.key, s3).moved == 0


def test_a_base_goes_alone_and_a_column_later(wide, s3, tmp_path):
    assert push(wide.store, wide.key, s3, columns=()).moved == 8
    with pytest.raises(CacheMissing, match=r"has no column of top 2 logits .* add it with: fpo cache RECIPE"):
        open_cache(s3, wide.key, Shelf(tmp_path / "shelf"), columns=[TOP_LOGITS])
    later = push(wide.store, wide.key, s3, columns=[wide.column_key(1)[:8]])
    assert (later.base.moved, later.base.present) == (0, 8)
    assert [(part.key, part.name, part.moved) for part in later.columns] == [(wide.column_key(1), "top 2 logits", 8)]
    pulled = pull(s3, wide.key, tmp_path / "there", columns=[wide.column_key(1)])
    assert pulled.moved == 16
    cache = open_cache(tmp_path / "there", wide.key, columns="all")
    assert [column.held for column in cache.columns] == [TOP_LOGITS]


def test_a_push_that_is_cut_in_a_column_continues_there(wide, s3, tmp_path, monkeypatch):
    real = BucketFolder.create

    def failing(self, name, data):
        if wide.column_key(0) in self.url and name == "shards/000004.zarr.zip":
            raise CacheError("the line is cut")
        return real(self, name, data)

    monkeypatch.setattr(BucketFolder, "create", failing)
    columns = [wide.column_key(0)]
    with pytest.raises(CacheError, match="the line is cut"):
        push(wide.store, wide.key, s3, columns=columns, threads=1)
    # The base is whole and serves; the column is not there yet.
    assert verify(s3, wide.key).notes[0].endswith("top 4: [5a5a5a5a], 4 of 5 shards); push it again")
    with pytest.raises(CacheMissing, match="has no column of features"):
        open_cache(s3, wide.key, Shelf(tmp_path / "shelf"), columns=[FEATURES])
    monkeypatch.setattr(BucketFolder, "create", real)
    rest = push(wide.store, wide.key, s3, columns=columns)
    # Recipe, four shards and four records stood; the fifth of each and the manifest were missing.
    assert (rest.base.moved, rest.columns[0].moved, rest.columns[0].present) == (0, 3, 9)
    assert verify(s3, wide.key).ok


def test_other_bytes_of_a_column_are_a_conflict_and_the_base_stays(wide, s3, tmp_path):
    push(wide.store, wide.key, s3)
    other = World(tmp_path / "other", wide.specs)
    other.fill_base()
    halved = dataclasses.replace(other.groups.columns[1], logps=other.groups.columns[1].logps * np.float32(0.5))
    other.groups = dataclasses.replace(other.groups, columns=(other.groups.columns[0], halved))
    other.fill_column(1)
    with pytest.raises(CacheConflict, match=rf"{wide.column_key(1)} holds other bytes under the same key") as error:
        push(other.store, other.key, s3)
    assert "\n" not in str(error.value)
    assert verify(s3, wide.key).ok
    assert push(other.store, other.key, s3, columns=()).moved == 0


def test_an_unfinished_column_stays_at_home_unless_it_is_named(tmp_path, s3):
    world = World(tmp_path / "here")
    world.fill_base()
    world.column_writer(0).write(2, world.column_shard(0, 2), {})
    assert push(world.store, world.key, s3).columns == ()
    with pytest.raises(CacheIncomplete, match=f"{world.column_key(0)} is not complete: 1 of 5 shards are done"):
        push(world.store, world.key, s3, columns=[world.column_key(0)])


def test_a_damaged_column_does_not_leave_and_is_named(wide, s3):
    path = wide.column_path(0) / "shards/000004.zarr.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match=rf"{wide.column_key(0)}/shards/000004\.zarr\.zip has .* the manifest says"):
        push(wide.store, wide.key, s3)
    assert f"columns/{wide.column_key(0)}/manifest.json" not in remote_names(s3, wide.key)
    assert open_cache(s3, wide.key).n_groups == 5
