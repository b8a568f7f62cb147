import errno
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from store_cases import FEATURES, PLAN, Part, World, column_rows, make_groups, make_recipe, same, tree, unmarked

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheIncomplete
from fpo.store import CacheWriter, Store, open_cache, verify
from fpo.store.beside import column_recipe
from fpo.store.files import Folder
from fpo.store.format.groups import Groups
from fpo.store.format.plan import cut_shards


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "store")


@pytest.fixture(params=[None, 1], ids=["base", "column"])
def part(request, world):
    """What is written: the base, or a column beside a base that is there, of the same three shards."""
    if request.param is not None:
        world.fill_base()
    return Part(world, request.param)


def test_a_sealed_cache_gives_back_its_groups(world):
    key = world.fill().key
    cache = open_cache(world.store.root, key[:6])
    assert (cache.key, cache.shard_groups, cache.n_groups, cache.n_completions) == (key, [2, 2, 1], 5, 10)
    assert all(same(cache.shard(sid), world.shard(sid)) for sid in range(3))
    assert cache.recipe == world.recipe
    assert cache.manifest.facts == {"self_check": {"fvu": "0.12"}}
    assert verify(world.store, key).ok


def test_a_column_stands_beside_its_base_and_changes_nothing_of_it(world):
    before = tree(world.store.path(world.fill_base().key))
    for n in range(2):
        assert world.fill_column(n).folder.root == world.column_path(n)
    assert {name: data for name, data in tree(world.path).items() if not name.startswith("columns/")} == before
    finer = Part(world, 0)
    assert all(same(finer.sealed().shard(sid), finer.rows(sid)) for sid in range(5))


def test_the_same_groups_give_the_same_cache(world, tmp_path):
    other = World(tmp_path / "other")
    assert unmarked(tree(world.store.path(world.fill().key))) == unmarked(tree(other.store.path(other.fill().key)))


def test_shards_may_come_in_any_order_from_several_writers(part):
    first, second = part.writer(), part.writer()
    first.write(2, part.rows(2), {})
    assert second.missing() == [0, 1]
    second.write(1, part.rows(1), {})
    first.write(0, part.rows(0), {})
    assert first.missing() == second.missing() == []
    assert first.seal({}) == second.seal({})


def test_threads_that_write_everything_agree(part):
    errors = []

    def fill():
        try:
            writer = part.writer()
            for sid in np.random.default_rng(threading.get_ident() % 2**32).permutation(3):
                writer.write(int(sid), part.rows(int(sid)), {"thread": threading.get_ident()})
            writer.seal({})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert verify(part.world.store, part.world.key).ok
    assert os.listdir(part.path / "tmp") == []


def nudged(rows):
    """The same rows scored on another device: other low bits."""
    if isinstance(rows, Groups):
        return replace(rows, ref_logps=np.nextafter(rows.ref_logps, np.float32(-9)))
    return replace(rows, column=replace(rows.column, logps=np.nextafter(rows.column.logps, np.float32(-9))))


def test_the_first_writer_wins(part):
    first, second = part.writer(), part.writer()
    first.write(0, part.rows(0), {"who": "first"})
    before = tree(part.path)
    second.write(0, nudged(part.rows(0)), {"who": "second"})
    assert tree(part.path) == before


def test_the_first_seal_wins(part):
    facts = part.fill().seal({}).facts
    before = tree(part.path)
    assert part.writer().seal({"another": "fact"}).facts == facts
    assert tree(part.path) == before


def test_a_shard_without_a_record_is_adopted(part):
    writer = part.writer()
    writer.write(0, part.rows(0), {"who": "killed"})
    folder = part.path
    (folder / "records/000000.json").unlink()
    assert part.writer().missing() == [1, 2]
    assert b'"adopted": true' in (folder / "records/000000.json").read_bytes()


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "planned elsewhere"])
def test_a_damaged_shard_without_a_record_is_computed_again(part, damage):
    writer = part.writer()
    writer.write(1, part.rows(1), {})
    folder = part.path
    other = (folder / "shards/000001.zarr.zip").read_bytes()
    (folder / "shards/000000.zarr.zip").write_bytes(other if damage is None else damage)
    assert part.writer().missing() == [0, 2]
    part.fill()
    assert verify(part.world.store, part.world.key).ok
    assert os.listdir(folder / "tmp") == []


