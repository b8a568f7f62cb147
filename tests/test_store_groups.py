"""Groups in memory: what is scored, what counts, taking and joining them, and the digests that name them."""

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import FEATURES, HIDDEN_GRAM, SPECS, digest_of, make_column, make_groups, ragged_sizes, same

from fpo.store.format.columns import KINDS
from fpo.store.format.groups import Groups, summed_logps
from fpo.store.format.key import completion_digests, groups_digest, shard_digest

TWO = [(2, (3, 1)), (0, (1, 2, 2))]
"""Tokens 0-5 are group 0 (prompt 2, completions 3 and 1), tokens 6-10 group 1 (no prompt; 1, 2 and 2)."""


def with_columns(groups):
    return groups.with_columns([make_column(spec, groups, seed) for seed, spec in enumerate(SPECS)])


def test_the_first_token_of_each_completion_after_an_empty_prompt_is_not_scored():
    """
    prompt 2, completions 3 and 1    -> 3 and 1 scored
    prompt 0, completions 1, 2 and 2 -> 0, 1 and 1 scored
    """
    groups = make_groups(TWO)
    assert groups.scored_splits.tolist() == [0, 3, 4, 4, 5, 6]
    prompts, completions = groups.lengths
    assert (prompts.tolist(), completions.tolist()) == ([2, 0], [3, 1, 1, 2, 2])
    assert groups.completion_starts.tolist() == [0, 2, 5]
    assert (len(groups), groups.n_tokens) == (2, 11)


def test_what_the_mask_leaves_out_counts_neither_in_the_sum_nor_in_its_length():
    """Token log-probs -1, -2, -4 | -8 | (none) | -16 | -32; the mask keeps 1, 0, 1 | 0 | | 1 | 1."""
    groups = make_groups(TWO, score_mask=True)
    logps, mask = np.array([-1, -2, -4, -8, -16, -32], np.float32), np.array([1, 0, 1, 0, 1, 1], np.uint8)
    masked = dataclasses.replace(groups, token_logps=logps, score_mask=mask)
    assert masked.counted.tolist() == [2, 0, 0, 1, 1]
    assert summed_logps(logps, masked.scored_splits, mask).tolist() == [-5, 0, 0, -16, -32]
    whole = dataclasses.replace(masked, score_mask=None)
    assert whole.counted.tolist() == [3, 1, 0, 1, 1]
    assert summed_logps(logps, whole.scored_splits).tolist() == [-7, -8, 0, -16, -32]


def test_short_completions_keep_their_digits_beside_long_ones():
    """Behind a hundred thousand tokens of -1000, the last completion is still exactly -0.1 in float32."""
    logps = np.append(np.full(100_000, -1000), -0.1).astype(np.float32)
    assert summed_logps(logps, np.array([0, 100_000, 100_001]))[1] == np.float32(-0.1)


def test_take_picks_all_that_belongs_to_a_group():
    groups = with_columns(make_groups(TWO, score_mask=True))
    swapped = groups.take([1, 0])
    assert swapped.group_id.tolist() == [1, 0]
    assert swapped.n_completions.tolist() == [3, 2]
    assert np.array_equal(swapped.input_ids, np.r_[groups.input_ids[6:], groups.input_ids[:6]])
    assert swapped.splits.tolist() == [0, 0, 1, 3, 5, 7, 10, 11]
    for per_scored in ("token_logps", "score_mask"):
        array = getattr(groups, per_scored)
        assert np.array_equal(getattr(swapped, per_scored), np.r_[array[4:], array[:4]])
    for per_completion in ("completion_digest", "score", "ref_logps"):
        array = getattr(groups, per_completion)
        taken = getattr(swapped, per_completion)
        assert np.array_equal(taken, np.concatenate([array[2:], array[:2]]), equal_nan=array.dtype == np.float32)
    features, gram = swapped.columns[0], swapped.columns[4]
    first = groups.columns[0]
    assert np.array_equal(features.acts[: features.splits[3]], first.acts[first.splits[2] :])
    assert gram.products[:9].tolist() == groups.columns[4].products[4:].tolist()  # 3 x 3, behind 2 x 2


@settings(deadline=None, max_examples=40)
@given(ragged_sizes, st.booleans())
def test_taking_every_group_and_putting_them_together_changes_nothing(sizes, score_mask):
    groups = with_columns(make_groups(sizes, score_mask=score_mask))
    parts = [groups.take([row]) for row in range(len(groups))] or [groups.take([])]
    assert same(Groups.concat(parts), groups)


@settings(deadline=None, max_examples=40)
@given(ragged_sizes, st.randoms())
def test_taking_a_shuffle_and_its_inverse_changes_nothing(sizes, random):
    groups = with_columns(make_groups(sizes))
    order = list(range(len(groups)))
    random.shuffle(order)
    assert same(groups.take(order).take(np.argsort(order)), groups)


@pytest.mark.parametrize("rows", [[-1], [2], [0, 5]])
def test_a_position_outside_is_refused(rows):
    with pytest.raises(IndexError, match=r"positions must lie in 0\.\.1"):
        make_groups(TWO).take(rows)


def test_parts_with_other_columns_or_masks_do_not_join():
    plain, masked = make_groups(TWO), make_groups(TWO, score_mask=True)
    for other in (masked, plain.with_columns([make_column(FEATURES, plain)])):
        with pytest.raises(ValueError, match="differ in columns or masks"):
            Groups.concat([plain, other])
    with pytest.raises(ValueError, match="at least one part"):
        Groups.concat([])


