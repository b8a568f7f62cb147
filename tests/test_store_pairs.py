import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import make_pairs, ragged_lengths, same

from fpo.store import Pairs, pair_digests, pairs_digest, shard_digest


def test_first_token_after_an_empty_prompt_is_not_scored():
    """
    prompt 2, chosen 3, rejected 1 -> 3 and 1 scored
    prompt 0, chosen 1, rejected 2 -> 0 and 1 scored
    """
    pairs = make_pairs([(2, 3, 1), (0, 1, 2)])
    assert pairs.completion_splits.tolist() == [0, 3, 4, 4, 5]
    assert pairs.lengths.tolist() == [[2, 3, 1], [0, 1, 2]]
    assert len(pairs) == 2


def test_take_picks_the_segments_of_each_pair():
    """Tokens 0-5 are pair 0 (2 + 3 + 1), tokens 6-8 pair 1 (0 + 1 + 2)."""
    pairs = make_pairs([(2, 3, 1), (0, 1, 2)])
    swapped = pairs.take([1, 0])
    assert swapped.pair_id.tolist() == [1, 0]
    assert np.array_equal(swapped.input_ids, np.r_[pairs.input_ids[6:9], pairs.input_ids[:6]])
    assert swapped.splits.tolist() == [0, 0, 1, 3, 5, 8, 9]
    assert np.array_equal(swapped.token_logps, np.r_[pairs.token_logps[4:], pairs.token_logps[:4]])
    first = pairs.features[0]
    assert np.array_equal(swapped.features[0].acts[: first.splits[4] - first.splits[2]], first.acts[first.splits[2] :])


@settings(deadline=None)
@given(ragged_lengths)
def test_taking_every_pair_and_putting_them_together_changes_nothing(lengths):
    pairs = make_pairs(lengths)
    parts = [pairs.take([row]) for row in range(len(pairs))] or [pairs.take([])]
    assert same(Pairs.concat(parts), pairs)


@settings(deadline=None)
@given(ragged_lengths, st.randoms())
def test_taking_a_shuffle_and_its_inverse_changes_nothing(lengths, random):
    pairs = make_pairs(lengths)
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert same(pairs.take(order).take(np.argsort(order)), pairs)


@pytest.mark.parametrize("rows", [[-1], [2], [0, 5]])
def test_a_position_outside_is_refused(rows):
    with pytest.raises(IndexError, match=r"positions must lie in 0\.\.1"):
        make_pairs([(1, 1, 1), (1, 1, 1)]).take(rows)


def test_parts_with_other_hookpoints_do_not_join():
    with pytest.raises(ValueError, match="differ in hookpoints"):
        Pairs.concat([make_pairs([(1, 1, 1)]), make_pairs([(1, 1, 1)], hookpoints=())])


def test_pair_digest_is_sha256_over_lengths_and_ids():
    """Pair 0: prompt [7], chosen [8, 9], rejected [5]. Pair 1: no prompt, chosen [1], rejected [2]."""
    ids = np.array([7, 8, 9, 5, 1, 2], np.uint32)
    splits = np.array([0, 1, 3, 4, 4, 5, 6], np.uint64)
    first = hashlib.sha256(struct.pack("<3Q4I", 1, 2, 1, 7, 8, 9, 5)).digest()[:16]
    second = hashlib.sha256(struct.pack("<3Q2I", 0, 1, 1, 1, 2)).digest()[:16]
    digests = pair_digests(ids, splits)
    assert [bytes(row) for row in digests] == [first, second]
    shard = hashlib.sha256(struct.pack("<2Q", 12, 7) + first + second).hexdigest()
    assert shard_digest(np.array([12, 7], np.uint64), digests) == shard
    assert pairs_digest([shard, shard]) == hashlib.sha256(2 * bytes.fromhex(shard)).hexdigest()


def test_where_the_prompt_ends_is_part_of_the_digest():
    ids = np.array([1, 2, 3], np.uint32)
    one = pair_digests(ids, np.array([0, 1, 2, 3], np.uint64))
    other = pair_digests(ids, np.array([0, 0, 2, 3], np.uint64))
    assert bytes(one) != bytes(other)