def test_a_damaged_shard_that_appears_under_a_running_writer_does_not_stop_it(part):
    writer = part.writer()
    (part.path / "shards/000000.zarr.zip").write_bytes(b"junk")
    writer.write(0, part.rows(0), {})
    assert writer.missing() == [1, 2]


def test_a_whole_shard_that_replaced_a_damaged_one_meanwhile_is_kept(part):
    """Two writers saw junk; one has put the real shard there before the other removes what it saw."""
    writer = part.writer()
    writer.write(0, part.rows(0), {})
    before = tree(part.path)
    writer._discard(0)
    assert tree(part.path) == before


def test_seal_names_the_missing_shards(part):
    writer = part.writer()
    writer.write(1, part.rows(1), {})
    with pytest.raises(CacheIncomplete, match=r"1 of 3 shards are done, missing \[0, 2\]"):
        writer.seal({})


def test_seal_refuses_a_shard_that_changed_since_and_says_how_to_repair_it(part):
    writer = part.writer()
    for sid in range(3):
        writer.write(sid, part.rows(sid), {})
    folder = part.path
    shard = folder / "shards/000001.zarr.zip"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip has the sha256 .*\n  or delete only it and") as caught:
        writer.seal({})
    assert "records/000001.json" in str(caught.value)
    shard.unlink()
    (folder / "records/000001.json").unlink()
    part.fill()
    assert verify(part.world.store, part.world.key).ok


def test_a_record_whose_shard_is_gone_takes_the_same_shard_back_and_no_other(part):
    writer = part.writer()
    writer.write(0, part.rows(0), {})
    shard = part.path / "shards/000000.zarr.zip"
    shard.unlink()
    assert writer.missing() == [0, 1, 2]
    writer.write(0, part.rows(0), {})
    assert writer.missing() == [1, 2]
    shard.unlink()
    with pytest.raises(CacheConflict, match=r"records/000000\.json commits a shard with sha256"):
        writer.write(0, nudged(part.rows(0)), {})


def test_groups_must_be_the_planned_ones(part):
    with pytest.raises(ValueError, match=r"shard 0 must hold the groups \[3, 0\], got \[4, 1\]"):
        part.writer().write(0, part.rows(1), {})


def test_a_nan_from_the_model_is_not_written(world):
    shard = world.shard(0)
    broken = replace(shard, token_logps=np.full_like(shard.token_logps, np.nan))
    writer = world.writer()
    with pytest.raises(CacheError, match=r"shard 0 is not written to .*: token_logps holds nan at \[0\]"):
        writer.write(0, broken, {})
    assert writer.missing() == [0, 1, 2]


def test_other_groups_than_the_recipe_promises_are_not_sealed(world):
    """Same ids, other tokens: only the digest over all groups can tell."""
    other = make_groups([(2, (2, 2))] * 5, seed=9)
    writer = world.writer()
    for sid, ids in enumerate(PLAN):
        writer.write(sid, other.take(ids), {})
    with pytest.raises(CacheConflict, match=r"have the digest .*, its recipe says"):
        writer.seal({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"groups": {}}, "groups.digest: Field required"),
        ({"scorer": {"vocab_size": "100"}}, "scorer.vocab_size: Input should be a valid integer"),
        ({"scorer": {"vocab_size": 2**32}}, "scorer.vocab_size: Input should be less than"),
        ({"base": "ab" * 32}, "column: Field required"),
    ],
)
def test_a_recipe_that_the_store_cannot_use_is_refused(world, change, message):
    with pytest.raises(ValueError, match=message):
        CacheWriter(world.store, world.recipe | change, world.plan)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"kind": "logits"},
            "Input should be 'features', 'prompt_features', 'top_logits', 'hidden_gram' or 'mismatched'",
        ),
        ({"kind": "features", "d_sae": 9}, "a column of features needs top_k"),
        ({"kind": "features", "d_sae": 9, "top_k": 0}, "top_k"),
        ({"kind": "prompt_features", "top_k": 4}, "a column of prompt_features needs d_sae"),
        ({"kind": "top_logits", "m": 4}, "a column of top_logits needs vocab_size"),
        ({"kind": "mismatched"}, "a column of mismatched needs vocab_size"),
        ({}, "kind: Field required"),
    ],
)
def test_a_column_recipe_that_the_store_cannot_use_is_refused(world, spec, message):
    with pytest.raises(ValueError, match=message):
        CacheWriter(world.store, column_recipe(world.key, spec, [2, 2, 1]), world.plan)


