"""
Writers in a crowd, killed at random: python store_killed_crowd.py FOLDER ROUNDS SEED

Every round fills one cache, a base and a column, by waves of forked writers, four at first, then one to six; each
writes all that is missing, its own share first. They are killed by SIGKILL after a random time or right before a random
system call; between waves, shards without a record may lose their data as in a power cut; the last wave is left alone.
All the while a reader looks: it must see nothing or the whole, and what was committed once must stay byte for byte. In
every third round hard links fail; in every second one the writers' results differ in the low bits, as two devices' do.
Prints the counts as JSON; fails with the round's number at the first thing lost.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from store_cases import FEATURES, Part, World, make_column, make_groups, make_recipe, same, tree
from store_killed_writer import die_at

from fpo.errors import CacheError, CacheIncomplete, CacheMissing
from fpo.store import open_cache, verify
from fpo.store.format.encoding import Rows
from fpo.store.format.groups import Groups

SHARDS = 12
FACTS = {"self_check": {"fvu": "0.12"}}


class Crowd(World):
    """24 groups of two in 12 shards with a column that has 24, and what a round saw committed."""

    def __init__(self, root: Path, same_bits: bool) -> None:
        super().__init__(root, [FEATURES])
        rng = np.random.default_rng(5)
        sizes = [(int(prompt), (int(one), int(two))) for prompt, one, two in rng.integers(1, 40, (2 * SHARDS, 3))]
        groups = make_groups(sizes)
        self.groups = groups.with_columns([make_column(FEATURES, groups)])
        self.plan = list(rng.permutation(2 * SHARDS).reshape(SHARDS, 2))
        self.recipe = make_recipe(groups, self.plan)
        self.parts = [Part(self), Part(self, 0)]
        self.same_bits = same_bits
        self.committed: dict[Path, bytes] = {}

    def write_all(self, rank: int, ranks: int) -> None:
        for part in self.parts:
            writer = part.writer()
            missing = writer.missing()
            own = [sid for sid in missing if sid % ranks == rank]
            for sid in [*own, *(sid for sid in missing if sid not in own)]:
                writer.write(sid, self._scored(part.rows(sid), rank), {"rank": rank})
            writer.seal(FACTS)

    def _scored(self, rows: Rows, rank: int) -> Rows:
        """The rows as this rank's device computes them."""
        if self.same_bits:
            return rows
        if isinstance(rows, Groups):
            return replace(rows, ref_logps=rows.ref_logps * np.float32(1 + rank * 2.0**-20))
        acts = getattr(rows.column, "acts")  # noqa: B009 - the column is one of features
        return replace(rows, column=replace(rows.column, acts=acts * np.float32(1 + rank * 2.0**-20)))

    def look(self) -> bool:
        """What a reader sees right now; whether all is complete. Raises AssertionError for a loss."""
        for path, data in self.committed.items():
            assert path.read_bytes() == data, f"{path} changed after it was committed"
        for part in self.parts:
            for record in sorted((part.path / "records").glob("*.json")) if part.path.exists() else ():
                shard = part.path / f"shards/{record.stem}.zarr.zip"
                self.committed |= {record: record.read_bytes(), shard: shard.read_bytes()}
        try:
            cache = open_cache(self.store, self.key, columns=self.specs)
        except (CacheMissing, CacheIncomplete):
            return False
        for sid in range(SHARDS):
            found, expected = cache.shard(sid), self.beside(sid)
            assert same(found, expected) if self.same_bits else np.array_equal(found.input_ids, expected.input_ids)
        for part in self.parts:
            self.committed[part.path / "manifest.json"] = (part.path / "manifest.json").read_bytes()
        return True


def fork_writer(crowd: Crowd, rank: int, ranks: int, call: int | None, links: bool) -> int:
    child = os.fork()
    if child:
        return child
    if not links:
        os.link = no_link  # type: ignore[assignment]
    if call is not None:
        die_at(call)
    try:
        crowd.write_all(rank, ranks)
    except BaseException as error:
        print(f"rank {rank} of {ranks}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def no_link(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def run_wave(crowd: Crowd, rng: np.random.Generator, ranks: int, doomed: float, links: bool) -> int:
    """Start writers, kill some, look meanwhile; how many died."""
    started = time.monotonic()
    deadlines: dict[int, float] = {}
    for rank in range(ranks):
        fate = rng.random()
        call = int(rng.integers(1, 270)) if fate < doomed / 2 else None
        child = fork_writer(crowd, rank, ranks, call, links)
        timed = doomed / 2 <= fate < doomed
        deadlines[child] = started + (rng.uniform(0, 0.16) if timed else np.inf)
    died = 0
    while deadlines:
        for child, deadline in list(deadlines.items()):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del deadlines[child]
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                assert killed or status == 0, f"a writer failed: {os.waitstatus_to_exitcode(status)}"
                died += killed
        crowd.look()
    return died


def tear(crowd: Crowd, rng: np.random.Generator) -> int:
    """A power cut may leave names without data: some shards that have no record become empty or half."""
    torn = 0
    if rng.random() < 0.5:
        return torn
    for part in crowd.parts:
        for shard in sorted((part.path / "shards").glob("*.zarr.zip")) if part.path.exists() else ():
            record = part.path / f"records/{shard.name.split('.')[0]}.json"
            if not record.exists() and rng.random() < 0.5:
                shard.write_bytes(b"PK" * int(rng.integers(0, 9)))
                torn += 1
    return torn


def run_round(root: Path, number: int, seed: int) -> dict[str, int]:
    rng = np.random.default_rng([seed, number])
    same_bits, links = number % 2 == 0, number % 3 != 2
    crowd = Crowd(root / f"{number}", same_bits)
    kills, writers, waves, torn = 0, 0, 0, 0
    while waves == 0 or (waves < 6 and not crowd.look()):
        ranks = 4 if waves == 0 else int(rng.integers(1, 7))
        torn += tear(crowd, rng)
        kills += run_wave(crowd, rng, ranks, 1.0, links)
        writers, waves = writers + ranks, waves + 1
    ranks = int(rng.integers(1, 7))
    assert run_wave(crowd, rng, ranks, 0.0, links) == 0
    assert crowd.look(), "not complete although the last writers lived"
    report = verify(crowd.store, crowd.key)
    assert report.ok, report.problems
    folder = crowd.store.path(crowd.key)
    check_files(crowd, root / "whole", folder)
    litter = sum(len(list((part.path / "tmp").iterdir())) for part in crowd.parts)
    return {"writers": writers + ranks, "kills": kills, "waves": waves + 1, "torn": torn, "left_in_tmp": litter}


def check_files(crowd: Crowd, whole: Path, folder: Path) -> None:
    """The files of a cache that was never killed, and their bytes, but for how each record came to be."""
    expected = Crowd(whole, True)
    if not whole.exists():
        expected.write_all(0, 1)
    files = tree(expected.store.path(expected.key))
    found = tree(folder)
    assert set(found) == set(files), set(found) ^ set(files)
    if crowd.same_bits:
        differ = {name for name in files if found[name] != files[name] and "records/" not in name}
        assert not differ, differ


def main(folder: Path, rounds: int, seed: int) -> None:
    totals: dict[str, int] = {"rounds": rounds}
    for number in range(rounds):
        try:
            counts = run_round(folder, number, seed)
        except (AssertionError, OSError, CacheError) as error:
            raise SystemExit(f"round {number} of seed {seed}: {error}") from error
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    print(json.dumps(totals))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
