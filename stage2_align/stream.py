"""
Shard files to batches on the way into the model. One background thread decodes and verifies the next block of
shards, another packs the next batches; the trainer takes them from a queue and never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset

from fpo.errors import DataError
from fpo.objectives import DEFAULT_OBJECTIVE, FeatureTerm, Objective
from fpo.scoring import Layout, TokenGrid, pack, reference_top, sparse_rows
from fpo.stage2_align.order import BLOCK_SHARDS, Block, cut_batches, epoch_blocks
from fpo.stage2_align.units import desirable, draws, unit_tokens, units_of, with_mismatched
from fpo.store import Cache, Features, Groups, Mismatched, TopLogits

T = TypeVar("T")

# Packed batches that wait for the trainer: enough to cover the moment when a block's arrays are put together.
QUEUE_BATCHES = 64

Batch = dict[str, Any]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device, but for what the host must know."""
    # A copy from memory that is not pinned waits until the device has done all that it was given before.
    return {
        name: value.to(device, non_blocking=value.is_pinned()) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def check_groups(cache: Cache, objective: Objective) -> None:
    """
    DataError where the cache's counts tell that a group is no pair, or its first shard that groups lack the scores that
    are asked for: no model needs to be loaded to know it. The cache must be opened with the columns that the objective
    reads; others are not looked at.
    """
    if objective.units != "completions" and cache.n_completions < 2 * cache.n_groups:
        raise _no_pair(f"cache {cache.key[:12]} has {cache.n_completions:,} in {cache.n_groups:,} groups")
    opened = groups_of(cache, 0, objective).columns
    term = objective.needs.features
    constrained = 0 if term is None else len(term.hookpoints or (None,))
    assert sum(isinstance(column, Features) for column in opened) == constrained, "the hookpoints that are constrained"


def groups_of(cache: Cache, sid: int, objective: Objective) -> Groups:
    """
    A shard, with the columns that the objective reads. Its groups must hold two completions at least, where the
    objective does not take them one by one, and where it asks for scores, these must say that no completion is better
    than the one before it.

    Raises DataError naming a group that is not as it must be.
    """
    groups, needs = cache.shard(sid), objective.needs
    read = {Features: needs.features is not None, TopLogits: needs.divergence, Mismatched: needs.mismatched}
    groups = groups.with_columns([column for column in groups.columns if read.get(type(column), False)])
    single = groups.n_completions < 2
    if single.any() and objective.units != "completions":
        row = int(single.argmax())
        raise _no_pair(f"group {groups.group_id[row]} of cache {cache.key[:12]} has {groups.n_completions[row]}")
    if objective.units == "completions":
        unlabelled = single & ~np.isin(groups.score[groups.completion_starts[:-1]], (0, 1))
        if unlabelled.any():
            row = int(unlabelled.argmax())
            raise DataError(
                f"the objective asks whether a completion is desirable, and group {groups.group_id[row]} of cache "
                f"{cache.key[:12]} has one alone with score {groups.score[groups.completion_starts[row]]:g}; name data "
                "with a label, true or false, for completions that stand alone (data.columns: label)"
            )
    if needs.scores:
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
        f"the objective compares completions of a prompt, and {found}; name data with two or more completions in every "
        "row (data.source, data.columns), or take an objective of single completions: kto"
    )


class Epoch(NamedTuple):
    """What chance depends on, beside the groups."""

    seed: int
    number: int