@pytest.mark.parametrize(
    ("spec", "rows"), [(FEATURES, "has 5 rows, the groups have 4"), (HIDDEN_GRAM, "has 2 rows, the groups have 1")]
)
def test_a_column_of_other_rows_does_not_stand_beside_groups(spec, rows):
    groups = make_groups(TWO)
    with pytest.raises(ValueError, match=rows):
        groups.take([0] if KINDS[spec["kind"]].PER == "group" else [0, 0]).with_columns([make_column(spec, groups)])


def test_completion_digest_is_sha256_over_prompt_completion_and_mask():
    """Group 0: prompt [7], completions [8, 9] and [5]. Group 1: no prompt, completion [1, 2], of which 2 is scored."""
    ids, splits = np.array([7, 8, 9, 5, 1, 2], np.uint32), np.array([0, 1, 3, 4, 4, 6], np.uint64)
    n_completions = np.array([2, 1], np.uint32)

    def digest(prompt, completion, mask=b""):
        data = struct.pack(f"<Q{len(prompt)}I", len(prompt), *prompt)
        return hashlib.sha256(data + struct.pack(f"<Q{len(completion)}I", len(completion), *completion) + mask).digest()

    plain = [digest([7], [8, 9])[:16], digest([7], [5])[:16], digest([], [1, 2])[:16]]
    assert [bytes(row) for row in completion_digests(ids, splits, n_completions)] == plain
    ones = np.ones(4, np.uint8)
    assert [bytes(row) for row in completion_digests(ids, splits, n_completions, ones)] == plain
    mask = np.array([1, 0, 1, 0], np.uint8)  # of 8 and 9, of 5, of 2
    masked = [digest([7], [8, 9], b"\1\0")[:16], plain[1], digest([], [1, 2], b"\0")[:16]]
    assert [bytes(row) for row in completion_digests(ids, splits, n_completions, mask)] == masked


def test_shard_and_groups_digest_follow_their_definition():
    digests = np.arange(48, dtype=np.uint8).reshape(3, 16)
    score, weight = np.array([0.5, np.nan, 1], np.float32), np.array([1, 2], np.float32)
    expected = hashlib.sha256(
        struct.pack("<2Q2I", 12, 7, 2, 1) + digests.tobytes() + bytes.fromhex("0000003f 0000c07f 0000803f")
        + struct.pack("<2f", 1, 2)
    ).hexdigest()  # fmt: skip
    assert shard_digest(np.array([12, 7]), np.array([2, 1]), digests, score, weight) == expected
    assert groups_digest([expected, expected]) == hashlib.sha256(2 * bytes.fromhex(expected)).hexdigest()


def test_the_same_completion_has_the_same_digest_in_another_group():
    """Beside other completions, in another place: what is scored once is known again."""
    groups = make_groups([(2, (3, 1, 4))])
    (prompt,) = [groups.input_ids[:2]]
    alone = np.concatenate([prompt, groups.input_ids[6:10]])
    found = completion_digests(alone, np.array([0, 2, 6], np.uint64), np.array([1]))
    assert bytes(found[0]) == bytes(groups.completion_digest[2])


CHANGES = {
    "a token of the prompt": lambda g: {"input_ids": replaced(g.input_ids, 0)},
    "a token of a completion": lambda g: {"input_ids": replaced(g.input_ids, 3)},
    "where the prompt ends": lambda g: {"splits": replaced(g.splits, 1)},
    "where a completion ends": lambda g: {"splits": replaced(g.splits, 2, -1)},
    "what counts": lambda g: {"score_mask": g.score_mask ^ 1},
    "a score": lambda g: {"score": np.array([0, 0, 0.5], np.float32)},
    "a score that says nothing": lambda g: {"score": np.full_like(g.score, np.nan)},
    "a weight": lambda g: {"weight": replaced(g.weight, 0)},
    "an id": lambda g: {"group_id": replaced(g.group_id, 0, 9)},
}


def replaced(array, place, by=1):
    changed = array.copy()
    changed[place] += np.asarray(by).astype(array.dtype)
    return changed


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_fact_about_a_group_is_in_its_shards_digest(change):
    groups = make_groups([(2, (3, 2)), (4, (1,))], score_mask=True, seed=1)
    changed = dataclasses.replace(groups, **change(groups))
    digests = completion_digests(changed.input_ids, changed.splits, changed.n_completions, changed.score_mask)
    assert digest_of(dataclasses.replace(changed, completion_digest=digests)) != digest_of(groups)


def test_swapped_completions_and_regrouped_ones_are_another_digest():
    ids, prompt = np.arange(6, dtype=np.uint32), [0, 0]
    two = completion_digests(ids, np.array([*prompt, 3, 6], np.uint64), np.array([2]))
    said = np.full(2, np.nan, np.float32)
    one = shard_digest(np.array([0]), np.array([2]), two, said, np.ones(1, np.float32))
    assert one != shard_digest(np.array([0]), np.array([2]), two[::-1].copy(), said, np.ones(1, np.float32))
    assert one != shard_digest(np.array([0, 1]), np.array([1, 1]), two, said, np.ones(2, np.float32))


def test_no_log_prob_is_in_a_digest():
    """So a key is known before anything is scored."""
    groups = make_groups(TWO)
    assert digest_of(dataclasses.replace(groups, ref_logps=groups.ref_logps - 1)) == digest_of(groups)