def test_a_plan_that_does_not_fit_the_recipe_is_refused(part):
    with pytest.raises(ValueError, match=r"must be \[len\(ids\) for ids in plan\]"):
        CacheWriter(part.world.store, part.recipe, part.plan[:2])
    with pytest.raises(ValueError, match="holds a group twice"):
        CacheWriter(part.world.store, part.recipe, [PLAN[0], PLAN[0], PLAN[2]])


@pytest.mark.parametrize("n", [0, 1])
def test_caches_of_no_group_and_of_one_group_work(tmp_path, n):
    groups = make_groups([(1, (2,))] * n)
    rows, plan = column_rows(FEATURES, groups), [np.arange(n)] * n
    writer = CacheWriter(Store(tmp_path), make_recipe(groups, plan), plan)
    column = CacheWriter(Store(tmp_path), column_recipe(writer.key, FEATURES, [n] * n), plan)
    for sid in writer.missing():
        writer.write(sid, groups, {})
        column.write(sid, rows, {})
    writer.seal({})
    column.seal({})
    cache = open_cache(tmp_path, writer.key, columns=[FEATURES])
    assert cache.n_groups == n
    assert all(same(cache.shard(sid), groups.with_columns([rows.column])) for sid in range(n))
    assert verify(tmp_path, writer.key).ok


def test_a_shard_of_no_group_has_one_of_every_column_beside_it(tmp_path):
    groups = make_groups([(1, (2,))])
    plan = [np.arange(0), np.arange(1), np.arange(0)]
    writer = CacheWriter(Store(tmp_path), make_recipe(groups, plan), plan)
    column = CacheWriter(Store(tmp_path), column_recipe(writer.key, FEATURES, cut_shards([0, 1, 0], [8])), plan)
    for sid, ids in enumerate(plan):
        writer.write(sid, groups.take(ids), {})
        column.write(sid, column_rows(FEATURES, groups.take(ids)), {})
    writer.seal({})
    column.seal({})
    cache = open_cache(tmp_path, writer.key, columns=[FEATURES])
    assert [len(cache.shard(sid).columns[0]) for sid in range(3)] == [0, 1, 0]
    assert verify(tmp_path, writer.key).ok


def test_groups_may_keep_the_row_numbers_of_a_dataset_with_gaps(tmp_path):
    groups = make_groups([(1, (1, 1)), (1, (2, 1))], ids=[17, 90])
    plan = [np.array([90]), np.array([17])]
    writer = CacheWriter(Store(tmp_path), make_recipe(groups, plan), plan)
    writer.write(0, groups.take([1]), {})
    writer.write(1, groups.take([0]), {})
    writer.seal({})
    assert verify(tmp_path, writer.key).ok


