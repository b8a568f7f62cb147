"""The bytes of a shard, of a base and of every kind of column: they give back what was written, or are refused."""

import dataclasses
import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from store_cases import (
    EVERY_FEATURE,
    FEATURES,
    HIDDEN_GRAM,
    KEY,
    MISMATCHED,
    PROMPT_FEATURES,
    SIZES,
    SPECS,
    TOP_LOGITS,
    VOCAB,
    column_bounds,
    column_rows,
    make_groups,
    ragged_sizes,
    same,
)

from fpo.store.format.archive import pack, unpack
from fpo.store.format.encoding import MAX_RAW_BYTES, ColumnRows, decode_shard, encode_shard, schema
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import BaseBounds, ColumnBounds, Invalid

GROUPS = make_groups(SIZES)
BOUNDS = BaseBounds(VOCAB, score_mask=False)
SHARD = encode_shard(GROUPS, KEY, 3, BOUNDS)

CASES = {
    "base": (GROUPS, BOUNDS),
    "masked base": (make_groups(SIZES, score_mask=True), BaseBounds(VOCAB, score_mask=True)),
    "features": (column_rows(FEATURES, GROUPS), column_bounds(FEATURES)),
    "every feature": (column_rows(EVERY_FEATURE, GROUPS), column_bounds(EVERY_FEATURE)),
    "prompt features": (column_rows(PROMPT_FEATURES, GROUPS), column_bounds(PROMPT_FEATURES)),
    "top logits": (column_rows(TOP_LOGITS, GROUPS), column_bounds(TOP_LOGITS)),
    "hidden gram": (column_rows(HIDDEN_GRAM, GROUPS), column_bounds(HIDDEN_GRAM)),
    "mismatched": (column_rows(MISMATCHED, GROUPS), column_bounds(MISMATCHED)),
}
"""Name -> rows and the bounds that their recipe promises."""
SHARDS = {name: encode_shard(rows, KEY, 3, bounds) for name, (rows, bounds) in CASES.items()}

each_case = pytest.mark.parametrize("case", CASES)


def decoded(data, case, key=KEY, sid=3):
    return decode_shard(data, key, sid, CASES[case][1])


@settings(deadline=None, max_examples=60)
@given(ragged_sizes, st.booleans(), st.integers(0, 99))
def test_a_base_shard_gives_back_what_was_written(sizes, score_mask, seed):
    groups = make_groups(sizes, seed=seed, score_mask=score_mask)
    bounds = BaseBounds(VOCAB, score_mask)
    data = encode_shard(groups, KEY, 3, bounds)
    assert same(decode_shard(data, KEY, 3, bounds), groups)
    assert data == encode_shard(make_groups(sizes, seed=seed, score_mask=score_mask), KEY, 3, bounds)


@settings(deadline=None, max_examples=60)
@given(ragged_sizes, st.sampled_from(SPECS), st.integers(0, 99))
def test_a_column_shard_gives_back_what_was_written(sizes, spec, seed):
    rows, bounds = column_rows(spec, make_groups(sizes), seed), column_bounds(spec)
    data = encode_shard(rows, KEY, 3, bounds)
    assert same(decode_shard(data, KEY, 3, bounds), rows)
    assert data == encode_shard(column_rows(spec, make_groups(sizes), seed), KEY, 3, bounds)


def test_a_score_that_says_nothing_is_one_nan_and_no_other():
    """The quiet NaN 0x7fc00000 comes back bit by bit; the same fact in other bits would be other bytes."""
    assert np.isnan(GROUPS.score).any()
    score = GROUPS.score.copy()
    for bits in (0x7FC00001, 0xFFC00000, 0x7FA00000):
        score.view(np.uint32)[1] = bits
        with pytest.raises(Invalid, match=r"score\[1\] is neither a number nor the NaN that says nothing"):
            encode_shard(dataclasses.replace(GROUPS, score=score), KEY, 3, BOUNDS)


@each_case
def test_shards_open_with_plain_zarr(tmp_path, case):
    """A second reader, which knows nothing of this package, finds the same arrays."""
    rows, bounds = CASES[case]
    (tmp_path / "000003.zarr.zip").write_bytes(SHARDS[case])
    with zarr.storage.ZipStore(tmp_path / "000003.zarr.zip", mode="r") as opened:
        group = zarr.open_group(opened, mode="r", zarr_format=3)
        n_tokens = GROUPS.n_tokens if "base" in case else 0
        assert dict(group.attrs) == {
            "format": 1, "key": KEY, "n_completions": 10, "n_groups": 5, "n_tokens": n_tokens, "shard": 3,
        }  # fmt: skip
        assert {path for path, _ in group.members(max_depth=None)} == set(schema(bounds))
        for name, spec in schema(bounds).items():
            assert group[name].metadata.dimension_names == spec.dimensions
            assert np.array_equal(group[name][...], array_of(rows, name), equal_nan=spec.dtype == "float32")


