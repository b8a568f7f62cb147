"""
Stage 2 against what it replaces: the same pairs, the same random model, one epoch each, in one process.

    python benchmarks/align.py PAIRS.jsonl --tokenizer FOLDER [--model llama] [--steps 4] [--rounds 3]
                               [--gpu] [--attention branches] [--checkpointing]

Sides: runs from one cache (dpo, simpo, fpo, tdpo2); TRL's DPOTrainer with the reference in memory, and with its
log-probs computed before (both where trl is installed); a plain loop with chosen and rejected as padded rows, which
gathers before it normalises; and the floor, the bare matrix products of our step's own shapes. Each is the time of all
steps: of the processor on one thread in float32, or on a GPU of the clock, in mixed precision, with the peak of its
memory. Printed are the least of the rounds and the ratios with their range. `--attention` is for a GPU, where branches
one by one, `varlen`, `flex` and masked rows compete; without it, it is what the house takes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from fpo.interrupts import StopRequest
from fpo.recipe import Recipe, validate_recipe
from fpo.scoring import Layout, kernels, mixed_precision
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align.arguments import training_arguments
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.trainer import PairTrainer

BATCH, MAX_LENGTH, D_SAE, BETA = 8, 512, 16384, 0.1
HOOKPOINT = "model.layers.1"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": BETA},
    "simpo": {},
    "fpo": {"k": 50},
    "tdpo2": {"beta": BETA},
}
# A GPU's kernels, in the order in which they are asked.
ATTENTION: dict[str, tuple[kernels.Kernel, ...]] = {
    "branches": (),
    "varlen": (kernels.varlen,),
    "flex": (kernels.flex,),
    "masked": (),
}
TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""For messages, where the tokenizer says nothing of them."""
# What every trainer is given.
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "logging_steps": 1000,
    "save_strategy": "no",
    "report_to": "none",
}


class Shape(NamedTuple):
    """A random model."""

    family: str
    vocabulary: int
    """At least; the tokenizer uses a part of a larger one."""
    sizes: dict[str, Any]

    def config(self, vocabulary: int) -> Any:
        return AutoConfig.for_model(self.family, vocab_size=max(self.vocabulary, vocabulary), **self.sizes)


SHAPES = {
    # 33M parameters.
    "llama": Shape(
        "llama",
        0,
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
        },
    ),
    # A step of milliseconds.
    "tiny": Shape(
        "llama",
        0,
        {
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
        },
    ),
    # Soft caps, windows, and a large vocabulary.
    "gemma2": Shape(
        "gemma2",
        256_000,
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 256,
            "max_position_embeddings": 1024,
        },
    ),
    # As google/gemma-2-2b, which are the family's defaults.
    "gemma2-2b": Shape("gemma2", 256_000, {}),
    # As Qwen/Qwen2.5-0.5B.
    "qwen2-0.5b": Shape(
        "qwen2",
        151_936,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
}


class Cost(NamedTuple):
    """What a side took."""

    seconds: float
    peak: int
    """Bytes of GPU memory; 0 on a CPU."""


