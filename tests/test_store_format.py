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
from store_cases import HOOKPOINTS, KEY, LENGTHS, VOCAB, make_pairs, ragged_lengths, same

from fpo.store.format.archive import pack, unpack
from fpo.store.format.encoding import MAX_RAW_BYTES, decode_shard, encode_shard, schema
from fpo.store.format.invariants import Bounds, Invalid

BOUNDS = Bounds(VOCAB, ((50, 4), (9, None)), 2)
PAIRS = make_pairs(LENGTHS)
SHARD = encode_shard(PAIRS, KEY, 3, BOUNDS)


@settings(deadline=None)
@given(ragged_lengths, st.integers(0, 2), st.sampled_from([(), HOOKPOINTS, HOOKPOINTS[:1]]), st.integers(0, 99))
def test_a_shard_gives_back_what_was_written(lengths, top_logits, hookpoints, seed):
    pairs = make_pairs(lengths, seed=seed, hookpoints=hookpoints, top_logits=top_logits)
    widths = tuple((d, None if k == "all" else int(k)) for d, k in hookpoints)
    bounds = Bounds(VOCAB, widths, top_logits)
    data = encode_shard(pairs, KEY, 3, bounds)
    assert same(decode_shard(data, KEY, 3, bounds), pairs)
    assert data == encode_shard(
        make_pairs(lengths, seed=seed, hookpoints=hookpoints, top_logits=top_logits), KEY, 3, bounds
    )


def test_shards_open_with_plain_zarr(tmp_path):
    (tmp_path / "000003.zarr.zip").write_bytes(SHARD)
    with zarr.storage.ZipStore(tmp_path / "000003.zarr.zip", mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        assert dict(group.attrs) == {
            "format": 1, "key": KEY, "n_pairs": 5, "n_tokens": PAIRS.n_tokens, "shard": 3,
        }  # fmt: skip
        assert np.array_equal(group["input_ids"][:], PAIRS.input_ids)
        assert np.array_equal(group["ref_logps"][:], PAIRS.ref_logps)
        assert np.array_equal(group["features/1/acts"][:], PAIRS.features[1].acts)
        assert group["top_logits/logps"].metadata.dimension_names == ("scored_token", "rank")
        paths = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
        assert paths == set(schema(2, True))


def test_an_empty_shard_opens_with_plain_zarr(tmp_path):
    pairs = make_pairs([])
    (tmp_path / "0.zip").write_bytes(encode_shard(pairs, KEY, 0, BOUNDS))
    with zarr.storage.ZipStore(tmp_path / "0.zip", mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        assert group["ref_logps"][:].shape == (0, 2)
        assert group["splits"][:].tolist() == [0]


def test_the_zip_is_an_ordinary_one_with_sorted_stored_members():
    with zipfile.ZipFile(io.BytesIO(SHARD)) as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {(i.compress_type, i.date_time, i.flag_bits, i.extra) for i in infos} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 0, b"")
    }


def test_every_flipped_byte_of_a_shard_is_refused_even_without_its_checksum():
    for position in range(len(SHARD)):
        flipped = bytearray(SHARD)
        flipped[position] ^= 0x10
        with pytest.raises(Invalid):
            decode_shard(bytes(flipped), KEY, 3, BOUNDS)


@pytest.mark.parametrize("size", [0, 1, 29, len(SHARD) // 2, len(SHARD) - 1])
def test_a_truncated_shard_is_refused(size):
    with pytest.raises(Invalid):
        decode_shard(SHARD[:size], KEY, 3, BOUNDS)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(junk):
    for data in (junk, SHARD + junk + b"x", b"PK\x03\x04" + junk):
        with pytest.raises(Invalid):
            decode_shard(data, KEY, 3, BOUNDS)


def members() -> dict[str, bytes]:
    return {name: bytes(data) for name, data in unpack(SHARD).items()}


@settings(deadline=None)
@given(st.data())
def test_random_members_are_refused_behind_a_valid_zip(data):
    """The zip layer is made valid again, so that the fuzz reaches metadata, frames and arrays."""
    changed = members()
    name = data.draw(st.sampled_from(sorted(changed)))
    original = changed[name]
    changed[name] = data.draw(st.one_of(st.binary(max_size=60), st.just(original[:-1]), st.just(original + b"\0")))
    if changed[name] != original:
        with pytest.raises(Invalid):
            decode_shard(pack(changed), KEY, 3, BOUNDS)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "input_ids/c/1", "c:\\evil", "pair_id/.zarray", "n\nl"])
