import enum
import hashlib
import itertools
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo.canonical import canonical_json
from fpo.errors import CacheError, ModelError
from fpo.memo import file_facts, forget, memo_folder, remember
from fpo.scoring.weights import file_digest, weights_digest
from fpo.store import cache_key, default_store, plan_shards
from fpo.store.format.plan import cut_shards, permutation


@pytest.fixture(autouse=True)
def memo(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fpo-memo"


def test_canonical_json_is_spelled_out():
    assert canonical_json({"b": [1, True, None], "a": {"ü": "x\n"}}) == '{"a":{"ü":"x\\n"},"b":[1,true,null]}'.encode()
    assert canonical_json((1, 2)) == b"[1,2]"


def test_a_golden_key():
    """sha256sum of the very text, so that no refactoring renames everybody's caches."""
    text = b'{"format":1,"groups":{"seed":0},"scorer":{"dtype":"float32"}}'
    key = cache_key({"scorer": {"dtype": "float32"}, "groups": {"seed": 0}, "format": 1})
    assert key == hashlib.sha256(text).hexdigest()
    assert key == "618954edbfa25e071663d0319887d692316a2422e06e96d913a5651ed6e883a9"


class Level(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value", [0.5, float("nan"), np.float64(1), np.int64(1), b"x", {1: 2}, {1, 2}, Level.ONE], ids=repr
)
def test_what_has_several_spellings_is_refused(value):
    with pytest.raises(TypeError, match=r"canonical JSON: .*\$\.a\[0\]"):
        canonical_json({"a": [value]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@settings(deadline=None)
@given(json_values)
def test_canonical_json_reads_back_and_is_a_fixed_point(value):
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def safetensors(path, tensors, order=None):
    """name -> (dtype, shape, bytes), laid out in this order."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name in order or tensors:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


TENSORS = {
    "b": ("F32", [2], struct.pack("<2f", 1, 2)),
    "a": ("BF16", [1, 2], b"\x01\x02\x03\x04"),
    "empty": ("F32", [0], b""),
}


def test_weights_digest_follows_its_definition(tmp_path):
    rows = [[n, TENSORS[n][0], TENSORS[n][1], hashlib.sha256(TENSORS[n][2]).hexdigest()] for n in ("a", "b", "empty")]
    text = json.dumps(rows, separators=(",", ":"))
    found = weights_digest([safetensors(tmp_path / "m.safetensors", TENSORS)])
    assert found == hashlib.sha256(text.encode()).hexdigest()


def test_weights_digest_survives_sharding_order_and_metadata(tmp_path):
    whole = safetensors(tmp_path / "m.safetensors", TENSORS)
    turned = safetensors(tmp_path / "t.safetensors", TENSORS, ["empty", "a", "b"])
    parts = [safetensors(tmp_path / f"{n}.safetensors", {n: TENSORS[n]}) for n in ("b", "empty", "a")]
    assert weights_digest([whole]) == weights_digest([turned]) == weights_digest(parts)


@pytest.mark.parametrize(
    "change",
    [{"a": ("F16", [1, 2], b"\x01\x02\x03\x04")}, {"a": ("BF16", [2], b"\x01\x02\x03\x04")},
     {"a": ("BF16", [1, 2], b"\x01\x02\x03\x05")}, {"c": ("F32", [0], b"")}],
)  # fmt: skip
def test_weights_digest_changes_with_dtype_shape_bytes_and_names(tmp_path, change):
    one = weights_digest([safetensors(tmp_path / "one", TENSORS)])
    assert one != weights_digest([safetensors(tmp_path / "other", TENSORS | change)])


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = [safetensors(tmp_path / n, {"a": TENSORS["a"]}) for n in ("x", "y")]
    with pytest.raises(ModelError, match="y: the tensor a stands in another of these files too"):
        weights_digest(files)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x02", struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"{..}",
     struct.pack("<Q", 9) + b'{"a": {}}'],
)  # fmt: skip
def test_other_files_are_no_safetensors(tmp_path, data):
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is not a whole safetensors file"):
        weights_digest([tmp_path / "pytorch_model.bin"])


ONE = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    "header",
    [f'{{"a": {ONE}, "a": {ONE}}}', f'{{"a": {ONE}, "b": {ONE}}}', '{"a": ' + "[" * 100_000, "\udcff",
     '{"a": {"dtype": "F32", "shape": [2], "shape": [1, 2], "data_offsets": [0, 8]}}',
     '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}'],
)  # fmt: skip
def test_headers_that_the_library_refuses_or_reads_in_two_ways_give_no_digest(tmp_path, header):
    text = header.encode("utf-8", "surrogateescape")
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match=r"m\.safetensors is not a whole safetensors file"):
        weights_digest([tmp_path / "m.safetensors"])


def test_truncated_and_missing_weights_are_named(tmp_path):
    path = safetensors(tmp_path / "m.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"m\.safetensors is not a whole safetensors file .*not fully covered"):
        weights_digest([path])
    for digest in (lambda: weights_digest([tmp_path / "no"]), lambda: file_digest(tmp_path / "no")):
        with pytest.raises(ModelError, match=r"cannot read .*no: No such file"):
            digest()


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once: the second of their times cannot be set back."""
    monkeypatch.setattr("fpo.scoring.weights._SETTLED_NS", 0)


def test_a_file_is_hashed_once_until_it_changes(tmp_path, memo, settled, monkeypatch):
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(1) or real(file, name))
    path = tmp_path / "w"
    path.write_bytes(b"one")
    assert file_digest(path) == file_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert len(hashed) == 1
    assert len(list(memo.iterdir())) == 1
    path.write_bytes(b"two")
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()


def swapped_in_place(path):
    with open(path, "r+b") as file:
        file.seek(2**19)
        file.write(b"changed")


def made_anew(path):
    """As an image layer or a package store does; the file system gives the freed inode again."""
    data = bytearray(path.read_bytes())
    data[2**19 : 2**19 + 7] = b"changed"
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("change", [swapped_in_place, made_anew])
@pytest.mark.parametrize("mtime", [0, 10**18])
def test_a_file_that_changed_under_a_kept_mtime_is_hashed_again(tmp_path, memo, settled, change, mtime):
    """The change lies in none of the places that are sampled."""
    path = tmp_path / "w"
    path.write_bytes(bytes(3 * 2**20))
    os.utime(path, ns=(mtime, mtime))
    file_digest(path)
    change(path)
    os.utime(path, ns=(mtime, mtime))
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("place", [0, 3 * 2**19, 3 * 2**20 - 7])
def test_a_file_is_known_by_its_head_middle_and_tail(tmp_path, monkeypatch, place):
    """Where a file system keeps no time that programs cannot set."""
    path = tmp_path / "w"
    path.write_bytes(bytes(3 * 2**20))
    before = file_facts(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"changed")
    after = file_facts(path)
    assert before["sample"] != after["sample"]


def test_what_changed_while_it_was_read_is_not_remembered(memo):
    facts = iter([{"file": 2}])
    assert remember({"file": 1}, lambda: {"x": "of another file"}, lambda: next(facts)) == {"x": "of another file"}
    assert remember({"file": 1}, lambda: {"x": "right"}) == {"x": "right"}


def test_what_was_remembered_can_be_dropped(memo):
    remember({"a": 1}, lambda: {"x": 1})
    forget({"a": 1})
    forget({"a": 2})
    assert remember({"a": 1}, lambda: {"x": 2}) == {"x": 2}


def test_without_a_home_the_memo_is_in_the_temporary_folder_and_nobody_elses(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert remember({"a": 1}, lambda: {"x": 1}) == {"x": 1}
    assert remember({"a": 1}, lambda: pytest.fail("not remembered")) == {"x": 1}
    assert memo_folder().parent == tmp_path
    memo_folder().chmod(0o777)  # others could have written notes there
    assert remember({"a": 1}, lambda: {"x": 2}) == {"x": 2}
    monkeypatch.delenv("FPO_STORE", raising=False)
    with pytest.raises(CacheError, match="no home folder; say where caches are kept: --store or FPO_STORE"):
        default_store()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, memo):
    """It may change again within one tick of the file system's clock, and nothing would show it."""
    (tmp_path / "w").write_bytes(b"one")
    file_digest(tmp_path / "w")
    assert not memo.exists()


def test_remember_computes_once_per_question(memo):
    asked = []

    def compute():
        asked.append(1)
        return {"fvu": 0.25}

    assert remember({"a": 1}, compute) == remember({"a": 1}, compute) == {"fvu": 0.25}
    assert remember({"a": 2}, compute) == {"fvu": 0.25}
    assert len(asked) == 2


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d.replace(b"11", b"12"), lambda d: d[:-3], lambda d: b"[1]"]
)
def test_a_damaged_note_is_not_believed(memo, damage):
    remember({"a": 1}, lambda: {"x": 11})
    (note,) = memo.iterdir()
    note.write_bytes(damage(note.read_bytes()))
    assert remember({"a": 1}, lambda: {"x": 13}) == {"x": 13}
    assert remember({"a": 1}, lambda: {"x": 14}) == {"x": 13}