class World(NamedTuple):
    """Files of the experiment: `model`, `sae`, `pairs.jsonl`, `store`."""

    root: Path
    rows: list[dict[str, Any]]
    device: torch.device
    layout: Layout
    checkpointing: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of every trainer."""
        return {**SHARED, "use_cpu": not self.gpu, "bf16": self.gpu, "gradient_checkpointing": self.checkpointing}

    def cost(self, work: Callable[[], None]) -> Cost:
        """Of something that is done here."""
        gc.collect()
        gc.freeze()  # a collection goes over what this side has made, not over all that the libraries hold
        if not self.gpu:
            started = time.process_time()
            work()
            return Cost(time.process_time() - started, 0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return Cost(time.perf_counter() - started, torch.cuda.max_memory_allocated())

    def autocast(self) -> Any:
        return mixed_precision(self.device, "bfloat16" if self.gpu else None)

    def recipe(self, objective: str) -> Recipe:
        return validate_recipe(
            {
                "reference": {"model": str(self.root / "model"), "autocast": "bfloat16" if self.gpu else None},
                "features": [{"sae": str(self.root / "sae"), "hookpoint": HOOKPOINT, "self_check": False}],
                "data": {"source": str(self.root / "pairs.jsonl"), "max_length": MAX_LENGTH},
                "cache": {"top_logits": 64},
                "objective": {"name": objective, **OBJECTIVES[objective]},
                "training": self.training,
            },
            "benchmark",
        )

    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.root / "model", dtype=torch.float32)
        return model.to(self.device)


def build_world(root: Path, options: argparse.Namespace) -> World:
    """A random model, a random SAE and the first pairs of the file."""
    lines = itertools.islice(options.pairs.read_text(encoding="utf-8").splitlines(), options.steps * BATCH)
    rows = [json.loads(line) for line in lines]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(options.tokenizer)
    loaded.pad_token = loaded.pad_token or loaded.eos_token
    loaded.chat_template = loaded.chat_template or TURNS
    loaded.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = SHAPES[options.model].config(len(loaded))
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    write_sae(root / "sae", config.hidden_size)
    layout = Layout.MASKED if options.attention == "masked" else Layout.PACKED
    return World(root, rows, torch.device("cuda" if options.gpu else "cpu"), layout, options.checkpointing)


def write_sae(folder: Path, width: int) -> None:
    """A random SAE with ReLU in SAELens' format, a few per cent of its features active."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    encoder = torch.randn(width, D_SAE, generator=draw) / width**0.5
    tensors = {
        "W_enc": encoder,
        "W_dec": encoder.T.contiguous(),
        "b_enc": torch.full((D_SAE,), -2.0),
        "b_dec": torch.zeros(width),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    settings = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
    }
    (folder / "cfg.json").write_text(json.dumps({**settings, "hook_name": HOOKPOINT, "normalize_activations": "none"}))


def from_cache(world: World, objective: str) -> Cost:
    recipe = world.recipe(objective)
    cache = find_cache(recipe, world.root / "store")
    with tempfile.TemporaryDirectory() as run:
        args = training_arguments(recipe, Path(run), cache)
        meter = ObjectiveMeter.of(recipe)
        stream = PairStream(cache, seed=args.seed, per_device=BATCH, layout=world.layout, objective=recipe.objective)
        model, tokenizer = load_policy(recipe, meter, Path(run)), AutoTokenizer.from_pretrained(world.root / "model")
        trainer = PairTrainer(model, args, stream, meter, tokenizer, Path(run) / "metrics.jsonl", StopRequest())
        return world.cost(trainer.train)


def trl(world: World, *, precomputed: bool) -> Cost:
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as run:
        settings = {"disable_tqdm": True, "max_length": MAX_LENGTH, **world.training}
        trainer = DPOTrainer(
            model=world.model(),
            ref_model=world.model(),
            args=DPOConfig(output_dir=run, beta=BETA, precompute_ref_log_probs=precomputed, **settings),
            train_dataset=Dataset.from_list(world.rows),
            processing_class=AutoTokenizer.from_pretrained(world.root / "model"),
        )
        if precomputed:  # here rather than when training begins
            loader = trainer.get_train_dataloader()
            trainer.get_train_dataloader = lambda: loader
        return world.cost(trainer.train)


def padded(world: World) -> Cost:
    """Chosen and rejected as padded rows, policy and reference; only completions reach the head."""
    cache = find_cache(world.recipe("dpo"), world.root / "store")
    policy, reference = world.model().train(), world.model()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=SHARED["learning_rate"])

    def train() -> None:
        for batch in _padded_batches(cache):
            rows = [tensor.to(world.device) for tensor in batch]
            with world.autocast():
                with torch.no_grad():
                    ref = _row_logps(reference, *rows)
                logratios = (_row_logps(policy, *rows) - ref).view(2, -1)
            loss = -functional.logsigmoid(BETA * (logratios[0] - logratios[1])).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()

    return world.cost(train)


