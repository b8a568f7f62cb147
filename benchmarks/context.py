"""
What length costs: forward and backward of one pair of long sequences, each length in a process of its own.

    python benchmarks/context.py [--lengths 1024,4096,16384] [--model llama|gemma2] [--checkpointing]

A sequence of length L is a prompt of L/2 tokens and a completion of L/2; a pair shares its prompt, so 1.5 L tokens are
computed. Printed are seconds on one thread, the peak of the process, and what the peak is above that of a pair of 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from fpo.scoring import install_scoring, pack, sum_logps
from fpo.stage2_align.cost import peak_resident

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
}
MODELS = {"llama": LlamaConfig, "gemma2": Gemma2Config}


def measure(model_name: str, length: int, *, checkpointing: bool) -> tuple[float, int]:
    """Seconds, and the bytes that this process held at its peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[model_name](**SHAPE)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    install_scoring(model)
    half = length // 2
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], 3 * half)
    packed = pack(ids, np.arange(4) * half, np.array([2]))
    started = time.process_time()
    logps = sum_logps(model(**packed._asdict()).token_logps, packed)
    (logps[0] - logps[1]).backward()
    return time.process_time() - started, peak_resident() or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        print(json.dumps(measure(options.model, options.alone, checkpointing=options.checkpointing)))
        return
    how = "with activation checkpointing" if options.checkpointing else "without activation checkpointing"
    print(f"{options.model}, {how}; torch {version('torch')}, transformers {version('transformers')}\n")
    print("| length | seconds | peak MiB | above a short pair |\n|---|---|---|---|")
    floor = 0.0
    for length in (64, *map(int, options.lengths.split(","))):
        again = [sys.executable, __file__, *sys.argv[1:], "--alone", str(length)]
        seconds, peak = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        floor = floor or peak
        print(f"| {length:,} | {seconds:.1f} | {peak / 2**20:,.0f} | {(peak - floor) / 2**20:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
