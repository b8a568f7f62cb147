"""
Stage 1 against what it must compute anyway. One torch thread; random models and SAEs; nothing is downloaded.

    python benchmarks/stage1.py forward --pairs pairs.jsonl --tokenizer gpt2-folder [--d-sae 16384] [--rounds 3]
    python benchmarks/stage1.py encoder [--d-in 256] [--d-sae 131072] [--tokens 1024] [--kind topk]
    python benchmarks/stage1.py memory --tokenizer gpt2-folder [--sizes 1000 4000 20000]
    python benchmarks/stage1.py tokens --tokenizer gpt2-folder [--sizes 4000]

forward  scoring, encoding, top-k, compressing, writing and sealing a cache, against the forwards of the same batches of
         a 33M-parameter Llama alone, and where trl is installed against the pass in which TRL computes them; what a
         matmul of the encoder's size takes; where the main thread's time goes
encoder  a wide SAE in tiles against a matmul of its size, and the memory that it takes
memory   peak memory of a whole build by the number of pairs, a process each; what is mapped from files is told apart
tokens   pairs per second tokenised, and mapped by whoever comes second
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fpo.stage1_cache.build as build
import fpo.stage1_cache.score as score
from fpo.recipe import Recipe, validate_recipe
from fpo.scoring import keep_top_features
from fpo.scoring.sae import Sae, SaeArrays, SaeFacts
from fpo.stage1_cache.fill import token_groups
from fpo.stage1_cache.identity import CacheIdentity, cache_identities
from fpo.stage2_align.cost import peak_resident
from fpo.store import Store

LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    {"forward": forward, "encoder": encoder, "memory": memory, "build": built, "tokens": tokens}[options.what](options)


def forward(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), options.pairs, options.tokenizer, LARGE, options.d_sae, options.split)
        identity = cache_identities(recipe, Store(Path(folder) / "store"))[0]
        lazy = build._LazyScorer(recipe, options.batch_tokens, identity)
        scorer = lazy.scorer(identity)
        n_tokens, n_scored = len(identity.tokens.input_ids), int(identity.scored_tokens.sum())
        print(f"{len(identity.tokens)} pairs, {n_tokens} tokens, {n_scored} of them scored; d_sae {options.d_sae}")
        wants = [None, *identity.specs]
        _bare(identity, scorer)  # first touches
        ratios: dict[str, list[float]] = {"wall": [], "main": []}
        spent: Counter[str] = Counter()
        for number in range(options.rounds):
            bare, matmul = _timed(lambda: _bare(identity, scorer)), _matmul(n_scored, 512, options.d_sae)
            place = Store(Path(folder) / f"store-{number}")
            with _accounts(scorer, spent):
                whole = _timed(lambda place=place: build._filled(identity, place, wants, lazy))
            print(
                f"round {number}: forwards {bare['wall']:.2f} s, stage 1 {whole['wall']:.2f} s (main thread "
                f"{whole['main']:.2f} s of CPU, others {whole['all'] - whole['main']:.2f} s), "
                f"encoder's matmul {matmul:.2f} s",
                flush=True,
            )
            for clock, found in ratios.items():
                found.append((whole[clock] - matmul) / bare[clock])
                found.append(whole[clock] / bare[clock])
            if find_spec("trl") is not None:
                theirs = _trl_pass(Path(folder) / "model", options)
                print(f"         TRL's pass {theirs:.2f} s, {theirs / whole['wall']:.2f} times as long", flush=True)
    for clock, found in ratios.items():
        without, ratio = statistics.median(found[::2]), statistics.median(found[1::2])
        print(f"{clock} time: stage 1 / forwards {ratio:.3f}, without the encoder's matmul {without:.3f}")
    total = sum(spent.values())
    print("main thread: " + ", ".join(f"{name} {100 * part / total:.1f} %" for name, part in spent.most_common()))


def encoder(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    kind, k = options.kind, {"k": 32} if options.kind == "topk" else {}
    weights = rng.standard_normal((options.d_in, options.d_sae), dtype=np.float32)
    facts = SaeFacts(options.d_in, options.d_sae, kind, "benchmark", None, None, False)
    zeros = np.zeros(options.d_sae, np.float32)
    arrays = SaeArrays(facts, weights, zeros, kind, "none", **k, **({"threshold": zeros} if kind == "jumprelu" else {}))
    sae = Sae(arrays)
    del weights, arrays
    x = torch.randn(options.tokens, options.d_in)
    lengths = [64] * (options.tokens // 64) + [options.tokens % 64]
    _forget_peak()
    before = _peak()
    times = [_timed(lambda: keep_top_features(sae, x, lengths, 64))["main"] for _ in range(options.rounds)]
    matmuls = [_matmul(options.tokens, options.d_in, options.d_sae) for _ in range(options.rounds)]
    best, matmul = min(times), min(matmuls)
    operations = 2 * options.tokens * options.d_in * options.d_sae
    print(
        f"{kind} {options.d_sae} x {options.d_in}, {options.tokens} tokens: {best:.2f} s, a matmul of this size "
        f"{matmul:.2f} s ({operations / matmul / 1e9:.0f} GFLOP/s), ratio {best / matmul:.2f}; "
        f"{(_peak() - before) / 2**20:.0f} MiB beside the weights (dense: {options.tokens * options.d_sae / 2**18:.0f})"
    )


def memory(options: argparse.Namespace) -> None:
    for size in options.sizes:
        given = {"--tokenizer": options.tokenizer, "--sizes": size, "--batch-tokens": options.batch_tokens}
        command = [sys.executable, __file__, "build", *(str(part) for pair in given.items() for part in pair)]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="", flush=True)


def built(options: argparse.Namespace) -> None:
    (size,) = options.sizes
    with tempfile.TemporaryDirectory() as folder:
        pairs = _synthetic(Path(folder) / "pairs.jsonl", size)
        recipe = _recipe(Path(folder), pairs, options.tokenizer, SMALL, 1024, "train")
        started = time.monotonic()
        (report,) = build.build_caches(recipe, Path(folder) / "store", options.batch_tokens)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        manifest, taken = report.cache.manifest, time.monotonic() - started
        own, files = (int(status[name].split()[0]) / 2**10 for name in ("RssAnon", "RssFile"))
        print(
            f"{size} pairs, {manifest.n_tokens} tokens, {manifest.n_bytes / 2**20:.0f} MiB of shards, {taken:.0f} s: "
            f"peak {_peak() / 2**20:.0f} MiB, in the end {own:.0f} of its own and {files:.0f} mapped from files"
        )


def tokens(options: argparse.Namespace) -> None:
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            pairs = options.pairs or _synthetic(Path(folder) / "pairs.jsonl", size)
            recipe = _recipe(Path(folder), pairs, options.tokenizer, SMALL, 64, "train")
            for who in ("first", "second"):
                identity = cache_identities(recipe, Store(Path(folder) / "store"))[0]
                taken = _timed(lambda identity=identity: identity.tokens)
                n, n_tokens = len(identity.tokens), len(identity.tokens.input_ids)
                print(f"{who}: {n} pairs, {n_tokens} tokens: {taken['wall']:.2f} s, {n / taken['wall']:,.0f} pairs/s")


def _bare(identity: CacheIdentity, scorer: score.ReferenceScorer) -> None:
    """Pack and run what stage 1 packs and runs, and use nothing of it."""
    for rows in identity.plan:
        pieces, _ = score.cut_long(token_groups(identity, rows), scorer.batch_tokens)
        for batch in score.micro_batches(pieces, scorer.batch_tokens):
            with torch.inference_mode():
                scorer.model(**scorer.packed(score.take(pieces, batch))._asdict())


def _trl_pass(model: Path, options: argparse.Namespace) -> float:
    """Seconds in which TRL's DPOTrainer computes log-probs of the same pairs, eight at a time; in memory only."""
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as run:
        settings = {"per_device_train_batch_size": 8, "max_length": 512, "report_to": "none", "disable_tqdm": True}
        trainer = DPOTrainer(
            model=LlamaForCausalLM.from_pretrained(model),
            args=DPOConfig(
                output_dir=run,
                precompute_ref_log_probs=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                **settings,
            ),
            train_dataset=load_dataset("json", data_files=str(options.pairs), split=options.split),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        return _timed(trainer.get_train_dataloader)["wall"]


@contextmanager
def _accounts(scorer: score.ReferenceScorer, spent: Counter[str]) -> Iterator[None]:
    """Inside, the main thread's CPU time is added up: forwards, encoder with top-k, and all that is left."""
    inner = {"forward": scorer.model.forward, "encoder": score.keep_top_features}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return inner[name](*args, **options)
            finally:
                spent[name] += time.thread_time() - started  # type: ignore[assignment]

        return call

    started, before = time.thread_time(), sum(spent[name] for name in inner)
    scorer.model.forward, score.keep_top_features = counted("forward"), counted("encoder")
    try:
        yield
    finally:
        scorer.model.forward, score.keep_top_features = inner["forward"], inner["encoder"]
        inside = sum(spent[name] for name in inner) - before
        spent["all else"] += time.thread_time() - started - inside  # type: ignore[assignment]


def _timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds: `wall`, and CPU of the main thread (`main`) and of all threads (`all`)."""
    clocks = {"wall": time.perf_counter, "main": time.thread_time, "all": time.process_time}
    before = {name: clock() for name, clock in clocks.items()}
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: clock() - before[name] for name, clock in clocks.items()}


def _matmul(n: int, d_in: int, d_sae: int) -> float:
    """Seconds of CPU for (n, d_in) @ (d_in, d_sae), from blocks of 1024 tokens and 16,384 features."""
    x, weight = torch.randn(1024, d_in), torch.randn(min(d_sae, 2**14), d_in)
    times = [_timed(lambda: torch.nn.functional.linear(x, weight))["main"] for _ in range(4)]
    return statistics.median(times[1:]) * n / 1024 * d_sae / len(weight)


def _forget_peak() -> None:
    """From here on the peak begins with what is resident; Linux alone can."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5", encoding="ascii")


