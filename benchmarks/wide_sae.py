"""
What an SAE costs by its kind and width: a completion's features from its tokens to the kept top 64, and the policy's at
64 columns with their gradient, against the bare product of the encoder at the rate that this machine reaches.

    python benchmarks/wide_sae.py [--tokens 1024] [--sizes 2304x16384,2304x131072,1024x1048576] [--kinds jumprelu,topk]

Each in a process of its own, on one thread. "dense" is pooling and keeping, in units of the product of tokens and
encoder; "columns" is forward and backward of 64 features of each of 8 completions, in the same units. At the process's
peak the encoder stands there twice, as it is turned round when it is loaded.
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

from fpo.scoring import Sae, keep_top_features
from fpo.scoring.sae import SaeArrays, SaeFacts
from fpo.stage2_align.cost import peak_resident

COMPLETIONS, KEPT = 8, 64
KINDS = ("relu", "jumprelu", "gated", "topk", "groupmax")


def encoder(kind: str, d_in: int, d_sae: int) -> Sae:
    """Random, with about 64 active features a token."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((d_in, d_sae), dtype=np.float32)
    W /= np.sqrt(d_in)
    per_feature = np.zeros(d_sae, np.float32)
    height = np.full(d_sae, 3.2, np.float32)
    facts = SaeFacts(d_in, d_sae, kind, "benchmark", None, None)
    extra = {
        "jumprelu": {"threshold": height},
        "gated": {"gain": per_feature + 1, "magnitude_bias": per_feature},
        "topk": {"k": KEPT},
        "groupmax": {"k": KEPT},
    }.get(kind, {})
    bias = -height if kind in ("relu", "gated") else per_feature
    return Sae(SaeArrays(facts, W, bias, kind, "none", **extra))


def measure(kind: str, d_in: int, d_sae: int, n_tokens: int) -> dict[str, float]:
    torch.set_num_threads(1)
    sae = encoder(kind, d_in, d_sae)
    held = sae.weight_FD.numel() * 4
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, d_in, generator=generator)
    lengths = [n_tokens // COMPLETIONS] * COMPLETIONS
    some = sae.weight_FD[: min(d_sae, 16384)]
    product = min(seconds(lambda: x @ some.T) for _ in range(3)) * d_sae / len(some)
    dense = min(seconds(lambda: keep_top_features(sae, x, lengths, KEPT)) for _ in range(2))
    columns = torch.randint(0, d_sae, (COMPLETIONS, KEPT), generator=generator)
    leaf = x.clone().requires_grad_(True)
    gathered = min(seconds(lambda: sae.pooled_columns(leaf, lengths, columns).sum().backward()) for _ in range(2))
    return {
        "product": product,
        "dense": dense / product,
        "columns": gathered / product,
        "held": held,
        "peak": peak_resident() or 0,
    }


def seconds(work: object) -> float:
    started = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sizes", default="2304x16384,2304x131072,1024x1048576", help="d_in x d_sae")
    parser.add_argument("--kinds", default="jumprelu,topk", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        kind, d_in, d_sae = options.alone
        print(json.dumps(measure(kind, int(d_in), int(d_sae), options.tokens)))
        return
    print(f"{options.tokens:,} tokens of {COMPLETIONS} completions, one thread; torch {version('torch')}\n")
    print("| kind | d_in | d_sae | product, s | dense | columns | encoder MiB | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.sizes.split(","):
        for kind in options.kinds.split(","):
            d_in, d_sae = size.split("x")
            again = [sys.executable, __file__, "--tokens", str(options.tokens), "--alone", kind, d_in, d_sae]
            found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {kind} | {int(d_in):,} | {int(d_sae):,} | {found['product']:.2f} | {found['dense']:.2f} | "
                f"{found['columns']:.3f} | {found['held'] / 2**20:,.0f} | {found['peak'] / 2**20:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
