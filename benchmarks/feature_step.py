"""
What the feature term costs: its operations, and a step of FPO against one of SimPO, in CPU time and in peak memory.

    python benchmarks/feature_step.py --pairs pairs.jsonl --tokenizer gpt2-folder [--batches 3] [--rounds 5]

Both train a random 33M-parameter Llama with AdamW on one torch thread, on the same batches of 8 pairs, which are packed
in the measured time; so does SimPO a second time, which says what the ratio of equal steps is. FPO's features are of a
random ReLU SAE of 4096 features, 64 of them cached per completion.
Operations are those that reach torch's dispatcher, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fpo.objectives import OBJECTIVES, Objective
from fpo.scoring import Layout, Packed, Sae, Scores, install_scoring
from fpo.scoring.sae import SaeArrays, SaeFacts
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.tokenise import tokenise
from fpo.stage2_align.measure import Hookpoint, ObjectiveMeter, batch_metrics
from fpo.stage2_align.stream import Batch, Epoch, batch_tensors
from fpo.store import Features, Groups

HIDDEN, D_SAE, CACHED = 512, 4096, 64
HOOKPOINT = "model.layers.1"
AGAIN = " again"


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    count = views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.views += func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokens = tokenise(read_groups(str(options.pairs), "train[:400]").dataset, tokenizer, 512)
    groups = _groups(tokens.input_ids, tokens.splits)
    for size in (8, 32):
        some = groups.take(np.arange(size))
        simpo, fpo = (_loss_alone(name, some) for name in ("simpo", "fpo"))
        print(
            f"{size} pairs: {fpo.operations - simpo.operations} operations of the feature term, "
            f"{fpo.views - simpo.views} of them views; {1e3 * (fpo.seconds - simpo.seconds):.1f} ms, "
            f"to pack {1e3 * (fpo.packing - simpo.packing):.2f} ms",
            flush=True,
        )
    vocabulary = len(tokenizer)
    batches = [groups.take(np.arange(8 * n, 8 * n + 8)) for n in range(options.batches)]
    peaks = {name: _peak_bytes(name, vocabulary, batches) for name in ("simpo", "fpo")}
    said = ", ".join(f"{name} {peak / 2**20:.1f} MiB" for name, peak in peaks.items())
    print(f"peak of tensors: {said}, ratio {peaks['fpo'] / peaks['simpo']:.4f}", flush=True)
    sides = {name: _Side(name.removesuffix(AGAIN), vocabulary) for name in ("simpo", "fpo", f"simpo{AGAIN}")}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds * len(batches)):
        # One after the other first: what each leaves in the caches falls to all.
        order = sorted(sides)[number % 3 :] + sorted(sides)[: number % 3]
        for name in order:
            spent[name].append(sides[name].step(batches[number % len(batches)]))
    print(f"{len(spent['simpo'])} steps of {statistics.median(spent['simpo']):.2f} s")
    for name in ("fpo", f"simpo{AGAIN}"):
        ratios = sorted(one / other for one, other in zip(spent[name], spent["simpo"], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name} by simpo: total {sum(spent[name]) / sum(spent['simpo']):.4f}, step by step", end=" ")
        print(f"median {middle:.4f}, quartiles {low:.4f}-{high:.4f}")


def _peak_bytes(name: str, vocabulary: int, batches: list[Groups]) -> int:
    """Most that tensors held at once, from the model's making on, with the SAE, whose memory is numpy's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side = _Side(name, vocabulary)
        for batch in batches:
            side.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    # What an earlier profile saw allocated and not freed is still in the totals.
    held = max(totals) - (totals[0] - memory[0]["args"]["Bytes"])
    saes = [vars(hookpoint.sae).values() for hookpoint in side.meter.hookpoints]
    return int(held + sum(tensor.nbytes for values in saes for tensor in values if isinstance(tensor, torch.Tensor)))


