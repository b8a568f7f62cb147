"""
A DPO step from the cache against a plain padded two-model step: same pairs, same batches, same process.

    python benchmarks/align_step.py --pairs pairs.jsonl --tokenizer gpt2-folder [--batches 6] [--rounds 3]

Both train a random 33M-parameter Llama with AdamW on one torch thread. The plain step is what the DPO paper's code
does: chosen and rejected as padded rows, full logits, policy with gradients and reference without. Prints the losses
of both (they must agree) and the ratio of their times.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fpo.objectives import Logps
from fpo.objectives.dpo import dpo
from fpo.scoring import Packed, install_scoring, pack, sum_logps
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.tokenise import tokenise


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokens = tokenise(read_groups(str(options.pairs), "train[:400]").dataset, tokenizer, 512)
    batches = _batches(tokens.input_ids, tokens.splits, options.batches)
    reference = _llama(len(tokenizer))
    cached = [_reference_logps(reference, ids, splits) for ids, splits in batches]

    policies = [_llama(len(tokenizer)) for _ in range(2)]
    optimisers = [torch.optim.AdamW(policy.parameters(), lr=1e-5) for policy in policies]
    install_scoring(policies[1])
    ratios = []
    for round_number in range(options.rounds):
        times: list[list[float]] = [[], []]
        for (ids, splits), ref_logps in zip(batches, cached, strict=True):
            losses = []
            for side in (0, 1):
                started = time.perf_counter()
                if side == 0:
                    loss = _padded_loss(policies[0], reference, ids, splits)
                else:
                    loss = _packed_loss(policies[1], ref_logps, ids, splits)
                optimisers[side].zero_grad()
                loss.backward()
                optimisers[side].step()
                times[side].append(time.perf_counter() - started)
                losses.append(loss.item())
            assert abs(losses[0] - losses[1]) < 1e-4, losses
        ratios.append(sum(times[1]) / sum(times[0]))
        print(
            f"round {round_number}: padded two-model {sum(times[0]):.2f} s, from cache {sum(times[1]):.2f} s, "
            f"ratio {ratios[-1]:.3f}, last losses {losses[0]:.6f} {losses[1]:.6f}",
            flush=True,
        )
    print(f"ratio median {statistics.median(ratios):.3f} [{min(ratios):.3f}-{max(ratios):.3f}]")


def _llama(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
        )
    )


def _batches(ids: np.ndarray, splits: np.ndarray, count: int, size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    bounds = splits.astype(np.int64)
    starts = range(0, count * size, size)
    return [
        (ids[bounds[3 * s] : bounds[3 * (s + size)]], bounds[3 * s : 3 * (s + size) + 1] - bounds[3 * s])
        for s in starts
    ]


def _padded_rows(ids: np.ndarray, splits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen rows then rejected rows, padded: ids, attention mask, and which targets are completion tokens."""
    parts = [ids[a:b].astype(np.int64) for a, b in itertools.pairwise(splits)]
    rows = [(parts[3 * p], parts[3 * p + side]) for side in (1, 2) for p in range(len(parts) // 3)]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, completion) in enumerate(rows):
        size = len(prompt) + len(completion)
        tokens[row, :size] = torch.from_numpy(np.concatenate([prompt, completion]))
        mask[row, :size] = 1
        scored[row, len(prompt) : size] = 1
    return tokens, mask, scored[:, 1:].bool()


def _row_logps(model: PreTrainedModel, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, mask, scored = rows
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logps * scored).sum(-1)


def _padded_loss(
    policy: PreTrainedModel, reference: PreTrainedModel, ids: np.ndarray, splits: np.ndarray
) -> torch.Tensor:
    rows = _padded_rows(ids, splits)
    with torch.no_grad():
        ref = _row_logps(reference, rows)
    chosen, rejected = (_row_logps(policy, rows) - ref).chunk(2)
    return -functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def _packed_loss(policy: PreTrainedModel, ref_logps: torch.Tensor, ids: np.ndarray, splits: np.ndarray) -> torch.Tensor:
    packed = pack(ids, splits, np.full(len(splits) // 3, 2))
    logps = _packed_logps(policy, packed)
    counts = packed.counts.view(-1, 2)
    sides = (Logps(logps, logps / counts), Logps(ref_logps, ref_logps / counts))
    return dpo(*sides, beta=0.1).losses.mean()


def _packed_logps(model: PreTrainedModel, packed: Packed) -> torch.Tensor:
    scores = model(**packed._asdict())
    return sum_logps(scores.token_logps, packed).view(-1, 2)


@torch.no_grad()
def _reference_logps(reference: PreTrainedModel, ids: np.ndarray, splits: np.ndarray) -> torch.Tensor:
    """What a cache would hold, by the plain forward."""
    return torch.stack(_row_logps(reference, _padded_rows(ids, splits)).chunk(2), dim=1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
