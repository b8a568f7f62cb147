"""
What two arithmetics make of the same weights: the logratio before the first step, which should be 0.

    python benchmarks/arithmetic.py --model stories260K --pairs pairs.jsonl [--count 256]

The policy computes in float32 under bfloat16 autocast, as `training.bf16: true` trains, in batches of 8 pairs; the
reference in each arithmetic that a recipe can ask for, in stage 1's batches. Per arithmetic: the standard deviation of
the logratio over completions and its largest size, nats; per token the mean |difference|, and the mean difference with
its sign over a completion: its largest and its mean over all completions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from fpo.recipe import Arithmetic
from fpo.scoring import Packed, install_scoring, load_model, load_tokenizer, mixed_precision, pack
from fpo.stage1_cache.read import read_groups
from fpo.stage1_cache.score import TokenGroups, micro_batches, take
from fpo.stage1_cache.tokenise import tokenise

POLICY = Arithmetic("float32", "bfloat16")
REFERENCES = (Arithmetic("bfloat16", None), Arithmetic("float32", None), POLICY)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.model, None)
    tokens = tokenise(
        read_groups(str(options.pairs), f"train[:{options.count}]").dataset, tokenizer, options.max_length
    )
    groups = TokenGroups(tokens.input_ids, tokens.splits, tokens.n_completions, tokens.score_mask)
    rows = np.random.default_rng(0).permutation(len(groups))
    policy = _logps(options.model, POLICY, groups, np.array_split(rows, len(rows) // 8))
    lengths = np.array([len(part) for part in policy])
    print(f"{len(policy)} completions of {lengths.mean():.0f} tokens; the policy computes in {POLICY}")
    print(f"{'reference':40} {'std':>8} {'max':>8} {'token':>9} {'signed max':>11} {'signed mean':>12}")
    for arithmetic in REFERENCES:
        reference = _logps(options.model, arithmetic, groups, list(micro_batches(groups, 8192)))
        apart = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
        ratios = np.array([part.sum() for part in apart])
        signed = np.array([part.mean() for part in apart])
        token = np.abs(np.concatenate(apart)).mean()
        print(
            f"{arithmetic!s:40} {ratios.std():8.4f} {np.abs(ratios).max():8.4f} {token:9.2g} "
            f"{np.abs(signed).max():11.2g} {signed.mean():12.2g}"
        )


def _logps(model: Path, arithmetic: Arithmetic, groups: TokenGroups, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Token log-probs of every completion, in the order of the pairs."""
    scorer = load_model(model, arithmetic.dtype)
    install_scoring(scorer)
    found: dict[int, np.ndarray] = {}
    for rows in batches:
        batch = take(groups, rows)
        packed = pack(batch.input_ids, batch.splits, batch.n_completions)
        with torch.inference_mode(), mixed_precision(torch.device("cpu"), arithmetic.autocast):
            scores = scorer(**Packed(*packed)._asdict())
        parts = scores.token_logps.double().numpy()
        for place, part in enumerate(np.split(parts, np.cumsum(packed.lengths.numpy())[:-1])):
            found[2 * int(rows[place // 2]) + place % 2] = part
    return [found[completion] for completion in sorted(found)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
