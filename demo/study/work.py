"""
One training of the study, from its start to what is measured of it: `held_out.json` and `spoken.json` in the run's
folder. Each is written once it is whole: what is there is done. What is measured pair by pair and story by story stays
in them, since methods are compared on the same pairs and stories.

A policy's own stories begin with openings that no training pair has and are drawn by the same random numbers for every
policy. Measured are their gold reward, their KL to the reference, and how varied they are.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from fpo.demo.build import read_card
from fpo.demo.grammar import gold_reward
from fpo.demo.preferences import sample_openings
from fpo.demo.sampling import completion_logps, sample_completions
from fpo.demo.study.plan import Place
from fpo.evaluation.drift_report import FEATURES_FILE, DriftQuestion, drift_report
from fpo.evaluation.held_out import PairNotes
from fpo.evaluation.own_samples import token_statistics
from fpo.evaluation.sampling import Sampling
from fpo.recipe import Recipe
from fpo.stage1_cache import find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.run import write_whole

SAMPLES = 400
"""Openings that no training pair has, the same for every policy."""

HELD_OUT, SPOKEN = "held_out.json", "spoken.json"
Result = dict[str, Any]
"""What a training is, and what was measured of it."""
SPEECH = Sampling(max_new_tokens=96, temperature=1.0)


@dataclass(frozen=True)
class Work:
    """A training that is wanted."""

    recipe: Recipe
    folder: Path
    facts: dict[str, Any]
    """What it is, for the summary."""
    drifts: bool = False
    """Whether its features are held against the gaps of the training pairs."""

    @property
    def results(self) -> list[str]:
        """The files that it leaves."""
        return [HELD_OUT, SPOKEN, *([FEATURES_FILE] if self.drifts else [])]

    @property
    def is_done(self) -> bool:
        """Whether they are there."""
        return all((self.folder / name).is_file() for name in self.results)

    def read(self) -> Result:
        """What they say, with what the run is."""
        found: Result = dict(self.facts)
        for name in self.results:
            found |= json.loads((self.folder / name).read_text(encoding="utf-8"))
        return found


def carry_out(work: Work, place: Place) -> None:
    """Train, evaluate, let it speak, as far as that is not done."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if not (work.folder / HELD_OUT).is_file():
        done = align(work.recipe, find_cache(work.recipe, place.store), work.folder, resume=True)
        _write(work.folder / HELD_OUT, {"seconds": done.seconds, **held_out(work, place)})
    if not (work.folder / SPOKEN).is_file():
        _write(work.folder / SPOKEN, spoken(work.folder, place.world))
    if work.drifts and not (work.folder / FEATURES_FILE).is_file():
        train, held = (find_cache(work.recipe, place.store, held_out=held_out) for held_out in (False, True))
        drift_report(work.recipe, train, held, work.folder, None, DriftQuestion(top=10, samples=200, sampling=SPEECH))


def held_out(work: Work, place: Place) -> dict[str, Any]:
    """What the policy says of the held-out pairs."""
    cache = find_cache(work.recipe, place.store, held_out=True)
    notes = PairNotes(cache, work.recipe.objective.units)
    metrics = evaluate_run(work.recipe, cache, work.folder, note=notes.note)
    pairs = notes.pairs()
    chosen, rejected = pairs.logratios.T
    return {
        "margin_effect": effect(chosen - rejected),
        "margins": (chosen - rejected).tolist(),
        "reward_accuracy": metrics["eval_rewards/accuracies"],
        "entropy_of_data": metrics["eval_entropy"],
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "both_fall": float(pairs.both_fall.mean()),
    }


def effect(values: NDArray[np.floating]) -> float:
    """A mean in units of the standard deviation; 0 where all values are one."""
    spread = float(values.std(ddof=1))
    return float(values.mean()) / spread if spread else 0.0


def _write(path: Path, result: dict[str, Any]) -> None:
    write_whole(path, json.dumps(result) + "\n")


def spoken(folder: Path, world: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """What a policy's own stories are worth, and how far they are from the reference's."""
    card = read_card(world)
    assert card is not None
    policy, reference = (LlamaForCausalLM.from_pretrained(place) for place in (folder, world / "model"))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rng = np.random.default_rng([card["settings"]["seed"], 11])
    lines = (world / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    openings = sample_openings(rng, samples, {json.loads(line)["prompt"] for line in lines})
    uniforms = rng.random((samples, card["settings"]["preferences"]["max_new_tokens"]), dtype=np.float32)
    prompts = [tokenizer(opening)["input_ids"] for opening in openings]
    written = sample_completions(policy, prompts, uniforms, folder.name)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    rewards = np.array([gold_reward(text) for text in texts])
    logratios = completion_logps(policy, prompts, written) - completion_logps(reference, prompts, written)
    entropies = [
        float(token_statistics(policy, prompt, ids).entropy.mean())
        for prompt, ids in zip(prompts[:100], written[:100], strict=True)
    ]
    return {
        "gold": rewards.tolist(),
        "kl": logratios.tolist(),
        "distinct_3": distinct(texts, 3),
        "entropy": float(np.mean(entropies)),
        "tokens": float(np.mean([len(ids) for ids in written])),
    }


def distinct(texts: list[str], n: int) -> float:
    """Different runs of n words over all of them, as a share (Li et al. 2016, https://aclanthology.org/N16-1014)."""
    runs: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        runs.update(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return len(runs) / max(sum(runs.values()), 1)
