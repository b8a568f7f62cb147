"""Stores on a plain web server and in other folders, servers that misbehave, and URLs that cannot be used."""

import shutil
from pathlib import Path

import pytest
from store_cases import FEATURES, TOP_LOGITS, World, same, tree
from store_servers import BUCKET, FAULTS, OtherWorld, s3_environment, sealed, web_server

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete, CacheMissing
from fpo.store import CacheWriter, Shelf, Store, open_cache, open_store, pull, push, verify
from fpo.store.remote.bucket import BucketFolder

obstore = pytest.importorskip("obstore")

SHARD = "shards/000001.zarr.zip"


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


@pytest.mark.parametrize("name", ["recipe.json", "manifest.json"])
def test_opening_fetches_what_arrived_damaged_again_as_pull_does(world, web, tmp_path, name):
    flipped = FAULTS["flips a bit"]
    web.fault = lambda asked, n, body: flipped(body) if asked == name and n <= 2 else (200, body, len(body))
    assert open_cache(web.url, world.key, Shelf(tmp_path / "shelf")).n_groups == 5
    assert web.requests["GET", name] == 3


@pytest.mark.parametrize("name", ["recipe.json", "manifest.json", SHARD])
def test_a_server_that_sends_a_byte_at_a_time_is_given_up_in_one_line(world, web, tmp_path, monkeypatch, name):
    monkeypatch.setattr("fpo.store.remote.pace.WINDOW_SECONDS", 0.2)
    web.dripping = name
    with pytest.raises(CacheError, match=rf"cannot read .*{name}: \d+ bytes arrived in .* s, at least 65536") as caught:
        pull(web.url, world.key, tmp_path / "there")
    assert "\n" not in str(caught.value)
    assert web.requests["GET", name] == 1


def test_a_server_that_never_answers_is_given_up_in_one_line(world, web, tmp_path, monkeypatch):
    monkeypatch.setattr("fpo.store.remote.pace.ANSWER_SECONDS", 0.2)
    web.mute = True
    with pytest.raises(CacheError, match="is not reachable") as caught:
        pull(web.url, world.key, tmp_path / "there")
    assert "\n" not in str(caught.value)


def test_a_web_server_has_no_listing_so_the_full_key_is_needed(world, web):
    with pytest.raises(CacheMissing, match=r"is no full key, and http.* no listing: give the 64 digits"):
        open_cache(web.url, world.key[:8])
    with pytest.raises(CacheMissing, match=r"no cache ababab.*give the 64 digits"):
        open_cache(web.url, "ab" * 32)


def test_a_web_server_is_read_only(world, web):
    with pytest.raises(CacheError, match=r"is read-only \(plain https\)"):
        push(world.store, world.key, web.url)


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


# Columns, where nothing can be listed


@pytest.fixture
def wide(tmp_path):
    return sealed(World, tmp_path / "wide", specs=(FEATURES, TOP_LOGITS))


def test_a_web_server_gives_the_columns_that_are_named_by_all_digits(wide, tmp_path):
    with web_server(wide.store.root) as web:
        alone = pull(web.url, wide.key, tmp_path / "there")
        assert (alone.moved, alone.columns, alone.listed) == (8, (), False)
        named = pull(web.url, wide.key, tmp_path / "there", columns=[wide.column_key(0)])
        assert (named.base.moved, [part.moved for part in named.columns]) == (0, [12])
        for name in (wide.column_key(0)[:8], "ab" * 32):
            with pytest.raises(CacheMissing, match="give the 64 digits of a column that is there"):
                pull(web.url, wide.key, tmp_path / "there", columns=[name])
        assert verify(web.url, wide.key).columns == {}
        assert verify(web.url, wide.key, columns=[wide.column_key(1)]).columns == {wide.column_key(1): 3}
    expected = {name: data for name, data in tree(wide.path).items() if wide.column_key(1) not in name}
    assert tree(tmp_path / "there" / wide.key) == expected


def test_a_web_server_serves_a_column_by_what_it_holds(wide, tmp_path):
    """Its key follows from what is asked for where it is cut as the base is."""
    with web_server(wide.store.root) as web:
        cache = open_cache(web.url, wide.key, Shelf(tmp_path / "shelf"), columns=[TOP_LOGITS])
        assert same(cache.shard(1).columns[0], wide.beside(1).columns[1])


def test_a_faulty_server_does_no_harm_to_a_column(wide, tmp_path):
    name = f"columns/{wide.column_key(0)}/shards/000003.zarr.zip"
    flipped = FAULTS["flips a bit"]
    columns = [wide.column_key(0)]
    with web_server(wide.store.root) as web:
        web.fault = lambda asked, n, body: flipped(body) if asked == name else (200, body, len(body))
        with pytest.raises(CacheDamaged, match=name):
            pull(web.url, wide.key, tmp_path / "there", columns=columns)
        assert verify(tmp_path / "there", wide.key).ok
        web.fault = lambda asked, n, body: flipped(body) if asked == name and n <= 6 else (200, body, len(body))
        pull(web.url, wide.key, tmp_path / "there", columns=columns)
    assert verify(tmp_path / "there", wide.key).columns == {wide.column_key(0): 5}


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


@pytest.mark.parametrize(
    ("url", "text", "says"),
    [
        ("s3://b/p", "Error performing PUT http://169.254.169.254/latest/api/token", "set AWS_ACCESS_KEY_ID and"),
        (
            "gs://b/p",
            "GET http://metadata.google.internal/computeMetadata",
            "run gcloud auth application-default login",
        ),
        ("gs://b/p", "404: The specified bucket does not exist.", "there is no bucket gs://b;"),
        ("s3://b/p", "error sending request for url", "b is not reachable; check the network"),
        (
            "s3://b/p",
            "500 Internal\nServer  Error\n\nDebug source:\nGeneric {",
            "500 Internal Server Error; run the same",
        ),
    ],
)
def test_what_an_object_store_says_becomes_one_line(url, text, says):
    error = BucketFolder(url)._as_cache_error("read", "recipe.json", obstore.exceptions.GenericError(text))
    assert says in str(error)
    assert str(error).startswith(f"cannot read {url}/recipe.json: ")
    assert "\n" not in str(error)


def test_nothing_is_built_at_a_url(world):
    for url in ("s3://bucket/path", Path("s3://bucket/path")):
        with pytest.raises(CacheError, match="is a URL: caches are built, tagged and removed in a folder"):
            CacheWriter(url, world.recipe, world.plan)


def test_a_path_made_from_a_url_is_still_a_url(tmp_path):
    assert open_store(Path("s3://bucket/some/path")).root == "s3://bucket/some/path"
    assert isinstance(open_store(tmp_path), Store)


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
