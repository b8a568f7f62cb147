"""An epoch's order: every pair once, another in every epoch, the same however it is split or resumed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fpo.stage2_align.order import cut_batches, epoch_blocks

# Of some shards a filter may leave nothing.
shards = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def order_of(shard_groups: list[int], batch: int, block_shards: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Rows of every batch of an epoch, with lengths that differ from pair to pair."""
    batches = []
    blocks = epoch_blocks(shard_groups, seed=seed, epoch=epoch, batch=batch, block_shards=block_shards)
    for index, block in enumerate(blocks):
        rows = block.rows[: len(block.rows) - block.leftover]
        cut = cut_batches(rows * 7919 % 101, index, seed=seed, epoch=epoch, batch=batch)
        assert len(cut) == block.n_batches(batch)
        batches += [rows[positions].tolist() for positions in cut]
    return batches


@given(shard_groups=shards, batch=st.integers(1, 17), block_shards=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation_in_full_batches_but_the_last(
    shard_groups: list[int], batch: int, block_shards: int, epoch: int
) -> None:
    batches = order_of(shard_groups, batch, block_shards, epoch=epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(sum(shard_groups)))
    assert all(len(rows) == batch for rows in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch


@given(shard_groups=shards, batch=st.integers(1, 17), block_shards=st.integers(1, 5))
def test_a_block_needs_no_shards_but_its_own_and_those_of_what_is_left_over(
    shard_groups: list[int], batch: int, block_shards: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(shard_groups)])
    for block in epoch_blocks(shard_groups, seed=3, epoch=1, batch=batch, block_shards=block_shards):
        own = set(np.searchsorted(offsets, block.rows[block.carried :], side="right") - 1)
        assert own == set(block.shards)
        assert block.carried < batch


def test_epochs_and_seeds_differ_and_the_same_numbers_give_the_same_order() -> None:
    sizes = [64] * 20
    first = order_of(sizes, 16, 8)
    assert first == order_of(sizes, 16, 8)
    assert first != order_of(sizes, 16, 8, epoch=1)
    assert first != order_of(sizes, 16, 8, seed=1)


def test_the_order_is_pinned_so_that_runs_resume_across_versions() -> None:
    """A change of these numbers changes every run's order: bump it knowingly."""
    assert order_of([3, 4, 2], 4, 2) == [[0, 5, 3, 4], [1, 6, 2, 7], [8]]


def test_batches_hold_pairs_of_about_equal_length_but_the_last_smaller_one_is_not_sorted() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 1003)
    cut = cut_batches(lengths, 0, seed=0, epoch=0, batch=10)
    assert np.mean([np.ptp(lengths[rows]) for rows in cut[:-1]]) < 60  # ten at random spread over about 800
    assert cut[-1].tolist() == [1000, 1001, 1002]