@each_case
def test_every_document_is_what_zarr_itself_would_write(case):
    """Created by zarr's public API for each array's own shape; only the spelling is canonical."""
    rows, bounds = CASES[case]
    members = unpack(SHARDS[case])
    for name in schema(bounds):
        found = json.loads(bytes(members[f"{name}/zarr.json"]))
        array = array_of(rows, name)
        made = zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=array.shape,
            chunks=tuple(max(n, 1) for n in array.shape),
            dtype=array.dtype,
            fill_value={"uint64": 2**64 - 1, "uint32": 2**32 - 1, "uint8": 255, "float32": np.nan}[array.dtype.name],
            dimension_names=found["dimension_names"],
            serializer=zarr.codecs.BytesCodec(endian="little"),
            compressors=zarr.codecs.ZstdCodec(level=1, checksum=True),
        )
        assert found == json.loads(json.dumps(made.metadata.to_dict()))


def array_of(rows, name):
    return getattr(rows, name) if hasattr(rows, name) else getattr(rows.column, name)


def test_an_empty_shard_opens_with_plain_zarr(tmp_path):
    (tmp_path / "0.zip").write_bytes(encode_shard(make_groups([]), KEY, 0, BOUNDS))
    with zarr.storage.ZipStore(tmp_path / "0.zip", mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        assert group["completion_digest"][:].shape == (0, 16)
        assert group["splits"][:].tolist() == [0]


@each_case
def test_the_zip_is_an_ordinary_one_with_sorted_stored_members(case):
    with zipfile.ZipFile(io.BytesIO(SHARDS[case])) as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {(i.compress_type, i.date_time, i.flag_bits, i.extra) for i in infos} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 0, b"")
    }


@each_case
def test_flipped_bytes_of_a_shard_are_refused_even_without_its_checksum(case):
    """Every byte of the base, every third of the others."""
    for position in range(0, len(SHARDS[case]), 1 if case == "base" else 3):
        flipped = bytearray(SHARDS[case])
        flipped[position] ^= 0x10
        with pytest.raises(Invalid):
            decoded(bytes(flipped), case)


@each_case
@pytest.mark.parametrize("cut", [0, 1, 29, 0.5, -1])
def test_a_truncated_shard_is_refused(case, cut):
    data = SHARDS[case]
    with pytest.raises(Invalid):
        decoded(data[: int(cut * len(data)) if 0 < cut < 1 else cut], case)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(junk):
    for data in (junk, SHARD + junk + b"x", b"PK\x03\x04" + junk):
        with pytest.raises(Invalid):
            decoded(data, "base")


def members(case="base") -> dict[str, bytes]:
    return {name: bytes(data) for name, data in unpack(SHARDS[case]).items()}


@settings(deadline=None)
@given(st.data())
def test_random_members_are_refused_behind_a_valid_zip(data):
    """The zip layer is made valid again, so that the fuzz reaches metadata, frames and arrays."""
    case = data.draw(st.sampled_from(sorted(CASES)))
    changed = members(case)
    name = data.draw(st.sampled_from(sorted(changed)))
    original = changed[name]
    changed[name] = data.draw(st.one_of(st.binary(max_size=60), st.just(original[:-1]), st.just(original + b"\0")))
    if changed[name] != original:
        with pytest.raises(Invalid):
            decoded(pack(changed), case)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "input_ids/c/1", "c:\\evil", "group_id/.zarray", "n\nl"])
def test_unknown_members_are_refused(name):
    with pytest.raises(Invalid, match="members missing or unknown"):
        decoded(pack({**members(), name: b"x"}), "base")


@each_case
def test_every_missing_member_is_refused(case):
    for name in members(case):
        fewer = members(case)
        del fewer[name]
        with pytest.raises(Invalid):
            decoded(pack(fewer), case)


