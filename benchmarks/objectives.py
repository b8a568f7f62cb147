"""
Every objective from one cache: loss at the beginning and the end, speed and peak memory, each trained by `fpo align` in
a process of its own.

    python benchmarks/objectives.py RECIPE --store STORE [--steps 60]

The recipe's cache must hold what all of them ask for (`cache: {top_logits: 64, mismatched: true}`, a feature, scores).
Settings are the defaults, but for the feature term's k, which a cache may be too small for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fpo.objectives import OBJECTIVES

MIXED: dict[str, Any] = {
    "terms": [{"name": "dpo"}, {"name": "bco_pair"}, {"name": "sft"}],
    "weights": [0.8, 0.2, 1.0],
}
SETTINGS: dict[str, dict[str, Any]] = {"fpo": {"k": 16}, "mixture": MIXED}


def trained(recipe: Path, store: str, objective: dict[str, Any], steps: int, run: Path) -> dict[str, Any]:
    """What `fpo align --json` says of a run."""
    command = [sys.executable, "-m", "fpo", "align", str(recipe), "--store", store, "--output", str(run), "--json"]
    overrides = [f"objective={json.dumps(objective)}", f"training.max_steps={steps}", "training.logging_steps=10"]
    given = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run([*command, *given], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{objective}: {done.stderr.strip().splitlines()[-1]}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    terms = {"features": {"k": 16}}
    objectives = [{"name": name, **SETTINGS.get(name, {})} for name in OBJECTIVES]
    objectives += [{"name": name, **terms} for name in ("dpo", "simpo", "kto", "plackett_luce")]
    caches = set()
    with tempfile.TemporaryDirectory() as folder:
        print("| objective | loss, first 10 steps | loss, last 10 | pairs/s | peak MiB |\n|---|---|---|---|---|")
        for number, objective in enumerate(objectives):
            run = Path(folder) / str(number)
            facts = trained(arguments.recipe, arguments.store, objective, arguments.steps, run)
            rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            caches.add(json.loads((run / "run.json").read_text(encoding="utf-8"))["cache"])
            name = objective["name"] + (" with features" if "features" in objective else "")
            peak = facts["cost"]["peak_bytes"] / 2**20
            ends = f"{rows[0]['loss']:.4f} | {rows[-1]['loss']:.4f}"
            print(f"| `{name}` | {ends} | {facts['pairs_per_second']:.0f} | {peak:.0f} |", flush=True)
    (cache,) = caches
    print(f"\ncache {cache}")


if __name__ == "__main__":
    main()