class _Side:
    """A policy that is trained under one objective."""

    def __init__(self, name: str, vocabulary: int) -> None:
        self.objective, self.meter = _objective(name)
        self.policy = _llama(vocabulary)
        install_scoring(self.policy, tuple(hookpoint.name for hookpoint in self.meter.hookpoints))
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)

    def step(self, groups: Groups) -> float:
        """CPU seconds of a step on these groups."""
        started = time.process_time()
        batch = _batch(groups, self.objective)
        scores = self.policy(**Packed.of(batch)._asdict())
        measurement = self.meter.measure(scores, batch)
        batch_metrics(measurement, scores, batch)
        self.optimiser.zero_grad()
        (measurement.value.losses * batch["weight"]).sum().backward()
        self.optimiser.step()
        return time.process_time() - started


class _Loss(NamedTuple):
    """From a model's scores to the gradient of the loss by them."""

    operations: int
    views: int
    seconds: float
    packing: float


def _loss_alone(name: str, groups: Groups, repeats: int = 20) -> _Loss:
    objective, meter = _objective(name)
    batch = _batch(groups, objective)
    n = len(batch["targets"])
    logps, residual = (-torch.rand(n)).requires_grad_(), torch.randn(n, HIDDEN, requires_grad=True)
    nothing = torch.zeros(n)
    scores = Scores(
        logps,
        torch.zeros(n, 0, dtype=torch.long),
        torch.zeros(n, 0),
        (residual,) * len(meter.hookpoints),
        *[nothing] * 4,
    )

    def run() -> None:
        meter.measure(scores, batch).value.losses.sum().backward()

    with Operations() as operations:
        run()
    return _Loss(
        operations.count, operations.views, _fastest(run, repeats), _fastest(lambda: _batch(groups, objective), repeats)
    )


def _fastest(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


def _objective(name: str) -> tuple[Objective, ObjectiveMeter]:
    objective = OBJECTIVES[name](name=name)
    if objective.needs.features is None:
        return objective, ObjectiveMeter(objective, (), incomplete=False)
    return objective, ObjectiveMeter(objective, (Hookpoint(HOOKPOINT, _sae(), None),), incomplete=False)


def _batch(groups: Groups, objective: Objective) -> Batch:
    if objective.needs.features is None:
        groups = groups.with_columns([])
    return batch_tensors(groups, objective, Layout.PACKED, Epoch(0, 0), np.full(len(groups), 1 / len(groups)))


def _sae() -> Sae:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((HIDDEN, D_SAE)) / HIDDEN**0.5).astype(np.float32)
    facts = SaeFacts(HIDDEN, D_SAE, "relu", "random", None, None, False)
    return Sae(SaeArrays(facts, weight, np.zeros(D_SAE, np.float32), "relu", "none"))


def _groups(ids: np.ndarray, splits: np.ndarray) -> Groups:
    """Pairs as a cache would give them, with made-up numbers of the reference."""
    rng = np.random.default_rng(0)
    pairs = len(splits) // 3
    completions = 2 * pairs
    scored = int(np.diff(splits.astype(np.int64)).reshape(-1, 3)[:, 1:].sum())
    indices = np.sort(np.stack([rng.choice(D_SAE, CACHED, replace=False) for _ in range(completions)]), axis=1)
    features = Features(
        splits=np.arange(completions + 1, dtype=np.uint64) * CACHED,
        indices=indices.astype(np.uint32).reshape(-1),
        acts=rng.random(completions * CACHED, dtype=np.float32),
        active=np.full(completions, D_SAE // 2, np.uint32),
        tail_sq=np.zeros(completions, np.float32),
    )
    return Groups(
        group_id=np.arange(pairs, dtype=np.uint64),
        n_completions=np.full(pairs, 2, np.uint32),
        completion_digest=np.zeros((completions, 16), np.uint8),
        input_ids=ids.astype(np.uint32),
        splits=splits.astype(np.uint64),
        score=np.tile(np.array([1, 0], np.float32), pairs),
        weight=np.ones(pairs, np.float32),
        ref_logps=-100 * rng.random(completions, dtype=np.float32),
        token_logps=-rng.random(scored, dtype=np.float32),
        columns=(features,),
    )


def _llama(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
