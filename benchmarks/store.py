"""
The store against np.memmap, HF datasets (Arrow) and safetensors shards, on the same data in one process.

    python benchmarks/store.py [--pairs 20000] [--rounds 5] [--folder TMP] [--output benchmarks/results/NAME.md]

Synthetic pairs of realistic shape: log-normal lengths (mean about 100 + 2 x 250 tokens), Zipf tokens of a 128k
vocabulary, 64 features of 65,536 per completion. Rounds are interleaved and every ratio is taken inside its round
against np.memmap. Files are read from the page cache: this measures the formats, not the disk. Only the store fsyncs,
checksums and reads everything back when it writes, and only it verifies when it reads. The last table is what a trainer
waits for.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from safetensors.numpy import load_file, save_file

from fpo.stage2_align.stream import PairStream
from fpo.store import (
    FORMAT_VERSION,
    CacheWriter,
    ColumnRows,
    Features,
    Groups,
    Spec,
    column_recipe,
    completion_digests,
    groups_digest,
    open_cache,
    plan_shards,
    shard_digest,
)

VOCAB, D_SAE, TOP_K = 128_000, 65_536, 64
SPEC: Spec = {
    "kind": "features",
    "hookpoint": "model.layers.12",
    "sae": {"weights": "0" * 64, "config": {}},
    "d_sae": D_SAE,
    "top_k": TOP_K,
    "pooling": "mean",
}
BATCH = 32
BLOCK_SHARDS = 8
STEP_MS = (5, 20, 100)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    disable_progress_bars()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        pairs = realistic_pairs(options.pairs)
        plan = plan_shards(pairs.sizes, pairs.n_completions, seed=0)
        formats = [
            Store(folder, pairs, plan),
            MemMap(folder, pairs),
            Arrow(folder, pairs),
            Safetensors(folder, pairs, plan),
        ]
        lines = [*_heading(pairs, plan), *_formats(formats, options.rounds), *_waits(formats[0], options.rounds)]
    finally:
        shutil.rmtree(folder)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def realistic_pairs(n: int) -> Groups:
    """The whole data set as one `Groups`, each of two completions, with their features beside them."""
    rng = np.random.default_rng(0)
    means = np.log([[100, 250, 250]]) - 0.32
    lengths = np.clip(rng.lognormal(np.broadcast_to(means, (n, 3)), 0.8), 1, 1000).astype(np.int64)
    splits = np.concatenate([[0], np.cumsum(lengths.ravel())]).astype(np.uint64)
    input_ids = (rng.zipf(1.2, int(splits[-1])) % VOCAB).astype(np.uint32)
    scored = lengths[:, 1:].ravel()
    token_logps = -rng.gamma(0.4, 3.0, int(scored.sum())).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(scored)[:-1]])
    n_completions = np.full(n, 2, np.uint32)
    return Groups(
        group_id=np.arange(n, dtype=np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(input_ids, splits, n_completions),
        input_ids=input_ids,
        splits=splits,
        score=np.full(2 * n, np.nan, np.float32),
        weight=np.ones(n, np.float32),
        ref_logps=np.add.reduceat(token_logps, starts, dtype=np.float64).astype(np.float32),
        token_logps=token_logps,
        columns=(_features(rng, n),),
    )


def _features(rng: np.random.Generator, n: int) -> Features:
    """Popular features are popular everywhere: log-normal popularity, about 64 distinct ones per completion."""
    popularity = np.cumsum(rng.lognormal(0, 2, D_SAE))
    drawn = np.searchsorted(popularity, rng.random((2 * n, 90)) * popularity[-1])
    kept = [np.unique(row)[:TOP_K] for row in drawn]
    counts = np.array([len(row) for row in kept])
    return Features(
        indices=np.concatenate(kept).astype(np.uint32),
        acts=rng.gamma(1.0, 1.5, int(counts.sum())).astype(np.float32),
        splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
        active=(counts + 100).astype(np.uint32),
        tail_sq=rng.random(2 * n, dtype=np.float32),
    )


def arrays_of(pairs: Groups) -> dict[str, np.ndarray]:
    """Every array by name, without copying."""
    names = ("group_id", "n_completions", "completion_digest", "input_ids", "splits")
    names += ("score", "weight", "ref_logps", "token_logps")
    (features,) = pairs.columns
    inner = ("indices", "acts", "splits", "active", "tail_sq")
    return {n: getattr(pairs, n) for n in names} | {f"features.{n}": getattr(features, n) for n in inner}


def pairs_from(arrays: dict[str, np.ndarray]) -> Groups:
    features = {name.split(".")[1]: array for name, array in arrays.items() if "." in name}
    return Groups(**{n: a for n, a in arrays.items() if "." not in n}, columns=(Features(**features),))


class Format:
    """One way to keep the data: write it all, open it, read it all once, read shuffled batches."""

    name: str

    def __init__(self, folder: Path, pairs: Groups, plan: list[np.ndarray] | None = None) -> None:
        self.path, self.pairs, self.plan = folder / type(self).__name__, pairs, plan or []

    def write(self) -> None:
        raise NotImplementedError

    def open(self) -> Any:
        raise NotImplementedError

    def read(self) -> int:
        """Every value into memory as numpy; bytes."""
        raise NotImplementedError

    def batches(self, n: int) -> int:
        """The first n shuffled batches; pairs."""
        raise NotImplementedError

    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def _blocks(self, n: int, load: Callable[[int], Groups]) -> int:
        """Batches as stage 2 makes them: shards in blocks, shuffled inside."""
        rng, seen = np.random.default_rng(1), 0
        order = rng.permutation(len(self.plan))
        for first in range(0, len(order), BLOCK_SHARDS):
            block = Groups.concat([load(int(sid)) for sid in order[first : first + BLOCK_SHARDS]])
            rows = rng.permutation(len(block))
            for start in range(0, len(rows) - BATCH + 1, BATCH):
                seen += len(block.take(rows[start : start + BATCH]))
                if seen >= n * BATCH:
                    return seen
        return seen


class Store(Format):
    name = "store (verified)"

    def write(self) -> None:
        shard_groups = [len(ids) for ids in self.plan]
        groups = {
            "digest": groups_digest(self._digest(ids) for ids in self.plan),
            "n_groups": len(self.pairs),
            "n_completions": int(self.pairs.n_completions.sum()),
            "score_mask": False,
            "seed": 0,
            "shard_groups": shard_groups,
        }
        recipe = {"format": FORMAT_VERSION, "scorer": {"vocab_size": VOCAB}, "groups": groups}
        base = CacheWriter(self.path, recipe, self.plan)
        beside = CacheWriter(self.path, column_recipe(base.key, SPEC, shard_groups), self.plan)
        for sid in base.missing():
            rows = self.pairs.take(self.plan[sid])
            base.write(sid, rows.with_columns(()), {})
            beside.write(sid, ColumnRows(rows.group_id, len(rows.ref_logps), rows.columns[0]), {})
        beside.seal({})
        base.seal({})
        self.key = base.key

    def _digest(self, ids: np.ndarray) -> str:
        rows = self.pairs.take(ids)
        return shard_digest(rows.group_id, rows.n_completions, rows.completion_digest, rows.score, rows.weight)

    def open(self) -> Any:
        return open_cache(self.path, self.key, columns=[SPEC])

    def read(self) -> int:
        cache = self.open()
        return sum(_size(cache.shard(sid)) for sid in range(len(self.plan)))

    def batches(self, n: int) -> int:
        return self._blocks(n, self.open().shard)


class MemMap(Format):
    name = "np.memmap"

    def write(self) -> None:
        self.path.mkdir()
        for name, array in arrays_of(self.pairs).items():
            np.save(self.path / f"{name}.npy", array)

    def open(self) -> Groups:
        return pairs_from({path.stem: np.load(path, mmap_mode="r") for path in self.path.iterdir()})

    def read(self) -> int:
        return sum(np.array(array).nbytes for array in arrays_of(self.open()).values())

    def batches(self, n: int) -> int:
        pairs = self.open()
        rows = np.random.default_rng(1).permutation(len(pairs))
        return sum(len(pairs.take(rows[BATCH * i : BATCH * (i + 1)])) for i in range(n))


class Arrow(Format):
    name = "HF datasets"

    def write(self) -> None:
        p, (f,) = self.pairs, self.pairs.columns
        assert isinstance(f, Features)
        both = np.arange(len(p) + 1) * 2

        def ragged(values: np.ndarray, splits: np.ndarray) -> pa.Array:
            return pa.ListArray.from_arrays(pa.array(splits.astype(np.int32)), pa.array(values))

        columns: dict[str, Any] = {"group_id": pa.array(p.group_id), "weight": pa.array(p.weight)}
        for side, name in enumerate(("prompt", "chosen", "rejected")):
            rows = np.arange(len(p)) * 3 + side
            parts = [p.input_ids[a:b] for a, b in zip(p.splits[rows], p.splits[rows + 1], strict=True)]
            columns[f"{name}_ids"] = ragged(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
        columns["score"], columns["ref_logps"] = ragged(p.score, both), ragged(p.ref_logps, both)
        columns["token_logps"] = ragged(p.token_logps, p.scored_splits[::2])
        columns["indices"], columns["acts"] = ragged(f.indices, f.splits[::2]), ragged(f.acts, f.splits[::2])
        columns["kept"] = ragged(np.diff(f.splits), both)
        columns["active"], columns["tail_sq"] = ragged(f.active, both), ragged(f.tail_sq, both)
        Dataset(pa.table(columns)).save_to_disk(self.path)

    def open(self) -> Any:
        return load_from_disk(str(self.path))

    def read(self) -> int:
        total = 0
        for column in self.open().data.table.columns:
            for chunk in column.chunks:
                total += np.array(chunk.flatten() if pa.types.is_list(chunk.type) else chunk).nbytes
        return total

    def batches(self, n: int) -> int:
        data = self.open().with_format("numpy")
        rows = np.random.default_rng(1).permutation(len(data))
        return sum(len(data[rows[BATCH * i : BATCH * (i + 1)]]["group_id"]) for i in range(n))


class Safetensors(Format):
    name = "safetensors shards"

    def write(self) -> None:
        self.path.mkdir()
        for sid, rows in enumerate(self.plan):
            save_file(arrays_of(self.pairs.take(rows)), self.path / f"{sid:06d}.safetensors")

    def open(self) -> list[Path]:
        return sorted(self.path.iterdir())

    def read(self) -> int:
        return sum(sum(array.nbytes for array in load_file(path).values()) for path in self.open())

    def batches(self, n: int) -> int:
        paths = self.open()
        return self._blocks(n, lambda sid: pairs_from(load_file(paths[sid])))


def _size(pairs: Groups) -> int:
    return sum(array.nbytes for array in arrays_of(pairs).values())


def _formats(formats: list[Format], rounds: int) -> list[str]:
    raw, n = _size(formats[0].pairs), len(formats[0].pairs)
    n_batches = min(300, n // BATCH // 2)
    tasks: dict[str, Callable[[Format], Any]] = {
        "write": lambda f: (shutil.rmtree(f.path, ignore_errors=True), f.write()),
        "open": lambda f: f.open(),
        "read all": lambda f: f.read(),
        "shuffled batches": lambda f: f.batches(n_batches),
    }
    times: dict[str, dict[str, list[float]]] = {task: {f.name: [] for f in formats} for task in tasks}
    for number in range(rounds):
        for task, run in tasks.items():
            # Another order in every round, so that nobody always inherits the same neighbour's mess.
            for f in [*formats[number % 4 :], *formats[: number % 4]]:
                if task == "write" and number >= 3:
                    continue
                started = time.perf_counter()
                run(f)
                times[task][f.name].append(time.perf_counter() - started)
    units: dict[str, tuple[str, Callable[[float], float]]] = {
        "write": ("MB/s raw", lambda s: raw / s / 1e6),
        "open": ("ms", lambda s: s * 1000),
        "read all": ("MB/s raw", lambda s: raw / s / 1e6),
        "shuffled batches": ("pairs/s", lambda s: n_batches * BATCH / s),
    }
    lines = ["| format | bytes per pair | " + " | ".join(f"{t}, {units[t][0]}" for t in tasks) + " |", "|---" * 6 + "|"]
    for f in formats:
        cells = [f"{f.n_bytes() / n:.0f}"]
        for task in tasks:
            own = statistics.median(times[task][f.name])
            ratios = [a / b for a, b in zip(times[task][f.name], times[task]["np.memmap"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
            cells.append(f"{units[task][1](own):,.{1 if task == 'open' else 0}f}; x {spread}")
        lines.append(f"| {f.name} | " + " | ".join(cells) + " |")
    lines += ["", "x: time against np.memmap in the same round, median [least-most]; below 1 is faster.", ""]
    return lines


def _waits(store: Format, rounds: int) -> list[str]:
    lines = [
        f"A trainer that sleeps for its step; {BATCH // 2} pairs per batch from `PairStream`, the first batch aside:",
        "",
        "| step, ms | batches | mean wait, ms | of the step | 99th percentile, ms | longest, ms | first batch, ms |",
        "|---" * 7 + "|",
    ]
    for step_ms in STEP_MS:
        stream = PairStream(store.open(), seed=0, per_device=BATCH // 2)
        means, waits, firsts = [], [], []
        for number in range(min(rounds, 3)):
            stream.start(epoch=number)
            own = _one_wait(stream, step_ms / 1000, min(len(stream), max(6000 // step_ms, 60)))
            firsts.append(own[0])
            means.append(statistics.mean(own[1:]))
            waits += own[1:]
        shares = [100 * mean / (step_ms / 1000) for mean in means]
        lines.append(
            f"| {step_ms} | {len(waits)} | {1000 * statistics.mean(waits):.3f} "
            f"| {statistics.median(shares):.2f} % [{min(shares):.2f}-{max(shares):.2f}] "
            f"| {1000 * float(np.quantile(waits, 0.99)):.2f} | {1000 * max(waits):.1f} | {1000 * max(firsts):.0f} |"
        )
    return lines


def _one_wait(stream: PairStream, step: float, n: int) -> list[float]:
    waits, iterator = [], iter(stream)
    for _ in range(n):
        started = time.perf_counter()
        next(iterator)
        waits.append(time.perf_counter() - started)
        time.sleep(step)
    del iterator
    return waits


def _heading(pairs: Groups, plan: list[np.ndarray]) -> list[str]:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("zarr", "numcodecs", "numpy", "datasets", "safetensors")
    )
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    return [
        f"# Store, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python benchmarks/store.py --pairs {len(pairs)}` on {os.cpu_count()} shared cores ({platform.machine()}), "
        f"load {load} at the start; Python {platform.python_version()}, {packages}.",
        "",
        f"{len(pairs)} pairs, {pairs.n_tokens / len(pairs):.0f} tokens and {_size(pairs) / len(pairs):.0f} raw bytes "
        f"each, {len(plan)} shards. Page cache warm. Only the store fsyncs, checksums and reads back what it writes, "
        "and verifies what it reads.",
        "",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--output", type=Path, help="write the tables there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