def _peak() -> int:
    """Most bytes that were resident."""
    return peak_resident() or 0


def _synthetic(path: Path, size: int) -> Path:
    """Pairs of about 100 tokens, all different."""
    rng = np.random.default_rng(0)
    words = np.array([f" {word}" for word in (__doc__ or "").split()])
    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            prompt, chosen, rejected = ("".join(rng.choice(words, int(rng.integers(20, 48)))) for _ in range(3))
            file.write(json.dumps({"prompt": f"{number}{prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def _recipe(folder: Path, pairs: Path, tokenizer: Path, sizes: dict[str, int], d_sae: int, split: str) -> Recipe:
    """A random Llama, a random JumpReLU SAE at its second layer, and these pairs."""
    torch.manual_seed(0)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer)
    vocabulary.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=1024,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (config.hidden_size, d_sae), "W_dec": (d_sae, config.hidden_size)}
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    zeros = {"b_enc": np.zeros(d_sae, np.float32), "b_dec": np.zeros(config.hidden_size, np.float32)}
    (folder / "sae").mkdir()
    np.savez(folder / "sae/params.npz", **tensors, **zeros, threshold=np.full(d_sae, 0.5, np.float32))
    feature = {"sae": str(folder / "sae"), "hookpoint": "model.layers.1", "top_k": 64, "self_check": False}
    raw = {
        "reference": {"model": str(folder / "model")},
        "features": [feature],
        "data": {"source": str(pairs), "split": split, "max_length": 512},
        "objective": {"name": "dpo"},
    }
    return validate_recipe(raw, "benchmark")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("forward", "encoder", "memory", "tokens", "build"))
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--split", default="train[:200]")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2**14)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kind", choices=("relu", "jumprelu", "topk"), default="jumprelu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000])
    return parser.parse_args()


if __name__ == "__main__":
    main()
