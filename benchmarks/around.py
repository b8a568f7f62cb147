"""
Where the main thread's time goes in a run from the cache: what a step must compute, and what stands around it.

    python benchmarks/around.py PAIRS.jsonl --tokenizer FOLDER [--model llama] [--steps 16] [--top 12]

CPU seconds of the main thread on one torch thread, per step: the policy's forward, the objective, backward, clipping
and optimiser; Trainer's own; and for the next batch the seconds of the clock, since that is waiting. Then the functions
in which the rest is spent, by the profiler, which slows them down.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from align import BATCH, SHAPES, World, build_world
from transformers import AutoTokenizer
from transformers.utils import logging

from fpo.interrupts import StopRequest
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align.arguments import training_arguments
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.trainer import PairTrainer

OBJECTIVE = "fpo"


def trainer_of(world: World, run: Path) -> PairTrainer:
    recipe = world.recipe(OBJECTIVE)
    cache = find_cache(recipe, world.root / "store")
    args = training_arguments(recipe, run, cache)
    stream = PairStream(cache, seed=args.seed, per_device=BATCH, objective=recipe.objective)
    meter = ObjectiveMeter.of(recipe)
    model, tokenizer = load_policy(recipe, meter, run), AutoTokenizer.from_pretrained(world.root / "model")
    return PairTrainer(model, args, stream, meter, tokenizer, run / "metrics.jsonl", StopRequest())


@contextmanager
def accounts(trainer: PairTrainer) -> Iterator[Counter[str]]:
    """Inside, seconds are added up by what they are spent on."""
    spent: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str, clock: Callable[[], float] = time.thread_time) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[what] += clock() - started  # type: ignore[assignment]

        setattr(owner, name, call)

    counted(trainer, "get_batch_samples", "waiting for data", time.perf_counter)
    counted(trainer, "compute_loss", "forward and objective")
    counted(trainer.accelerator, "backward", "backward")
    counted(trainer.accelerator, "clip_grad_norm_", "clipping")
    trainer.create_optimizer_and_scheduler(len(trainer.stream))
    counted(trainer.optimizer, "step", "optimiser")
    started = time.thread_time()
    yield spent
    inside = sum(seconds for name, seconds in spent.items() if name != "waiting for data")
    spent["all else"] = time.thread_time() - started - inside  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--top", type=int, default=12)
    parser.set_defaults(gpu=False, attention=None, checkpointing=False)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder), options)
        build_caches(world.recipe(OBJECTIVE), world.root / "store")
        trainer_of(world, Path(folder) / "first").train()  # first touches
        trainer = trainer_of(world, Path(folder) / "run")
        started = time.perf_counter()
        with accounts(trainer) as spent:
            trainer.train()
        step = (time.perf_counter() - started) / options.steps
        profiled = trainer_of(world, Path(folder) / "profiled")
        profiler = cProfile.Profile()
        profiler.runcall(profiled.train)
    print(f"{options.pairs.name}, {options.model}, {options.steps} steps of {BATCH} pairs, {1000 * step:.1f} ms each\n")
    print("| spent on | ms a step | share |\n|---|---|---|")
    for name, seconds in spent.most_common():
        print(f"| {name} | {1000 * seconds / options.steps:.2f} | {seconds / options.steps / step:.1%} |")
    print()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(options.top)


if __name__ == "__main__":
    main()
