"""
The order in which an epoch reads a cache: a pure function of seed, epoch, the shards' sizes and the batch size.

Shards are read in blocks, so that disk and network see whole files; pairs were assigned to shards by a seeded
permutation, so a shuffle inside blocks is statistically a global one. What does not fill a batch at the end of a
block moves to the next. Nothing has to be replayed to know what any batch of any epoch holds, and the number of
processes and of accumulation steps does not change which pairs meet in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpo.store import permutation

BLOCK_SHARDS = 8
# Batches are cut from stretches of this many that are sorted by length: 62 % padding becomes 3 %, without a bias
# in what a batch is made of.
BUCKET_BATCHES = 50

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """A stretch of an epoch: the shards it reads, and its pairs in random order."""

    shards: tuple[int, ...]
    rows: Rows
    """(n,) cache rows (shard after shard): some left over by the block before, then own ones."""
    carried: int
    """How many of the first rows come from earlier blocks' shards."""
    leftover: int
    """How many of the last rows the next block gets; 0 in the last block."""

    def n_batches(self, batch: int) -> int:
        """Batches cut from this block; only the epoch's last one may be smaller."""
        return -(-(len(self.rows) - self.leftover) // batch)


def epoch_blocks(
    shard_groups: Sequence[int], *, seed: int, epoch: int, batch: int, block_shards: int = BLOCK_SHARDS
) -> list[Block]:
    """
    The blocks of one epoch; together their rows (less the leftovers) are every pair once.

    shard_groups  pairs in each shard, 0 where a filter leaves none: such a one is not read
    batch         pairs per optimiser step, over all processes
    """
    offsets = np.concatenate([[0], np.cumsum(shard_groups)])
    order = [int(shard) for shard in _shuffle(len(shard_groups), seed, epoch) if shard_groups[shard]]
    blocks: list[Block] = []
    carry: Rows = np.empty(0, np.int64)
    for first in range(0, len(order), block_shards):
        shards = order[first : first + block_shards]
        own = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in shards])
        rows = np.concatenate([carry, own[_shuffle(len(own), seed, epoch, len(blocks))]])
        last = first + block_shards >= len(order)
        leftover = 0 if last else len(rows) % batch
        blocks.append(Block(tuple(shards), rows, len(carry), leftover))
        carry = rows[len(rows) - leftover :]
    return blocks


def cut_batches(
    lengths: NDArray[np.integer], block: int, *, seed: int, epoch: int, batch: int
) -> list[NDArray[np.int64]]:
    """
    Positions of a block's pairs in batches of about equal length, in random order.

    lengths  (n,) tokens of each pair, in the order of `Block.rows` without the leftovers
    block    number of the block in its epoch
    """
    # Rows are in random order already, so the last ones make an unbiased smaller batch.
    full = len(lengths) // batch * batch
    batches: list[NDArray[np.int64]] = []
    for first in range(0, full, batch * BUCKET_BATCHES):
        stretch = lengths[first : min(first + batch * BUCKET_BATCHES, full)]
        positions = first + np.argsort(stretch, kind="stable")
        batches += np.split(positions, len(positions) // batch)
    batches = [batches[i] for i in _shuffle(len(batches), seed, epoch, block, len(lengths))]
    return batches + ([np.arange(full, len(lengths))] if full < len(lengths) else [])


def _shuffle(n: int, *path: int) -> Rows:
    """A shuffle of 0..n-1 that these numbers name, the same with every version of numpy."""
    return permutation(n, int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0]))
