"""
Build the demo world: `python -m fpo.demo.build [--output demo-world]`.

    demo-world/world.json    the card: settings, figures, digest of settings and code, sha256 of every file
    demo-world/model/        the reference language model with its tokenizer
    demo-world/sae/          the sparse autoencoder, SAELens' format
    demo-world/pairs/{train,test}.jsonl

The same settings give the same bytes on the same machine. A world whose card fits is left as it is. A build
works in a folder beside the output and renames it at the end, so what stands at the output is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fpo.demo.autoencoder import AutoencoderSettings, SaeQuality, save_saelens, train_autoencoder
from fpo.demo.grammar import STORIES
from fpo.demo.language_model import LanguageModelSettings, heldout_loss, train_language_model
from fpo.demo.preferences import Pair, PreferenceSettings, sample_preferences, write_pairs
from fpo.demo.tokens import train_tokenizer
from fpo.errors import FpoError, RunError

CARD = "world.json"


@dataclass(frozen=True)
class WorldSettings:
    """Everything a world depends on besides the code."""

    seed: int = 0
    threads: int = 1
    """Threads of torch while building. Two wait for each other wherever the cores are shared."""

    vocab_size: int = 768
    tokenizer_stories: int = 3000
    language_model: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    preferences: PreferenceSettings = field(default_factory=PreferenceSettings)


def build_world(output: Path, settings: WorldSettings | None = None) -> tuple[dict[str, Any], bool]:
    """
    The card of the world at `output`, and whether it had to be built.

    RunError where `output` holds something that is not a demo world: it is never replaced.
    """
    settings = settings or WorldSettings()
    card = read_card(output)
    if card is not None and card["digest"] == world_digest(settings) and card["files"] == _file_digests(output):
        return card, False
    if card is None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: holds something that is not a demo world (no {CARD}); choose another --output")
    output = output.resolve()
    building = output.with_name(output.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # what a killed build left
    building.mkdir(parents=True)
    with _threads(settings.threads):
        figures = _build_parts(building, settings)
    card = {
        "digest": world_digest(settings),
        "settings": asdict(settings),
        "figures": figures,
        "files": _file_digests(building),
    }
    (building / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    building.rename(output)
    return card, True


def read_card(world: Path) -> dict[str, Any] | None:
    """The world's card; None where there is none, or not a whole one."""
    try:
        card = json.loads((world / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(card, dict) and {"digest", "settings", "figures", "files"} <= card.keys()
    return card if whole else None


def world_digest(settings: WorldSettings) -> str:
    """sha256 over the settings and the source that builds a world: all of this package but the evaluation."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name != "evaluate.py":
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _build_parts(folder: Path, settings: WorldSettings) -> dict[str, Any]:
    rng = np.random.default_rng([settings.seed, 0])
    stories = [STORIES.sample(rng) for _ in range(settings.tokenizer_stories)]
    tokenizer = train_tokenizer(
        [story.text for story in stories], settings.vocab_size, settings.language_model.max_length
    )
    model = train_language_model(tokenizer, settings.language_model, settings.seed)
    # The tokenizer's stories: the language model drew its own.
    loss = heldout_loss(model, tokenizer, stories[: settings.language_model.heldout_stories])
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    # The autoencoder and the pairs both need the finished model and nothing of each other.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other_process:
        autoencoder = other_process.submit(_build_autoencoder, folder, settings)
        train, test = sample_preferences(model, tokenizer, settings.preferences, settings.seed)
        quality = autoencoder.result()
    (folder / "pairs").mkdir()
    write_pairs(train, folder / "pairs" / "train.jsonl")
    write_pairs(test, folder / "pairs" / "test.jsonl")
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "grammar_entropy_per_story": round(STORIES.entropy(), 6),
        "heldout_nats_per_token": round(loss.model, 6),
        "grammar_nats_per_token": round(loss.grammar, 6),
        "heldout_tokens": loss.tokens,
        "sae": {"hookpoint": _hookpoint(settings), "d_sae": settings.autoencoder.d_sae, **asdict(quality)},
        "pairs": {"train": _pair_figures(train), "test": _pair_figures(test)},
    }


def _build_autoencoder(folder: Path, settings: WorldSettings) -> SaeQuality:
    """Train on the model in `folder` and save beside it; in silence, because the pairs have the progress bar."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), _threads(settings.threads):
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
        sae, quality = train_autoencoder(model, tokenizer, settings.autoencoder, settings.seed)
        save_saelens(sae, folder / "sae", quality, _hookpoint(settings), "demo-world")
    return quality


def _hookpoint(settings: WorldSettings) -> str:
    return f"model.layers.{settings.autoencoder.layer}"


def _pair_figures(pairs: list[Pair]) -> dict[str, float]:
    return {
        "count": len(pairs),
        "mean_reward": round(float(np.mean([p.chosen_reward + p.rejected_reward for p in pairs])) / 2, 4),
        "labels_turned_over": sum(p.chosen_reward < p.rejected_reward for p in pairs),
    }


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CARD)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(output: Path, card: dict[str, Any], outcome: str) -> str:
    figures, sae, pairs = card["figures"], card["figures"]["sae"], card["figures"]["pairs"]
    excess = figures["heldout_nats_per_token"] - figures["grammar_nats_per_token"]
    rows = [
        ("demo world", f"{output} ({outcome})"),
        (
            "language model",
            f"{figures['parameters'] / 1e6:.2f}M parameters, vocabulary {figures['vocabulary']}",
        ),
        (
            "held-out loss",
            f"{figures['heldout_nats_per_token']:.4f} nats/token; the grammar itself"
            f" {figures['grammar_nats_per_token']:.4f} (excess {excess:.4f})",
        ),
        (
            "autoencoder",
            f"{sae['hookpoint']}, {sae['d_sae']} features: L0 {sae['l0']:.1f}, FVU {sae['fvu']:.3f},"
            f" {sae['dead']} silent on held-out text",
        ),
        *(
            (
                f"{split} pairs",
                f"{pairs[split]['count']}, mean gold reward {pairs[split]['mean_reward']:+.3f},"
                f" {pairs[split]['labels_turned_over']} labels turned over",
            )
            for split in ("train", "test")
        ),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fpo.demo.build", description="Build the demo world.")
    parser.add_argument("--output", type=Path, default=Path("demo-world"), help="folder (default: demo-world)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # one bar per file that transformers writes
    start = time.perf_counter()
    try:
        card, built = build_world(options.output)
    except FpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = f"built in {time.perf_counter() - start:.0f} s" if built else "up to date"
    print(_summary(options.output, card, outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
