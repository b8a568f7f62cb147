"""
The head alone, forward and backward: CPU time, what autograd keeps, and peak memory above what stood there before.

    python benchmarks/head.py --vocabulary 256000 --tokens 8192 [--softcap 30] [--autocast] [--frozen] [--plain]

A Llama's head, or with a soft cap Gemma-2's, on random hidden states; one torch thread. `--plain` is log_softmax over
all logits, as most training code has it. Peak memory is Linux's VmHWM.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fpo.scoring import logps
from fpo.scoring.families import FamilyHead, adjusted_embeddings

MIB = 1 << 20


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logps.LOGITS_BUDGET_BYTES = int(options.budget * MIB)
    logps.CHUNK_BYTES = int(options.chunk * MIB)
    logps.BLOCK_BYTES = int(options.block * MIB)
    model = _model(options.vocabulary, options.hidden, options.softcap).requires_grad_(not options.frozen)
    score = _score(model, options.plain)
    hidden = torch.randn(options.tokens, options.hidden, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,))

    before = _resident("VmRSS")
    times = []
    for _ in range(options.rounds):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if options.autocast else nullcontext():
            found = score(hidden, targets)
        kept = _resident("VmRSS") - before  # of the last round
        found.sum().backward()
        times.append(time.process_time() - started)
        hidden.grad = None
        model.zero_grad()
    peak = _resident("VmHWM") - before
    print(f"cpu_s {min(times):.3f}  after_forward_mib {kept / MIB:.0f}  peak_mib {peak / MIB:.0f}")


def _score(model: PreTrainedModel, plain: bool) -> Callable[[Tensor, Tensor], Tensor]:
    adjusted = adjusted_embeddings(model, "model")
    whole, head = FamilyHead(model, "model", None), FamilyHead(model, "model", adjusted)
    if plain:
        return lambda hidden, targets: whole.project(hidden).float().log_softmax(-1).gather(-1, targets[:, None])
    return lambda hidden, targets: logps.token_logps(hidden, targets, head).logps


def _model(vocabulary: int, hidden: int, softcap: float | None) -> PreTrainedModel:
    capped = {} if softcap is None else {"final_logit_softcapping": softcap}
    config = AutoConfig.for_model(
        "llama" if softcap is None else "gemma2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        **capped,
    )
    return AutoModelForCausalLM.from_config(config)


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--frozen", action="store_true", help="no gradient of the weights")
    parser.add_argument("--plain", action="store_true", help="log_softmax over all logits")
    parser.add_argument("--rounds", type=int, default=3)
    for name, bytes_ in (
        ("budget", logps.LOGITS_BUDGET_BYTES),
        ("chunk", logps.CHUNK_BYTES),
        ("block", logps.BLOCK_BYTES),
    ):
        parser.add_argument(f"--{name}", type=float, default=bytes_ / MIB, help="MiB")
    return parser.parse_args()


if __name__ == "__main__":
    main()