def test_without_a_writable_home_everything_still_works(memo, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "denied")

    monkeypatch.setattr("fpo.memo.keep", refuse)
    assert remember({"a": 1}, lambda: {"x": 1}) == {"x": 1}


def test_a_golden_permutation():
    """The order of the raw Philox numbers of key 7: numpy promises that stream for ever."""
    numbers = [int(n) for n in np.random.Philox(key=7).random_raw(6)]
    assert permutation(6, 7).tolist() == sorted(range(6), key=lambda i: numbers[i])
    assert permutation(6, 7).tolist() == [4, 1, 3, 2, 5, 0]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=40),
    st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 60), st.integers(1, 900),
)  # fmt: skip
def test_a_plan_holds_every_group_once_and_closes_shards_as_late_as_it_may(sizes, seed, groups, tokens, n_bytes):
    counts = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    plan = plan_shards(counts[:, 0], counts[:, 1], seed, groups, tokens, n_bytes)
    assert sorted(np.concatenate([*plan, np.empty(0, np.int64)]).tolist()) == list(range(len(counts)))

    def fits(ids):
        n_tokens, n_completions = counts[ids].sum(axis=0)
        # Of a group: id, count, weight and one split; of a completion: digest, split, score, sum; of a token: id,
        # log-prob, mask.
        raw = len(ids) * (8 + 4 + 4 + 8) + n_completions * (16 + 8 + 4 + 4) + n_tokens * (4 + 4 + 1)
        return len(ids) <= groups and n_tokens <= tokens and raw <= n_bytes

    assert all(len(shard) == 1 or fits(shard) for shard in plan)
    assert not any(fits(np.append(shard, after[0])) for shard, after in itertools.pairwise(plan))


