"""
Filling a cache: copy the rows that another cache of the same scorer holds, score the rest, write shard by shard, the
base and the columns beside it from one pass.

Every process takes the shards that are not written yet and that no other one computes (see `store.claims`): ranks of
torchrun, an array of jobs, or the command started twice share the work without communication, any number of them may
be killed, and any number may resume.
"""

from __future__ import annotations

import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from fpo.progress import progress_bar
from fpo.scoring.hookpoints import canonical_hookpoint
from fpo.stage1_cache.ahead import one_ahead
from fpo.stage1_cache.identity import CacheIdentity
from fpo.stage1_cache.mismatched import score_mismatched
from fpo.stage1_cache.score import ReferenceScorer, Scorer, TokenGroups
from fpo.store import (
    CacheWriter,
    Claim,
    Claims,
    Column,
    ColumnRows,
    Copied,
    Reusable,
    Rows,
    TokenLogps,
    Want,
    is_mismatched,
    own_share_first,
    rows_per,
    shards_within,
)
from fpo.store.format.groups import segments_of
from fpo.store.format.ragged import gather, starts_of

_PAUSE_SECONDS = 0.2
"""Between two looks at shards that others compute, when nothing else is left."""


@dataclass
class Filled:
    """What this process did; others may have done the rest."""

    shards: int = 0
    """Of the base, or of the columns where the base was there."""
    by_others: int = 0
    """Shards that were missing when it began and that other processes wrote."""
    reused: int = 0
    """Completions of which everything was copied."""
    scored: int = 0
    """Completions that were scored."""
    tokens: int = 0
    """Tokens of those, each prompt once."""
    layout: str | None = None
    """How they were laid out for the reference."""


@dataclass(frozen=True)
class Part:
    """The base or a column, while it is being filled."""

    want: Want
    writer: CacheWriter
    shards: list[list[int]]
    """Per shard of the base, the shards of this part that hold its groups."""

    @staticmethod
    def of(want: Want, writer: CacheWriter, plan: Sequence[np.ndarray]) -> Part:
        """plan: the groups of every shard of the base."""
        within = shards_within([len(rows) for rows in plan], [len(ids) for ids in writer.plan])
        assert within is not None
        return Part(want, writer, within)

    def unwritten(self, sid: int) -> list[int]:
        """Its shards that still have to be written, of those that belong to shard `sid` of the base."""
        return [own for own in self.shards[sid] if not self.writer.stands(own)]

    def write(self, identity: CacheIdentity, sid: int, rows: np.ndarray, column: Column, facts: dict[str, Any]) -> None:
        """
        Commit its shards of shard `sid` of the base.

        rows    the groups of that shard
        column  what is known of all of them
        """
        starts = starts_of(identity.tokens.n_completions[rows])
        first = 0
        for own in self.shards[sid]:
            groups = np.arange(first, first + len(self.writer.plan[own]))
            at = groups if column.PER == "group" else gather(starts, groups)[0]
            self.writer.write(own, rows_of(identity, rows[groups], column.take(at)), facts)
            first += len(groups)


def rows_of(identity: CacheIdentity, rows: np.ndarray, column: Column) -> Rows:
    """A shard with these groups, of the base or of a column: what is known of all of them."""
    if isinstance(column, TokenLogps):
        return identity.labels(rows).scored(column)
    return ColumnRows(identity.tokens.group_id[rows], int(identity.tokens.n_completions[rows].sum()), column)


@dataclass(frozen=True)
class _Known:
    """A shard of the base of which everything is known that has to be written."""

    sid: int
    claim: Claim
    columns: list[tuple[Part, Column, dict[str, Any]]]
    """Parts with their rows and how these came to be."""


