"""
Measure a policy of the demo world:
`python -m fpo.demo.evaluate RUN_OR_MODEL [--world demo-world] [--samples 400] [--json]`.

Reference and policy complete the same held-out openings from the same random numbers. Reported are the gold
reward of both (how the ending feels, -1 to 1), the share of openings where the policy's story ends better,
and KL(policy || reference) per completion in nats: what the reward was paid with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fpo.demo.build import read_card
from fpo.demo.grammar import gold_reward
from fpo.demo.preferences import sample_openings
from fpo.demo.sampling import completion_logps, sample_completions
from fpo.errors import DataError, FpoError, ModelError


@dataclass(frozen=True)
class Estimate:
    """A mean over openings with the half-width of its 95% confidence interval (normal)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} +- {self.half_width:.3f}"


@dataclass(frozen=True)
class Example:
    opening: str
    reference: str
    policy: str


@dataclass(frozen=True)
class Evaluation:
    samples: int
    reference_reward: Estimate
    policy_reward: Estimate
    gain: Estimate
    """Policy minus reference, opening by opening."""

    win_rate: Estimate
    """Openings where the policy's ending is the happier one; a tie is half a win."""

    kl: Estimate
    """KL(policy || reference) of a whole completion, nats, estimated on the policy's samples."""

    reference_tokens: float
    policy_tokens: float
    """Mean length of a completion: a reward bought with length shows here."""

    policy_unfinished: float
    """Share of the policy's completions that do not end."""

    example: Example | None
    """The first opening whose story ends better with the policy."""


def evaluate(policy_folder: Path, world: Path, samples: int = 400, seed: int = 0) -> Evaluation:
    """
    Compare the policy in `policy_folder` with the reference of `world` on openings that no training pair has.

    ModelError or DataError where one of the two is not there, or the policy has another vocabulary.
    """
    card = read_card(world)
    if card is None:
        raise DataError(f"{world}: no demo world here; build it with: python -m fpo.demo.build --output {world}")
    reference, policy = _load(world / "model"), _load(policy_folder)
    if policy.config.vocab_size != reference.config.vocab_size:
        raise ModelError(
            f"{policy_folder}: a vocabulary of {policy.config.vocab_size}, the world's reference has"
            f" {reference.config.vocab_size}; evaluate a policy trained from {world / 'model'}"
        )
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rng = np.random.default_rng([card["settings"]["seed"], seed, 4])
    openings = sample_openings(rng, samples, _training_openings(world))
    uniforms = rng.random((samples, card["settings"]["preferences"]["max_new_tokens"]), dtype=np.float32)
    return _compare(reference, policy, tokenizer, openings, uniforms)


def _compare(
    reference: LlamaForCausalLM,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    openings: Sequence[str],
    uniforms: NDArray[np.float32],
) -> Evaluation:
    prompts = [tokenizer(opening)["input_ids"] for opening in openings]
    before = sample_completions(reference, prompts, uniforms, "reference")
    after = sample_completions(policy, prompts, uniforms, "policy")
    logratios = completion_logps(policy, prompts, after) - completion_logps(reference, prompts, after)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_of] for ids_of in (before, after)]
    rewards = np.array([[gold_reward(text) for text in side] for side in texts])
    gain = rewards[1] - rewards[0]
    better = np.flatnonzero(gain > 0)
    example = Example(openings[better[0]], texts[0][better[0]], texts[1][better[0]]) if len(better) else None
    return Evaluation(
        samples=len(openings),
        reference_reward=estimate(rewards[0]),
        policy_reward=estimate(rewards[1]),
        gain=estimate(gain),
        win_rate=estimate((gain > 0) + 0.5 * (gain == 0)),
        kl=estimate(logratios),
        reference_tokens=float(np.mean([len(ids) for ids in before])),
        policy_tokens=float(np.mean([len(ids) for ids in after])),
        policy_unfinished=float(np.mean([ids[-1] != policy.config.eos_token_id for ids in after])),
        example=example,
    )


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and 1.96 standard errors of independent values."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else float("inf")
    return Estimate(float(values.mean()), 1.96 * spread / len(values) ** 0.5)


def table(evaluation: Evaluation) -> str:
    """For people: one line per figure, then a story before and after."""
    e = evaluation
    rows = [
        ("openings", f"{e.samples}, held out, the same for both"),
        ("reward reference", f"{e.reference_reward}   (-1 sad ending, +1 happy; 95% interval)"),
        ("reward policy", f"{e.policy_reward}"),
        ("gain", f"{e.gain}"),
        ("win rate", f"{e.win_rate.mean:.1%} +- {e.win_rate.half_width:.1%}   (a tie is half a win)"),
        ("KL to reference", f"{e.kl.mean:.2f} +- {e.kl.half_width:.2f} nats per completion"),
        (
            "tokens",
            f"{e.reference_tokens:.1f} -> {e.policy_tokens:.1f}, {e.policy_unfinished:.1%} unfinished",
        ),
    ]
    lines = [f"{name:<18}{value}" for name, value in rows]
    if e.example:
        lines += ["", e.example.opening, f"  before: {e.example.reference.strip()}"]
        lines += [f"  after:  {e.example.policy.strip()}"]
    return "\n".join(lines)


def _load(folder: Path) -> LlamaForCausalLM:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no model here (config.json is missing); give a run folder or a saved model")
    return LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval()


def _training_openings(world: Path) -> set[str]:
    lines = (world / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["prompt"] for line in lines}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fpo.demo.evaluate", description="Gold reward and KL of a policy of the demo world."
    )
    parser.add_argument("policy", type=Path, metavar="RUN_OR_MODEL", help="a run folder or a saved model")
    parser.add_argument("--world", type=Path, default=Path("demo-world"), help="default: demo-world")
    parser.add_argument("--samples", type=int, default=400, help="openings to complete (default: 400)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # one bar per model that transformers reads
    try:
        evaluation = evaluate(options.policy, options.world, options.samples)
    except FpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(evaluation), indent=2) if options.json else table(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
