"""
Shard files to batches on the way into the model. One background thread decodes and verifies the next block of
shards, another packs the next batches; the trainer takes them from a queue and never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fpo.errors import DataError
from fpo.objectives import Pairing
from fpo.scoring import Layout, pack
from fpo.stage2_align.order import BLOCK_SHARDS, Block, cut_batches, epoch_blocks
from fpo.stage2_align.pairing import Pairs, pairs_of
from fpo.store import Cache, Features, Groups
from fpo.store.format.ragged import gather, starts_of

T = TypeVar("T")

# Packed batches that wait for the trainer: enough to cover the moment when a block's arrays are put together.
QUEUE_BATCHES = 64

Batch = dict[str, Tensor]


def check_groups(cache: Cache, *, scores: bool) -> None:
    """
    DataError where the cache's counts tell that a group is no pair, or its first shard that groups lack the scores that
    are asked for: no model needs to be loaded to know it.
    """
    if cache.n_completions < 2 * cache.n_groups:
        raise _no_pair(f"cache {cache.key[:12]} has {cache.n_completions:,} in {cache.n_groups:,} groups")
    groups_of(cache, 0, scores=scores)


def groups_of(cache: Cache, sid: int, *, scores: bool) -> Groups:
    """
    A shard, whose groups must hold two completions at least.

    scores  whether these must say that no completion is better than the one before it
    Raises DataError naming a group that is not as it must be.
    """
    groups = cache.shard(sid)
    single = groups.n_completions < 2
    if single.any():
        row = int(single.argmax())
        raise _no_pair(f"group {groups.group_id[row]} of cache {cache.key[:12]} has {groups.n_completions[row]}")
    if scores:
        better, worse = groups.score[:-1], groups.score[1:]
        inside = np.ones(len(better), dtype=bool)
        inside[groups.completion_starts[1:-1] - 1] = False
        unranked = inside & ~(better >= worse)
        if unranked.any():
            at = int(unranked.argmax())
            row = int(np.searchsorted(groups.completion_starts, at, side="right")) - 1
            raise DataError(
                f"the objective takes a margin from scores, and group {groups.group_id[row]} of cache "
                f"{cache.key[:12]} has {better[at]:g} for chosen and {worse[at]:g} for rejected; name data with "
                "a higher score for chosen (data.columns: score_chosen and score_rejected, or margin)"
            )
    return groups


def _no_pair(found: str) -> DataError:
    return DataError(
        f"an objective compares completions of a prompt, and {found}; name data with two or more completions in every "
        "row (data.source, data.columns)"
    )


def batch_tensors(groups: Groups, pairs: Pairs, layout: Layout) -> Batch:
    """
    What a step needs of these groups: the fields of `Packed`, the reference's side under `ref_`, the data's `score`,
    and of their pairs which completions they are (`pairs`), what part of its group each is (`share`) and what the data
    says that the group counts (`pair_weight`).

    groups   with the one column of features that the objective reads, or with none
    layout   the one in which the policy is measured rightly
    """
    packed = pack(groups.input_ids, groups.splits, groups.n_completions, layout, score_mask=groups.score_mask)
    batch: dict[str, Any] = dict(packed._asdict())
    batch["n_completions"] = torch.from_numpy(groups.n_completions.astype(np.int64))
    batch["ref_logps"] = torch.from_numpy(groups.ref_logps)
    batch["score"] = torch.from_numpy(groups.score)
    batch["pairs"] = torch.from_numpy(pairs.completions)
    batch["share"] = torch.from_numpy(pairs.shares(len(groups)))
    batch["pair_weight"] = torch.from_numpy(groups.weight[pairs.group])
    for kept in groups.columns:
        assert isinstance(kept, Features)
        batch["ref_indices"] = torch.from_numpy(kept.indices.astype(np.int64))
        batch["ref_acts"] = torch.from_numpy(kept.acts)
        batch["ref_counts"] = torch.from_numpy(np.diff(kept.splits.astype(np.int64)))
        batch["ref_tail_sq"] = torch.from_numpy(kept.tail_sq)
        rejected = np.unique(pairs.completions[:, 1])
        chosen = np.setdiff1d(pairs.completions[:, 0], rejected)
        counted = starts_of(groups.counted)
        for side, completions in (("chosen", chosen), ("rejected", rejected)):
            batch[f"{side}_only"] = torch.from_numpy(completions)
            batch[f"{side}_tokens"] = torch.from_numpy(gather(counted, completions)[0])
    return batch


class PairStream(IterableDataset[Batch | None]):
    """
    The micro-batches of one process, epoch by epoch.

    A step's pairs are the same whatever the number of processes: each takes its slice of every global batch.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int,
        per_device: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        layout: Layout = Layout.PACKED,
        block_shards: int = BLOCK_SHARDS,
        scores: bool = False,
        pairing: Pairing = "best_rest",
    ) -> None:
        """
        per_device    pairs per forward of one process
        accumulation  forwards per optimiser step
        layout        the one in which the policy is measured rightly; may be set until the iteration starts
        scores        whether groups must have them, see `groups_of`
        pairing       which completions of a group are compared
        """
        self.layout = layout
        self.cache, self.seed, self.block_shards = cache, seed, block_shards
        self.per_device, self.accumulation = per_device, accumulation
        self.rank, self.world = rank, world
        self.epoch, self.skip = 0, 0
        self.scores, self.pairing = scores, pairing

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        full, rest = divmod(self.cache.n_groups, self.global_batch)
        return full * self.accumulation + -(-rest // (self.per_device * self.world))

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.cache.n_groups // self.global_batch)

    @property
    def global_batch(self) -> int:
        """Pairs per optimiser step, over all processes."""
        return self.per_device * self.accumulation * self.world

    def pairs_until(self, step: int) -> int:
        """Pairs of the first `step` steps, over all processes: an epoch's last step may be smaller."""
        epochs, steps = divmod(step, self.steps)
        return epochs * self.cache.n_groups + steps * self.global_batch

    def start(self, epoch: int, skip: int = 0) -> None:
        """Let the next iteration give epoch `epoch`, its first `skip` micro-batches as None, undecoded."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[Batch | None]:
        skipped, self.skip = self.skip, 0
        yield from (None for _ in range(skipped))
        micro = self._micro_batches(skipped // self.accumulation)
        tensors = (self._tensors(groups, shares) for groups, shares in micro)
        ready = _in_background(tensors, QUEUE_BATCHES)
        for _ in range(skipped % self.accumulation):
            next(ready)
        yield from ready

    def _micro_batches(self, first_step: int) -> Iterator[tuple[Groups, np.ndarray]]:
        """
        This process's pairs of each forward, and what the loss of each weighs, so that Trainer's mean over the step's
        forwards and processes is the mean over the step's pairs.
        """
        for pairs in self._global_batches(first_step):
            width = self.per_device * self.world
            slices = -(-len(pairs) // width)
            for start in range(0, len(pairs), width):
                positions = np.arange(start, min(start + width, len(pairs)))
                weights = np.full(len(positions), self.world * slices / len(pairs), np.float32)
                # Every process needs the same number of pairs; the epoch's last slice repeats some to get there. A
                # repeat weighs nothing.
                short = -len(positions) % self.world
                positions = np.concatenate([positions, np.resize(positions, short)])
                weights = np.concatenate([weights, np.zeros(short, np.float32)])
                own = len(positions) // self.world
                mine = slice(self.rank * own, (self.rank + 1) * own)
                yield pairs.take(positions[mine]), weights[mine]

    def _tensors(self, groups: Groups, shares: np.ndarray) -> Batch:
        """A forward's groups; `shares` is what each counts in the step, and its pairs share it."""
        pairs = pairs_of(groups, self.pairing)
        batch = batch_tensors(groups, pairs, self.layout)
        return {**batch, "weight": torch.from_numpy(shares[pairs.group]) * batch["share"]}

    def _global_batches(self, first_step: int) -> Iterator[Groups]:
        """Pairs of each optimiser step from `first_step` of the epoch on; blocks before it are not decoded."""
        blocks = epoch_blocks(
            self.cache.shard_groups,
            seed=self.seed,
            epoch=self.epoch,
            batch=self.global_batch,
            block_shards=self.block_shards,
        )
        counts = [block.n_batches(self.global_batch) for block in blocks]
        number, skip = 0, first_step
        while number < len(blocks) and skip >= counts[number]:
            skip -= counts[number]
            number += 1
        for index, pairs in _in_background(self._read_blocks(blocks, number), 1):
            lengths = pairs.sizes
            cut = cut_batches(lengths, index, seed=self.seed, epoch=self.epoch, batch=self.global_batch)
            for positions in cut[skip:]:
                yield pairs.take(positions)
            skip = 0

    def _read_blocks(self, blocks: list[Block], first: int) -> Iterator[tuple[int, Groups]]:
        """Number and pairs of each block from `first` on, in the order of its rows and without its leftovers."""
        self.cache.prefetch([shard for block in blocks[first:] for shard in sorted(block.shards)])
        carried: Groups | None = None
        if first < len(blocks) and blocks[first].carried:
            carried = self.rows(blocks[first].rows[: blocks[first].carried])
        for index in range(first, len(blocks)):
            block = blocks[index]
            own = self.rows(block.rows[block.carried :])
            pairs = own if carried is None else Groups.concat([carried, own])
            used = len(pairs) - block.leftover
            carried = pairs.take(np.arange(used, len(pairs))) if block.leftover else None
            if used:
                yield index, pairs.take(np.arange(used)) if block.leftover else pairs

    def rows(self, rows: np.ndarray) -> Groups:
        """Pairs by cache row, read shard by shard."""
        offsets = np.concatenate([[0], np.cumsum(self.cache.shard_groups)])
        shard_of = np.searchsorted(offsets, rows, side="right") - 1
        parts, places = [], []
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            parts.append(groups_of(self.cache, int(shard), scores=self.scores).take(rows[here] - offsets[shard]))
            places.append(here)
        back = np.argsort(np.concatenate(places), kind="stable")
        return Groups.concat(parts).take(back)


def _in_background(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them made ahead by one thread. An exception arrives where its item would."""
    end = object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting: deque[Future[Any]] = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