class Filling:
    """Writes every shard of every part that is missing: it is scored here, and written by a thread meanwhile."""

    def __init__(
        self,
        identity: CacheIdentity,
        parts: Sequence[Part],
        plan: list[np.ndarray],
        reusable: Reusable,
        claims: Claims,
        scorer: Callable[[], Scorer],
    ) -> None:
        """
        plan    the groups (positions in `identity.tokens`) of every shard of the base
        parts   one per want of `reusable`, in its order
        scorer  gives the reference, and loads it the first time; not called where every missing row can be copied
        """
        self.identity, self.parts, self.plan = identity, parts, plan
        self.reusable, self.claims, self.scorer = reusable, claims, scorer
        unwritten = sorted({sid for part in parts for sid in _behind(part, part.writer.missing())})
        self.pending = own_share_first(unwritten, *own_place())
        self.sizes = [int(identity.tokens.n_completions[rows].sum()) for rows in plan]
        total = sum(self.sizes)
        done = total - sum(self.sizes[sid] for sid in self.pending)
        self.progress = progress_bar(total, "completions", f"cache {identity.split}", initial=done, smoothing=0.05)
        self.filled = Filled()

    def run(self) -> Filled:
        with self.progress:
            # A shard is compressed and written while the next one is scored.
            for _ in one_ahead(self._shards(), self._write):
                self.filled.shards += 1
        return self.filled

    def _shards(self) -> Iterator[_Known]:
        """The shards that nobody else computes, until all are there."""
        copies = dict[int, list[Copied]]()
        pending = self.pending
        while pending:
            waiting: list[int] = []
            for place, sid in enumerate(pending):
                claim = self.claims.take(sid) if self._unwritten(sid) else None
                # Asked again under the claim: its last holder may have written the shard just before.
                behind = self._unwritten(sid)
                if behind and claim is not None:
                    if sid not in copies:
                        rest = [*pending[place:], *waiting]
                        copies = _gathered(self.identity, self.plan, self.reusable, rest)
                    yield self._known(sid, claim, behind, copies.pop(sid))
                    continue
                if behind:
                    waiting.append(sid)
                else:
                    self.progress.update(self.sizes[sid])
                    self.filled.by_others += 1
                if claim is not None:
                    claim.end()
            if waiting == pending:
                time.sleep(_PAUSE_SECONDS)
            pending = waiting

    def _unwritten(self, sid: int) -> list[Part]:
        return [part for part in self.parts if part.unwritten(sid)]

    def _known(self, sid: int, claim: Claim, behind: list[Part], copied: Sequence[Copied]) -> _Known:
        """Score what was not copied of a shard."""
        filled, wants = self.filled, self.reusable.wants
        before = (filled.scored, filled.tokens)
        advance = partial(self._advance, claim)
        columns = completed(self.identity, self.plan[sid], wants, copied, self.scorer, advance)
        scored, ran = filled.scored - before[0], filled.tokens > before[1]
        self.progress.update(self.sizes[sid] - scored)
        filled.reused += self.sizes[sid] - scored
        known = _Known(sid, claim, [])
        for part, column, own in zip(self.parts, columns, copied, strict=True):
            if part in behind:
                made_of = inputs(self.identity, part.want)
                facts = provenance(made_of, own, len(column), self.scorer if ran else None)
                known.columns.append((part, column, facts))
                filled.layout = facts.get("layout", filled.layout)
        return known

    def _advance(self, claim: Claim, n_completions: int, n_tokens: int) -> None:
        claim.renew()
        filled = self.filled
        filled.scored, filled.tokens = filled.scored + n_completions, filled.tokens + n_tokens
        self.progress.update(n_completions)
        self.progress.set_postfix_str(f"{filled.tokens / max(self.progress.elapsed, 1e-9):,.0f} tokens/s")

    def _write(self, shard: _Known) -> None:
        for part, column, facts in shard.columns:
            part.write(self.identity, shard.sid, self.plan[shard.sid], column, facts)
        shard.claim.end()


def _behind(part: Part, missing: Sequence[int]) -> list[int]:
    """The shards of the base to which these shards of a part belong."""
    own = set(missing)
    return [sid for sid, shards in enumerate(part.shards) if own.intersection(shards)]


def own_place() -> tuple[int, int]:
    """
    Which of how many processes this is, so that each begins with a share of its own: as torchrun says, else SLURM of
    the tasks of a step and the jobs of an array. Where nobody says, host and process id decide where to begin.
    """

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdigit() else otherwise

    if "RANK" in os.environ:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    task, tasks = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
    step = max(number("SLURM_ARRAY_TASK_STEP", 1), 1)
    job = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // step
    jobs = number("SLURM_ARRAY_TASK_COUNT", 1)
    if tasks * jobs > 1 and 0 <= task < tasks and 0 <= job < jobs:
        return job * tasks + task, tasks * jobs
    many = 2**16
    return zlib.crc32(f"{platform.node()} {os.getpid()}".encode()) % many, many


def _gathered(
    identity: CacheIdentity, plan: list[np.ndarray], reusable: Reusable, order: list[int]
) -> dict[int, list[Copied]]:
    """What can be copied into the first of these shards and as many more as fit into memory."""
    gathered = reusable.gather([identity.wanting(plan[sid]) for sid in order])
    return dict(zip(order, gathered, strict=False))