def rewritten(compression: int = zipfile.ZIP_STORED, duplicate: str | None = None, comment: bytes = b"") -> bytes:
    """The same members as another program would zip them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members().items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
        archive.comment = comment
        if duplicate is not None:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(duplicate, b"x")
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        rewritten(zipfile.ZIP_DEFLATED),
        rewritten(duplicate="input_ids/c/0"),
        rewritten(comment=b"hello"),
        SHARD + b"\0",
        b"#!/bin/sh\n" + SHARD,
        SHARD.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),  # encrypted
        SHARD[:-2] + b"\x01\x00",
    ],
    ids=["compressed", "duplicate", "comment", "tail", "head", "encrypted", "comment length"],
)
def test_any_other_zip_of_the_same_members_is_refused(data):
    with pytest.raises(Invalid, match="not a zip file as this format writes it"):
        decoded(data, "base")


def spelled(document) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [5, 1]},
        {"zarr_format": 2},
        {"data_type": "object"},
        {"fill_value": 0},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"chunk_key_encoding": {"configuration": {"separator": "."}, "name": "default"}},
        {"chunk_grid": {"configuration": {"chunk_shape": [2]}, "name": "regular"}},
        {"attributes": {"x": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["base", "features"])
def test_other_array_metadata_is_refused(case, change):
    changed = members(case)
    changed["group_id/zarr.json"] = spelled(json.loads(changed["group_id/zarr.json"]) | change)
    with pytest.raises(Invalid, match=r"group_id/zarr\.json inside it|claim \d+ bytes"):
        decoded(pack(changed), case)


def with_shape(changed: dict[str, bytes], path: str, shape: list[int]) -> None:
    metadata = json.loads(changed[f"{path}/zarr.json"])
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    changed[f"{path}/zarr.json"] = spelled(metadata)


def refused_in_little_memory(data, case, match):
    tracemalloc.start()
    with pytest.raises(Invalid, match=match):
        decoded(data, case)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


@pytest.mark.parametrize(
    ("case", "array", "shape"),
    [
        ("base", "input_ids", [MAX_RAW_BYTES // 4]),
        ("base", "input_ids", [2**24]),
        ("base", "completion_digest", [2**20, 16]),
        ("masked base", "score_mask", [2**26]),
        ("features", "indices", [2**24]),
        ("every feature", "acts", [2**24]),
        ("prompt features", "active", [2**24]),
        ("top logits", "logps", [2**20, 2]),
        ("top logits", "indices", [2, 2**24]),
        ("hidden gram", "products", [2**24]),
        ("hidden gram", "products", [2**25 + 1]),
    ],
)
def test_a_shape_that_its_frame_does_not_hold_is_refused_before_memory_is_filled(case, array, shape):
    changed = members(case)
    with_shape(changed, array, shape)
    refused_in_little_memory(pack(changed), case, f"{array} claims the shape|{array} does not hold|claim")


@pytest.mark.parametrize(("case", "array"), [("base", "input_ids"), ("features", "acts"), ("hidden gram", "products")])
def test_a_zstd_bomb_is_refused_without_unpacking_it(case, array):
    """32 kB that unpack to 256 MB, under a shape of a few entries."""
    changed = members(case)
    changed[f"{array}/c/0"] = zstd.compress(np.zeros(2**28, np.uint8), 1, True)
    refused_in_little_memory(pack(changed), case, f"{array} does not hold the")


def test_a_frame_without_checksum_is_refused():
    changed = members()
    changed["input_ids/c/0"] = zstd.compress(GROUPS.input_ids, 1, False)
    with pytest.raises(Invalid, match="input_ids does not hold"):
        decoded(pack(changed), "base")


@pytest.mark.parametrize("bit", [8, 16], ids=["reserved", "unused"])
def test_a_frame_with_a_bit_set_that_means_nothing_is_refused(bit):
    """RFC 8878 has a decoder ignore bit 4 of the descriptor: it would be a second spelling of the same array."""
    changed = members()
    frame = bytearray(changed["input_ids/c/0"])
    frame[4] |= bit
    changed["input_ids/c/0"] = bytes(frame)
    with pytest.raises(Invalid, match="input_ids does not hold"):
        decoded(pack(changed), "base")


@pytest.mark.parametrize("behind", ["an empty frame", "the same again", "a skippable frame", "more"])
def test_a_chunk_with_something_behind_its_frame_is_refused(behind):
    """zstd unpacks what it needs and says nothing of the rest, which could hide anything and is a second spelling."""
    changed = members()
    frame = changed["input_ids/c/0"]
    hidden = {
        "an empty frame": zstd.compress(b"", 1, True),
        "the same again": frame,
        "a skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00evil",
        "more": zstd.compress(b"more", 1, True),
    }
    changed["input_ids/c/0"] = frame + hidden[behind]
    with pytest.raises(Invalid, match=rf"input_ids does not hold the {4 * GROUPS.n_tokens} bytes of its shape in one"):
        decoded(pack(changed), "base")


@each_case
@pytest.mark.parametrize(("key", "sid"), [("cd" * 32, 3), (KEY, 4)])
def test_a_shard_of_another_cache_or_place_is_refused(case, key, sid):
    with pytest.raises(Invalid, match=rf"not that of shard {sid} of {key[:12]}"):
        decoded(SHARDS[case], case, key, sid)


def test_a_shard_that_claims_other_counts_than_it_holds_is_refused():
    changed = members()
    root = json.loads(changed["zarr.json"])
    for field in ("n_groups", "n_completions", "n_tokens"):
        altered = root | {"attributes": root["attributes"] | {field: root["attributes"][field] + 1}}
        with pytest.raises(
            Invalid, match=r"its arrays hold 5 groups with 10 completions and \d+ tokens, its zarr.json"
        ):
            decoded(pack(changed | {"zarr.json": spelled(altered)}), "base")


def test_too_large_a_shard_is_not_written(monkeypatch):
    monkeypatch.setattr("fpo.store.format.encoding.MAX_RAW_BYTES", 100)
    with pytest.raises(Invalid, match="a shard holds at most 100"):
        encode_shard(GROUPS, KEY, 3, BOUNDS)


def changed_array(case: str, name: str, place: tuple[int, ...], value: float):
    """The rows of this case with one element changed."""
    rows = CASES[case][0]
    array = array_of(rows, name).copy()
    array[place] = value
    if isinstance(rows, Groups) or name == "group_id":
        return dataclasses.replace(rows, **{name: array})
    return dataclasses.replace(rows, column=dataclasses.replace(rows.column, **{name: array}))


@pytest.mark.parametrize(
    ("case", "name", "place", "value", "message"),
    [
        ("base", "group_id", (1,), 0, "group_id holds the same group twice"),
        ("base", "n_completions", (0,), 0, "n_completions holds a 0, or does not add up to the 10"),
        ("base", "n_completions", (0,), 3, "does not add up to the 10 rows of completion_digest"),
        ("base", "input_ids", (2,), VOCAB, "input_ids holds 100, vocab_size is 100"),
        ("base", "input_ids", (2,), VOCAB - 1, r"completion_digest\[0\] is not the digest of that completion's"),
        ("base", "completion_digest", (9, 15), 0, r"completion_digest\[9\]"),
        ("base", "splits", (0,), 1, "splits does not rise from 0"),
        ("base", "splits", (2,), 60, "splits does not rise"),
        ("base", "splits", (-1,), 99, "splits does not rise"),
        ("base", "score", (3,), np.inf, r"score\[3\] is neither a number nor the NaN"),
        ("base", "weight", (4,), 0, "weight holds what is no number above 0"),
        ("base", "weight", (4,), -1, "weight holds what is no number above 0"),
        ("base", "weight", (4,), np.nan, "weight holds what is no number above 0"),
        ("base", "weight", (4,), np.inf, "weight holds what is no number above 0"),
        ("base", "token_logps", (0,), np.nan, r"token_logps holds nan at \[0\]"),
        ("base", "token_logps", (3,), 0.5, "token_logps holds 0.5: a log-prob is at most 0"),
        ("base", "token_logps", (3,), -50, r"ref_logps\[1\] is"),
        ("base", "ref_logps", (5,), -np.inf, r"ref_logps holds -inf at \[5\]"),
        ("base", "ref_logps", (5,), -1e4, r"ref_logps\[5\] is -10000"),
        ("masked base", "score_mask", (0,), 2, r"score_mask holds 2: a token counts \(1\) or not \(0\)"),
        ("features", "group_id", (1,), 0, "group_id holds the same group twice"),
        ("features", "splits", (-1,), 1000, "splits does not rise from 0"),
        ("features", "indices", (0,), 50, "indices holds 50, d_sae is 50"),
        ("features", "acts", (1,), np.nan, r"acts holds nan at \[1\]"),
        ("every feature", "active", (0,), 0, r"row 0 keeps \d features, with 0 active and top_k all"),
        ("every feature", "active", (0,), 11, r"active holds 11, d_sae \+ 1 is 10"),
        ("every feature", "tail_sq", (0,), -1, "tail_sq holds a negative sum of squares"),
        ("prompt features", "tail_sq", (0,), np.inf, r"tail_sq holds inf at \[0\]"),
        ("top logits", "splits", (1,), 99, "splits does not rise from 0"),
        ("top logits", "indices", (2, 1), VOCAB, "indices holds 100, vocab_size is 100"),
        ("top logits", "logps", (2, 1), 0.5, "logps holds 0.5: a log-prob is at most 0"),
        ("top logits", "logps", (2, 1), np.nan, r"logps holds nan at \[2, 1\]"),
        ("hidden gram", "products", (3,), np.inf, r"products holds inf at \[3\]"),
        ("hidden gram", "splits", (0,), 1, "splits does not rise from 0"),
    ],
)  # fmt: skip
def test_each_broken_invariant_is_named(case, name, place, value, message):
    with pytest.raises(Invalid, match=message):
        encode_shard(changed_array(case, name, place, value), KEY, 3, CASES[case][1])


def test_a_token_that_does_not_count_is_no_part_of_the_sum():
    """Its log-prob may change alone; that of a counting one may not. And the digest tells the masks apart."""
    groups, bounds = CASES["masked base"]
    silent, counting = (int(np.flatnonzero(groups.score_mask == said)[0]) for said in (0, 1))
    encode_shard(changed_array("masked base", "token_logps", (silent,), -50), KEY, 3, bounds)
    with pytest.raises(Invalid, match="its token_logps sum to"):
        encode_shard(changed_array("masked base", "token_logps", (counting,), -50), KEY, 3, bounds)
    with pytest.raises(Invalid, match="is not the digest of that completion's tokens"):
        encode_shard(changed_array("masked base", "score_mask", (silent,), 1), KEY, 3, bounds)


def test_indices_must_ascend_inside_a_row_only():
    features = CASES["every feature"][0].column
    row = int(np.argmax(features.lengths >= 2))
    start = int(features.splits[row])
    with pytest.raises(Invalid, match=f"does not ascend inside a row, at entry {start + 1}"):
        encode_shard(
            changed_array("every feature", "indices", (start + 1,), int(features.indices[start])),
            KEY, 3, CASES["every feature"][1],
        )  # fmt: skip
    assert (features.indices[1:] <= features.indices[:-1]).any()  # between rows they fall


@pytest.mark.parametrize(
    ("case", "bounds", "message"),
    [
        ("base", BaseBounds(VOCAB, True), "score_mask is missing, the recipe says True"),
        ("masked base", BaseBounds(VOCAB, False), "score_mask is there, the recipe says False"),
        ("features", ColumnBounds("features", 50, 1), r"row \d keeps \d features, with \d active and top_k 1"),
        ("features", ColumnBounds("prompt_features", 50, 4), "it holds Features, the recipe says prompt_features"),
        ("top logits", ColumnBounds("top_logits", m=3, vocab_size=VOCAB), r"indices is uint32 \(\d+, 2\)"),
        ("top logits", ColumnBounds("hidden_gram"), "it holds TopLogits, the recipe says hidden_gram"),
    ],
)
def test_rows_that_do_not_fit_the_recipe_are_not_written(case, bounds, message):
    with pytest.raises(Invalid, match=message):
        encode_shard(CASES[case][0], KEY, 3, bounds)


@pytest.mark.parametrize("case", ["features", "prompt features"])
@pytest.mark.parametrize("other", CASES)
def test_bytes_of_one_kind_are_not_read_as_another(case, other):
    """But for features of completions and of prompts where their counts agree, which the recipe alone tells apart."""
    if schema(CASES[case][1]) == schema(CASES[other][1]) and case == other:
        return
    with pytest.raises(Invalid):
        decoded(SHARDS[other], case)


def test_wrong_dtypes_are_refused():
    groups = dataclasses.replace(GROUPS, ref_logps=GROUPS.ref_logps.astype(np.float64))
    with pytest.raises(Invalid, match=r"ref_logps is float64 \(10,\), it must be float32 \(10,\)"):
        encode_shard(groups, KEY, 3, BOUNDS)


def test_a_column_shard_with_other_rows_than_completions_is_refused():
    rows, bounds = CASES["features"]
    with pytest.raises(Invalid, match="splits is uint64"):
        encode_shard(ColumnRows(rows.group_id, 9, rows.column), KEY, 3, bounds)


def test_a_hostile_frame_header_is_read_within_its_bytes():
    changed = members()
    for tail in (b"", b"\x24", b"\xe4" + struct.pack("<Q", 2**63)):
        changed["input_ids/c/0"] = b"\x28\xb5\x2f\xfd" + tail
        with pytest.raises(Invalid, match="input_ids does not hold"):
            decoded(pack(changed), "base")
