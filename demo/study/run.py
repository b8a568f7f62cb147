"""
The study's trainings, several at a time. Everything that is done already is left as it is, so a killed study goes on
with the runs that it was killed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from fpo.demo.autoencoder import AutoencoderSettings, save_saelens, train_autoencoder
from fpo.demo.build import build_world
from fpo.demo.study.plan import (
    ABLATION_SEEDS,
    ABLATIONS,
    LAYER,
    LAYERS,
    METHODS,
    SEEDS,
    Method,
    Place,
    Settings,
    composed,
    named,
    recipe,
)
from fpo.demo.study.work import Work, carry_out
from fpo.progress import progress_bar, say
from fpo.stage1_cache import build_caches


def study(place: Place, processes: int) -> None:
    """World, caches, tuning, methods, ablations."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    build_world(place.world)
    for layer in set(LAYERS) - {LAYER}:
        _sae(place, layer)
    # Every feature of every layer, so that each recipe below is served by this one.
    build_caches(recipe(place, {"name": "dpo"}, layers=LAYERS, top_k="all"), place.store)
    tried = _all(place, list(tuning(place)), processes)
    best = chosen(tried)
    (place.root / "chosen.json").write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")
    _all(place, [*methods(place, best), *ablations(place, best["fpo"])], processes)


def tuning(place: Place) -> Iterator[Work]:
    """Every setting of every method's grid, with the first seed."""
    for method in METHODS:
        for objective in method.settings():
            yield _work(place, method, objective, SEEDS[0], speaks=False)


def chosen(tried: Sequence[dict[str, Any]]) -> dict[str, Settings]:
    """Of each method the objective whose held-out margin is largest in units of its spread."""
    best: dict[str, dict[str, Any]] = {}
    for result in tried:
        known = best.get(result["method"])
        if known is None or result["margin_effect"] > known["margin_effect"]:
            best[result["method"]] = result
    return {method.name: best[method.name]["objective"] for method in METHODS}


def methods(place: Place, best: dict[str, Settings]) -> Iterator[Work]:
    """Each method as tuned, over all seeds; the first was trained in tuning."""
    for seed in SEEDS:
        for method in METHODS:
            yield _work(place, method, best[method.name], seed, speaks=True)


def ablations(place: Place, fpo: Settings) -> Iterator[Work]:
    """FPO as tuned with one thing changed; what it is already is among the methods."""
    for seed in ABLATION_SEEDS:
        for ablation in ABLATIONS:
            objective = {**fpo, **ablation.changed}
            if objective == fpo and not ablation.elsewhere:
                continue
            facts = {"ablation": ablation.name, "objective": objective, "seed": seed}
            planned = recipe(place, objective, seed, ablation.layers, ablation.top_k)
            yield Work(planned, place.root / "ablations" / f"{ablation.name}__seed={seed}", facts)


def _work(place: Place, method: Method, objective: Settings, seed: int, *, speaks: bool) -> Work:
    folder = place.root / "methods" / named(method, objective, seed)
    facts = {"method": method.name, "objective": objective, "seed": seed}
    return Work(recipe(place, composed(objective), seed), folder, facts, speaks, drifts=speaks)


def _sae(place: Place, layer: int) -> None:
    """One for another layer, trained as the world's own is."""
    folder = place.sae(layer)
    if folder.is_dir():
        return
    say(f"training an SAE for layer {layer} ...")
    model = LlamaForCausalLM.from_pretrained(place.world / "model")
    tokenizer = AutoTokenizer.from_pretrained(place.world / "model")
    sae, quality = train_autoencoder(model, tokenizer, AutoencoderSettings(layer=layer), seed=layer)
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # what a killed study left
    save_saelens(sae, building, quality, f"model.layers.{layer}", "demo-world")
    building.rename(folder)


def _all(place: Place, works: Sequence[Work], processes: int) -> list[dict[str, Any]]:
    """All of them, several at a time; what is there already costs nothing."""
    left = [work for work in works if not work.is_done]
    # Inherited by the processes: models this small gain nothing from a second thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        progress_bar(len(works), "runs", "study", initial=len(works) - len(left)) as bar,
    ):
        for finished in as_completed([pool.submit(_quietly, work, place) for work in left]):
            finished.result()
            bar.update(1)
    return [work.read() for work in works]


def _quietly(work: Work, place: Place) -> None:
    """In a process of the pool: what a run says goes into a file of its own, not across the bars of others."""
    work.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(work.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    carry_out(work, place)