def failing(name, code, monkeypatch, only=""):
    """os.NAME fails with this errno for paths that contain `only`."""
    real = getattr(os, name)

    def call(*args, **kwargs):
        if not only or any(only in str(arg) for arg in args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("write", errno.ENOSPC, "No space left on device; free some space and run the same command again"),
        ("fsync", errno.EIO, "Input/output error; the disk reports a failure"),
        ("open", errno.EROFS, "Read-only file system; choose a writable store with --store or FPO_STORE"),
        ("open", errno.EACCES, "Permission denied; check its permissions"),
        ("link", errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_refuses_gives_one_clear_line_and_loses_nothing(part, monkeypatch, call, code, message):
    writer = part.writer()
    writer.write(0, part.rows(0), {})
    with monkeypatch.context() as broken:
        failing(call, code, broken)
        with pytest.raises(CacheError, match=message) as caught:
            writer.write(1, part.rows(1), {})
    assert "\n" not in str(caught.value)
    assert "000001.zarr.zip" in str(caught.value)
    assert os.listdir(writer.folder.root / "tmp") == []
    part.fill()
    assert verify(part.world.store, part.world.key).ok


def test_what_is_complete_on_a_read_only_disk_needs_no_writing(part, monkeypatch):
    manifest = part.fill().seal({})
    real = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    writer = part.writer()
    assert writer.missing() == []
    assert writer.seal({}) == manifest
    assert open_cache(part.world.store, part.world.key, columns="all").n_groups == 5


def test_a_whole_shard_of_another_plan_is_replaced_before_it_is_recorded(part):
    """Valid by itself, but not the groups that the plan gives to this number."""
    first = part.writer()
    first.plan[0] = np.array([4, 1], np.uint64)
    first.write(0, part.rows(1), {})
    (first.folder.root / "records/000000.json").unlink()
    writer = part.writer()
    assert writer.missing() == [0, 1, 2]
    part.fill()
    assert verify(part.world.store, part.world.key).ok


def test_a_damaged_record_names_its_repair_and_the_repair_works(part):
    folder = part.fill().folder.root
    whole = tree(folder)
    (folder / "manifest.json").unlink()
    (folder / "records/000001.json").write_bytes(whole["records/000001.json"][:-1])
    with pytest.raises(CacheDamaged, match=r"000001\.json is damaged: .*; delete it and run fpo cache again"):
        part.writer().seal({"self_check": {"fvu": "0.12"}})
    (folder / "records/000001.json").unlink()
    part.fill()
    assert tree(folder)["manifest.json"] == whole["manifest.json"]


def test_short_writes_are_continued(part, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:100])))
    part.fill()
    assert verify(part.world.store, part.world.key).ok


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="renameat2")
@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV], ids=errno.errorcode.get)
def test_without_hard_links_files_are_still_created_once(world, monkeypatch, code):
    failing("link", code, monkeypatch)
    key = world.fill().key
    folder = world.store.folder(key)
    assert verify(world.store, key).ok
    assert folder.create("manifest.json", b"other") is False
    assert open_cache(world.store, key).n_groups == 5
    assert os.listdir(folder.root / "tmp") == []


def test_without_any_way_not_to_replace_the_store_refuses(world, monkeypatch):
    failing("link", errno.EPERM, monkeypatch)
    monkeypatch.setattr("fpo.store.files.sys.platform", "plan9")
    with pytest.raises(CacheError, match=r"cannot write .*recipe\.json"):
        world.writer()


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path, monkeypatch):
    """NFS repeats the request and reports that the name is taken: by ourselves."""
    real = os.link

    def answer_lost(source, target):
        real(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    folder = Folder(tmp_path)
    folder.prepare()
    monkeypatch.setattr(os, "link", answer_lost)
    assert folder.create("a", b"mine") is True
    monkeypatch.setattr(os, "link", real)
    assert folder.create("a", b"other") is False
    assert folder.read("a", 10) == b"mine"


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="/proc")
def test_a_shard_is_on_disk_before_its_name_and_its_name_before_its_record(part, monkeypatch):
    """kill -9 keeps the page cache, so durability is shown by the order of the calls."""
    writer = part.writer()
    calls = []

    def traced(name, describe):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(describe(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def place(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "folder" if os.path.isdir(path) else "file"
        return f"fsync {kind} {os.path.basename(path).split('.')[0]}"

    traced("fsync", place)
    traced("link", lambda source, target: f"link {target.parent.name}/{target.name.split('.')[0]}")
    writer.write(2, part.rows(2), {})
    assert calls == [
        "fsync file 000002", "link shards/000002", "fsync folder shards",
        "fsync file 000002", "link records/000002", "fsync folder records",
    ]  # fmt: skip