def test_the_plan_shuffles_and_depends_on_the_seed_alone():
    n_tokens, n_completions = np.full(5000, 3), np.full(5000, 2)
    one, again, other = (plan_shards(n_tokens, n_completions, seed) for seed in (1, 1, 2))
    assert [len(ids) for ids in one] == [2048, 2048, 904]
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    # 2048 of 0..4999 drawn without order: mean 2499.5, standard error below 25.
    assert abs(one[0].mean() - 2499.5) < 100


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=8), max_size=6), st.integers(1, 99))
def test_a_column_is_cut_where_the_base_is_and_between_as_late_as_it_may(shards, n_bytes):
    """Each list is a shard of the base: what a column takes of each of its groups."""
    sizes = np.array([size for shard in shards for size in shard], np.int64)
    found = cut_shards([len(shard) for shard in shards], sizes, n_bytes)
    assert found == cut_shards([len(shard) for shard in shards], sizes, n_bytes)
    ends = np.cumsum([0, *found])
    base = np.cumsum([0, *map(len, shards)])
    assert set(base) <= set(ends)
    # An empty shard of the base is an empty one of the column, so that every base shard begins one of the column's.
    assert sum(count == 0 for count in found) == sum(not shard for shard in shards)
    for start, end in itertools.pairwise(ends):
        assert end - start <= 1 or sizes[start:end].sum() <= n_bytes
        if end not in base:
            assert sizes[start : end + 1].sum() > n_bytes