def _padded_batches(cache: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, which are none of padding, and which are scored: chosen rows, then rejected ones."""
    stream = PairStream(cache, seed=0, per_device=BATCH)
    for groups, _ in stream._micro_batches(0):
        parts = [groups.input_ids[a:b].astype(np.int64) for a, b in itertools.pairwise(groups.splits.astype(int))]
        rows = [(parts[3 * pair], parts[3 * pair + side]) for side in (1, 2) for pair in range(len(groups))]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for row, (prompt, completion) in enumerate(rows):
            size = len(prompt) + len(completion)
            ids[row, :size] = torch.from_numpy(np.concatenate([prompt, completion]))
            mask[row, :size] = 1
            scored[row, len(prompt) : size] = 1
        yield ids, mask, scored


def _row_logps(model: PreTrainedModel, ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return (logps * scored[:, 1:]).sum(-1)


@torch.no_grad()
def floor(world: World) -> Cost:
    """The products of our step alone: every linear layer over all tokens, the head over scored ones; three of each."""
    cache = find_cache(world.recipe("dpo"), world.root / "store")
    model = world.model()
    head = model.get_output_embeddings()
    layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    dtype = torch.bfloat16 if world.gpu else torch.float32
    costs = []
    for groups, _ in PairStream(cache, seed=0, per_device=BATCH)._micro_batches(0):
        for rows, weights in ((len(groups.input_ids), layers), (len(groups.token_logps), [head.weight])):
            for weight in weights:
                costs.append(world.cost(_products(weight.to(dtype), rows)))
    return Cost(sum(cost.seconds for cost in costs), max(cost.peak for cost in costs))


def _products(weight: Tensor, rows: int) -> Callable[[], None]:
    """A layer's products in forward and backward."""
    here, there = (torch.randn(rows, size, device=weight.device, dtype=weight.dtype) for size in weight.shape[::-1])

    def multiply() -> None:
        _ = here @ weight.T, there @ weight, there.T @ here

    return multiply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--attention", choices=ATTENTION)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    kernels.ON_GPU = ATTENTION.get(options.attention, kernels.ON_GPU)
    if not options.gpu:
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder), options)
        build_caches(world.recipe("fpo"), world.root / "store")
        sides: dict[str, Callable[[], Cost]] = {
            **{name: lambda name=name: from_cache(world, name) for name in OBJECTIVES},  # type: ignore[misc]
            "floor": lambda: floor(world),
            "padded": lambda: padded(world),
        }
        if find_spec("trl") is not None:
            sides["trl precomputed"] = lambda: trl(world, precomputed=True)
            sides["trl"] = lambda: trl(world, precomputed=False)
        rounds = [{name: side() for name, side in sides.items()} for _ in range(options.rounds)]
    report(rounds, options)


def report(rounds: list[dict[str, Cost]], options: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl") if find_spec(name))
    pairs = options.steps * BATCH
    where = torch.cuda.get_device_name() if options.gpu else "one thread"
    how = f"{options.attention or 'default'} attention{', activations computed twice' * options.checkpointing}"
    print(f"{options.pairs.name}, {options.model}, {pairs} pairs in batches of {BATCH}, {where}, {how}; {versions}\n")
    print("| side | seconds | to dpo from the cache | peak MiB |\n|---|---|---|---|")
    for name in rounds[0]:
        least = min(costs[name].seconds for costs in rounds)
        peak = f"{max(costs[name].peak for costs in rounds) / 2**20:,.0f}" if options.gpu else "-"
        print(f"| {name} | {least:.2f} | {ratio(rounds, name, 'dpo')} | {peak} |")
    print(f"\nfpo / simpo: {ratio(rounds, 'fpo', 'simpo')}")


def ratio(rounds: list[dict[str, Cost]], one: str, other: str) -> str:
    """Median over the rounds, and range."""
    ratios = sorted(costs[one].seconds / costs[other].seconds for costs in rounds)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"


if __name__ == "__main__":
    main()
