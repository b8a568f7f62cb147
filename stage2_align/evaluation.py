"""`fpo evaluate`: held-out metrics of a run's policy, from the cache of the held-out pairs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from errors import RunError
from recipe import Recipe
from scoring import Packed
from stage2_align.align import policy_layout, policy_model
from stage2_align.measure import ObjectiveMeter, batch_metrics
from stage2_align.run import read_run
from stage2_align.stream import PairStream
from store import Cache

EVALUATION_FILE = "evaluation.json"


def evaluate_run(recipe: Recipe, cache: Cache, run: Path) -> dict[str, float]:
    """
    The objective's loss and metrics over every pair of `cache`, by the run's policy; also written to the run folder
    as evaluation.json. Raises RunError where there is no finished run.
    """
    facts = read_run(run)
    if not facts["complete"]:
        raise RunError(f"{run}: this run is not finished; continue it with fpo align --output {run} --resume")
    if facts["reference"] != cache.recipe["scorer"]["reference"]:
        raise RunError(
            f"{run}: this run was trained against another reference than the one that scored the held-out cache "
            f"{cache.key[:12]}\n"
            f"  the run's has the weights {facts['reference']['weights'][:12]}, in {facts['reference']['dtype']}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = ObjectiveMeter.of(recipe).to(device)
    model = policy_model(recipe, meter, run)
    model.to(device)
    size = recipe.training.get("per_device_eval_batch_size", 8)
    stream = PairStream(cache, meter.feature, seed=0, per_device=size, layout=policy_layout(model, cache))
    sums: dict[str, float] = {}
    with (
        torch.inference_mode(),
        tqdm(total=cache.n_pairs, desc="evaluate", unit=" pairs", disable=None) as bar,
    ):
        for batch in stream:
            assert batch is not None
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = model(**{name: on_device[name] for name in Packed._fields})
            metrics = batch_metrics(meter.measure(scores, on_device), on_device)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            bar.update(len(batch["ref_logps"]))
    metrics_mean = {f"eval_{name}": total / cache.n_pairs for name, total in sorted(sums.items())}
    (run / EVALUATION_FILE).write_text(json.dumps(metrics_mean, indent=2) + "\n", encoding="utf-8")
    return metrics_mean