def test_unknown_members_are_refused(name):
    with pytest.raises(Invalid, match="members missing or unknown"):
        decode_shard(pack({**members(), name: b"x"}), KEY, 3, BOUNDS)


@pytest.mark.parametrize("name", sorted(members()))
def test_every_missing_member_is_refused(name):
    fewer = members()
    del fewer[name]
    with pytest.raises(Invalid):
        decode_shard(pack(fewer), KEY, 3, BOUNDS)


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
        decode_shard(data, KEY, 3, BOUNDS)


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
def test_other_array_metadata_is_refused(change):
    changed = members()
    metadata = json.loads(changed["pair_id/zarr.json"]) | change
    changed["pair_id/zarr.json"] = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(Invalid, match=r"pair_id/zarr\.json inside it|claim \d+ bytes"):
        decode_shard(pack(changed), KEY, 3, BOUNDS)


def with_shape(changed: dict[str, bytes], path: str, shape: list[int]) -> None:
    metadata = json.loads(changed[f"{path}/zarr.json"])
    metadata["shape"] = shape
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    changed[f"{path}/zarr.json"] = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("claimed", [[MAX_RAW_BYTES // 4], [2**24]], ids=["all at once", "below the limit"])
def test_a_shape_that_its_frame_does_not_hold_is_refused_before_memory_is_filled(claimed):
    changed = members()
    with_shape(changed, "input_ids", claimed)
    tracemalloc.start()
    with pytest.raises(Invalid):
        decode_shard(pack(changed), KEY, 3, BOUNDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_a_zstd_bomb_is_refused_without_unpacking_it():
    """32 kB that unpack to 256 MB, under a shape of 9 tokens."""
    changed = members()
    changed["input_ids/c/0"] = zstd.compress(np.zeros(2**28, np.uint8), 1, True)
    tracemalloc.start()
    with pytest.raises(Invalid, match="input_ids does not hold the"):
        decode_shard(pack(changed), KEY, 3, BOUNDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_a_frame_without_checksum_is_refused():
    changed = members()
    changed["input_ids/c/0"] = zstd.compress(PAIRS.input_ids, 1, False)
    with pytest.raises(Invalid, match="input_ids does not hold"):
        decode_shard(pack(changed), KEY, 3, BOUNDS)


def test_a_frame_that_promises_another_size_is_refused():
    """Two frames in one chunk: the first alone has the right size."""
    changed = members()
    changed["input_ids/c/0"] += zstd.compress(b"more", 1, True)
    with pytest.raises(Invalid, match="input_ids does not hold the"):
        decode_shard(pack(changed), KEY, 3, BOUNDS)


@pytest.mark.parametrize("behind", ["an empty frame", "the same again", "a skippable frame"])
def test_a_chunk_with_something_behind_its_frame_is_refused(behind):
    """zstd unpacks what it needs and says nothing of the rest, which could hide anything and is a second spelling."""
    data = encode_shard(make_pairs([(2, 3, 1)]), KEY, 0, BOUNDS)
    members = {name: bytes(member) for name, member in unpack(data).items()}
    frame = members["input_ids/c/0"]
    hidden = {
        "an empty frame": zstd.compress(b"", 1, True),
        "the same again": frame,
        "a skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00evil",
    }
    forged = pack(members | {"input_ids/c/0": frame + hidden[behind]})
    with pytest.raises(Invalid, match="input_ids does not hold the 24 bytes of its shape in one frame"):
        decode_shard(forged, KEY, 0, BOUNDS)


@pytest.mark.parametrize(("key", "sid"), [("cd" * 32, 3), (KEY, 4)])
def test_a_shard_of_another_cache_or_place_is_refused(key, sid):
    with pytest.raises(Invalid, match=rf"not that of shard {sid} of cache {key[:12]}"):
        decode_shard(SHARD, key, sid, BOUNDS)


def test_too_large_a_shard_is_not_written(monkeypatch):
    monkeypatch.setattr("fpo.store.format.encoding.MAX_RAW_BYTES", 100)
    with pytest.raises(Invalid, match="a shard holds at most 100"):
        encode_shard(PAIRS, KEY, 3, BOUNDS)


def changed_array(name: str, place: tuple[int, ...], value: float):
    """PAIRS with one element changed; a name with a number is the array of that hookpoint."""
    if "/" in name:
        n, inner = int(name.split("/")[0]), name.split("/")[1]
        array = getattr(PAIRS.features[n], inner).copy()
        array[place] = value
        features = list(PAIRS.features)
        features[n] = dataclasses.replace(features[n], **{inner: array})
        return dataclasses.replace(PAIRS, features=tuple(features))
    array = getattr(PAIRS, name).copy()
    array[place] = value
    return dataclasses.replace(PAIRS, **{name: array})


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("pair_id", (1,), 0, "the same pair twice"),
        ("input_ids", (2,), VOCAB, "input_ids holds 100, vocab_size is 100"),
        ("input_ids", (2,), VOCAB - 1, r"pair_digest\[0\]"),
        ("pair_digest", (4, 15), 0, r"pair_digest\[4\]"),
        ("splits", (0,), 1, "splits does not rise from 0"),
        ("splits", (2,), 30, "splits does not rise"),
        ("token_logps", (0,), np.nan, r"token_logps holds nan at \[0\]"),
        ("token_logps", (3,), 0.5, "a log-prob is at most 0"),
        ("token_logps", (3,), -50, r"ref_logps\[0, 1\] is"),
        ("ref_logps", (2, 1), -np.inf, r"ref_logps holds -inf at \[2, 1\]"),
        ("ref_logps", (2, 1), -1e4, r"ref_logps\[2, 1\] is -10000"),
        ("0/indices", (0,), 50, "features/0/indices holds 50, d_sae is 50"),
        ("0/acts", (1,), np.nan, "features/0/acts holds nan"),
        ("0/splits", (-1,), 1000, "features/0/splits does not rise"),
        ("1/active", (0, 0), 0, "features/1 keeps"),
        ("1/active", (0, 0), 11, "features/1/active holds 11"),
        ("1/tail_sq", (0, 0), -1, "negative sum of squares"),
        ("1/tail_sq", (0, 0), np.inf, "features/1/tail_sq holds inf"),
    ],
)  # fmt: skip
def test_each_broken_invariant_is_named(name, place, value, message):
    with pytest.raises(Invalid, match=message):
        encode_shard(changed_array(name, place, value), KEY, 3, BOUNDS)


def test_indices_must_ascend_inside_a_completion_only():
    features = PAIRS.features[1]
    row = int(np.argmax(np.diff(features.splits.astype(np.int64)) >= 2))
    start = int(features.splits[row])
    with pytest.raises(Invalid, match=f"does not ascend inside a completion, at entry {start + 1}"):
        encode_shard(changed_array("1/indices", (start + 1,), int(features.indices[start])), KEY, 3, BOUNDS)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (Bounds(VOCAB, ((50, 4),), 2), "2 hookpoints, the recipe has 1"),
        (Bounds(VOCAB, ((50, 1), (9, None)), 2), "top_k 1"),
        (Bounds(VOCAB, ((50, 4), (9, None)), 0), "top_logits are there, the recipe says 0"),
        (Bounds(VOCAB, ((50, 4), (9, None)), 3), r"top_logits/indices is uint32 \(\d+, 2\)"),
    ],
)
def test_a_shard_that_does_not_fit_the_recipe_is_refused(bounds, message):
    with pytest.raises(Invalid, match=message):
        encode_shard(PAIRS, KEY, 3, bounds)


def test_wrong_dtypes_are_refused():
    pairs = dataclasses.replace(PAIRS, ref_logps=PAIRS.ref_logps.astype(np.float64))
    with pytest.raises(Invalid, match=r"ref_logps is float64 \(5, 2\), it must be float32 \(5, 2\)"):
        encode_shard(pairs, KEY, 3, BOUNDS)


def test_a_hostile_frame_header_is_read_within_its_bytes():
    changed = members()
    for tail in (b"", b"\x24", b"\xe4" + struct.pack("<Q", 2**63)):
        changed["input_ids/c/0"] = b"\x28\xb5\x2f\xfd" + tail
        with pytest.raises(Invalid, match="input_ids does not hold"):
            decode_shard(pack(changed), KEY, 3, BOUNDS)