def completed(
    identity: CacheIdentity,
    rows: np.ndarray,
    wants: Sequence[Want],
    copied: Sequence[Copied],
    scorer: Callable[[], Scorer],
    advance: Callable[[int, int], None],
) -> list[Column]:
    """
    What is known of these groups, of every want: what was not copied is scored, in batches that depend on nothing but
    that.
    """
    apart = [place for place, want in enumerate(wants) if is_mismatched(want)]
    if apart:
        rest = [place for place in range(len(wants)) if place not in apart]
        columns = completed(identity, rows, [wants[p] for p in rest], [copied[p] for p in rest], scorer, advance)
        found = dict(zip(rest, columns, strict=True))
        reference = scorer()
        assert isinstance(reference, ReferenceScorer), "what is imported has no mismatched completions"
        found |= {place: score_mismatched(identity, rows, reference, advance) for place in apart}
        return [found[place] for place in range(len(wants))]
    n_completions = identity.tokens.n_completions[rows]
    starts = starts_of(n_completions)
    totals = [len(rows) if rows_per(want) == "group" else int(starts[-1]) for want in wants]
    gaps = [own.missing(total) for own, total in zip(copied, totals, strict=True)]
    needed = np.zeros(int(starts[-1]), dtype=bool)
    for want, gap in zip(wants, gaps, strict=True):
        needed[gather(starts, gap)[0] if rows_per(want) == "group" else gap] = True
    if not needed.any():
        return [own.merge(total, None) for own, total in zip(copied, totals, strict=True)]
    scored = scorer().score(_picked(identity, rows, needed), wants, advance)
    chosen, touched = np.flatnonzero(needed), np.flatnonzero(np.add.reduceat(needed, starts[:-1]))
    columns = []
    for want, own, total, gap, column in zip(wants, copied, totals, gaps, scored, strict=True):
        places = np.searchsorted(touched if rows_per(want) == "group" else chosen, gap)
        columns.append(own.merge(total, column.take(places) if len(gap) else None))
    return columns


def _picked(identity: CacheIdentity, rows: np.ndarray, needed: np.ndarray) -> TokenGroups:
    """Of these groups, those of which a completion is needed, with those completions alone."""
    tokens = identity.tokens
    n_completions = tokens.n_completions[rows]
    starts = starts_of(n_completions)
    left = np.add.reduceat(needed.astype(np.int64), starts[:-1])
    # A prompt's segment stands before those of its completions, and goes where none of them does.
    keep = np.insert(needed, starts[:-1], left > 0)
    segments = segments_of(tokens.n_completions, rows)[keep]
    at, splits = gather(tokens.splits, segments)
    mask = tokens.score_mask
    if mask is not None:
        completions = gather(identity.completion_starts, rows)[0][needed]
        mask = mask[gather(identity.scored_splits, completions)[0]]
    return TokenGroups(tokens.input_ids[at], splits, left[left > 0].astype(np.uint32), mask)


def token_groups(identity: CacheIdentity, rows: np.ndarray) -> TokenGroups:
    """These groups of an identity, whole."""
    return _picked(identity, rows, np.ones(int(identity.tokens.n_completions[rows].sum()), dtype=bool))


def provenance(
    made_of: dict[str, Any], copied: Copied, n_rows: int, scorer: Callable[[], Scorer] | None
) -> dict[str, Any]:
    """
    How a shard came to be: for people, never part of the key.

    scorer  what scored some of its groups; None where all rows of all parts were copied
    """
    facts: dict[str, Any] = {
        "inputs": made_of,
        "versions": {name: version(name) for name in ("fpo", "torch", "transformers", "numpy", "zarr")},
        "host": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": {"reused": _largest(copied.sources), "scored": n_rows - len(copied.positions)},
    }
    if scorer is not None:
        facts |= scorer().provenance()
    return facts


def _largest(sources: dict[str, int], most: int = 100) -> dict[str, int]:
    """The sources of most rows, and how many came from all the others: a record has room for a few."""
    ranked = sorted(sources.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ranked[most:])
    return dict(ranked[:most]) | ({"others": rest} if rest else {})


def inputs(identity: CacheIdentity, want: Want = None) -> dict[str, Any]:
    """The names behind a key's digests, as the recipe has them: what `fpo store ls` and `diff` show."""
    recipe = identity.recipe
    if want is not None:
        saes = [
            feature.sae
            for feature in recipe.features
            if canonical_hookpoint(feature.hookpoint) == want.get("hookpoint")
        ]
        return {"sae": saes[0]} if saes else {}
    silent = {"split", "eval_split", "source"} | (set() if recipe.data.columns else {"columns"})
    return {
        "reference": recipe.reference.model_dump(include={"model", "revision", "adapter"}),
        "data": {
            **{name: _short(value) for name, value in recipe.data.model_dump(exclude=silent).items()},
            "source": ", ".join(source.source for source, _ in identity.sources),
            "split": identity.split,
        },
    }


def _short(value: Any, most: int = 4096) -> Any:
    """A chat template may be written out in the recipe: a record has room for its beginning."""
    return f"{value[:most]}..." if isinstance(value, str) and len(value) > most else value