def batch_tensors(groups: Groups, objective: Objective, layout: Layout, epoch: Epoch, shares: np.ndarray) -> Batch:
    """
    What a step needs of these groups: the fields of `Packed`, the reference's side under `ref_`, the data's `score`,
    and of the objective's units whose they are (`group_id`), which completions they are (`units`), what part of its
    group each is (`share`), what it counts in the step (`weight`) and what the data says that the group counts
    (`unit_weight`); and how many tokens all completions have with their prompts, but of repeats (`tokens_read`).
    Further what the objective asks for and no other does.

    groups   with the columns that the objective reads, its features first and in their order
    layout   the one in which the policy is measured rightly
    shares   (G,) what each group counts in the step
    """
    units, needs = units_of(groups, objective.units), objective.needs
    preferred = desirable(groups) if objective.units == "completions" else None
    arrays: dict[str, np.ndarray] = {"n_completions": groups.n_completions.astype(np.int64)}
    read = groups.sizes + (groups.n_completions.astype(np.int64) - 1) * groups.lengths[0]
    arrays["tokens_read"] = np.array(read[shares > 0].sum(), np.float32)
    mismatched = next((column for column in groups.columns if isinstance(column, Mismatched)), None)
    if mismatched is not None:
        # From here on every group has one completion more, its last.
        groups = with_mismatched(groups, mismatched)
        units = units._replace(completions=units.completions + units.group[:, None])
        arrays["mismatched"] = groups.completion_starts[1:] - 1
        arrays["counted_groups"] = shares > 0
    asked = next((column.indices for column in groups.columns if isinstance(column, TopLogits)), None)
    packed = pack(
        groups.input_ids, groups.splits, groups.n_completions, layout, score_mask=groups.score_mask, asked=asked
    )
    arrays |= {
        "group_id": groups.group_id[units.group].astype(np.int64),
        "ref_logps": groups.ref_logps,
        "score": groups.score,
        "units": units.completions,
        "share": units.shares(len(groups)),
        "unit_weight": groups.weight[units.group],
    }
    arrays["weight"] = shares[units.group] * arrays["share"]
    if preferred is not None:
        arrays["desirable"] = preferred
    if objective.units == "groups":
        arrays["present"] = units.present
        if not needs.scores:  # a group of two is a pair, whatever its scores
            pair = np.repeat(groups.n_completions == 2, groups.n_completions)
            arrays["score"] = np.where(pair, np.float32(np.nan), groups.score)
    if needs.tokens:
        tokens = unit_tokens(groups, units)
        arrays |= {f"token_{name}": array for name, array in tokens._asdict().items()}
        counted = groups.token_logps if groups.score_mask is None else groups.token_logps[groups.score_mask != 0]
        arrays["ref_token_logps"] = counted[tokens.rows]
    if needs.draws:
        per_unit = groups.counted[units.completions].sum(1)
        arrays["draws"], arrays["token_draws"] = draws(groups, units, per_unit, epoch.seed, epoch.number)
    features: Batch = {}
    if needs.features is not None:
        grid = TokenGrid.of(groups.counted)
        features = {"feature_places": grid.places, "feature_shares": grid.shares}
    for number, column in enumerate(groups.columns):
        match column:
            case Features():
                assert needs.features is not None
                known = _reference_features(column, needs.features)
                features |= {f"ref_{name}_{number}": tensor for name, tensor in known.items()}
            case TopLogits():
                arrays["ref_top_logps"] = column.logps
    return {**packed._asdict(), **{name: torch.from_numpy(array) for name, array in arrays.items()}, **features}


def _reference_features(column: Features, term: FeatureTerm) -> Batch:
    """
    What a distance over this feature set needs of the reference: its top k, and where the policy's own features are in
    the set, all that the cache holds, to look those up in.
    """
    rows = sparse_rows(column.indices, column.acts, column.splits)
    found = {"tail_sq": torch.from_numpy(column.tail_sq)}
    if term.feature_set != "policy":
        top = reference_top(rows, term.k)
        found |= {"columns": top.columns, "column_valid": top.valid, "column_acts": top.acts}
    return found if term.feature_set == "reference" else found | rows._asdict()


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
        objective: Objective = DEFAULT_OBJECTIVE,
    ) -> None:
        """
        per_device    pairs per forward of one process
        accumulation  forwards per optimiser step
        layout        the one in which the policy is measured rightly; may be set until the iteration starts
        objective     whose units the groups become, and what it asks for is gathered
        """
        self.layout = layout
        self.cache, self.seed, self.block_shards = cache, seed, block_shards
        self.per_device, self.accumulation = per_device, accumulation
        self.rank, self.world = rank, world
        self.epoch, self.skip = 0, 0
        self.objective = objective

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
        epoch = Epoch(self.seed, self.epoch)
        tensors = (batch_tensors(groups, self.objective, self.layout, epoch, shares) for groups, shares in micro)
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
            parts.append(groups_of(self.cache, int(shard), self.objective).take(rows[here] - offsets[shard]))
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
