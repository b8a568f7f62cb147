"""
The study's trainings, several at a time. Everything that is done already is left as it is, so a killed study goes on
with the runs that it was killed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context, parent_process
from threading import Thread

from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from fpo.demo.autoencoder import AutoencoderSettings, save_saelens, train_autoencoder
from fpo.demo.study.plan import (
    ABLATIONS,
    FEWER_SEEDS,
    FPO,
    LAYER,
    LAYERS,
    METHODS,
    ONE_RATE,
    OTHER_RATES,
    RATE,
    SEEDS,
    Choice,
    Method,
    Place,
    cached,
    composed,
    named,
    recipe,
)
from fpo.demo.study.work import Result, Work, carry_out, spoken
from fpo.progress import progress_bar, say
from fpo.stage1_cache import build_caches
from fpo.stage2_align.run import write_whole


def study(place: Place, processes: int) -> None:
    """Caches, tuning, methods, the drift of their features, ablations, in the world that is there."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for layer in set(LAYERS) - {LAYER}:
        _sae(place, layer)
    build_caches(cached(place), place.store)
    _write_reference(place)
    best = tuned(lambda works: _all(place, works, processes), place)
    write_whole(place.chosen, json.dumps(best, indent=2) + "\n")
    for works in (trained(place, best), drifts(place, best), ablations(place, best["fpo"])):
        _all(place, list(works), processes)


def tuned(results: Callable[[Sequence[Work]], list[Result]], place: Place) -> dict[str, Choice]:
    """What each method is trained with, from the results of what is tried: the method's own fields, then the rate."""
    tried = results(list(field_trials(place)))
    return chosen([*tried, *results(list(rate_trials(place, chosen(tried))))])


def field_trials(place: Place) -> Iterator[Work]:
    """Every setting of every method's own fields."""
    for method in METHODS:
        for objective in method.settings():
            yield work(place, method, {"objective": objective, "rate": RATE})


def rate_trials(place: Place, best: dict[str, Choice]) -> Iterator[Work]:
    """The other rates, with the best of a method's own fields."""
    for method in METHODS:
        for rate in OTHER_RATES:
            yield work(place, method, {**best[method.name], "rate": rate})


def chosen(tried: Sequence[Result]) -> dict[str, Choice]:
    """
    Of each method what moved the held-out pairs most surely: the largest mean margin of logratios in units of its
    spread over pairs. It is the same for all objectives, and no scale of a reward enters.
    """
    best: dict[str, Result] = {}
    for result in tried:
        known = best.get(result["method"])
        if known is None or result["margin_effect"] > known["margin_effect"]:
            best[result["method"]] = result
    return {name: {"objective": result["objective"], "rate": result["rate"]} for name, result in best.items()}


def methods(place: Place, best: dict[str, Choice]) -> Iterator[Work]:
    """Each method as tuned, over all seeds; the first was trained in tuning."""
    for seed in SEEDS:
        for method in METHODS:
            yield work(place, method, best[method.name], seed)


def at_one_rate(place: Place, best: dict[str, Choice]) -> Iterator[Work]:
    """The same with one learning rate for all."""
    return methods(place, {name: {**choice, "rate": ONE_RATE} for name, choice in best.items()})


def trained(place: Place, best: dict[str, Choice]) -> list[Work]:
    """Both, seed by seed; a method that was tuned to that rate is trained once."""
    every = {one.folder: one for one in (*methods(place, best), *at_one_rate(place, best))}
    return sorted(every.values(), key=lambda one: one.facts["seed"])


def drifts(place: Place, best: dict[str, Choice]) -> Iterator[Work]:
    """Policies of one learning rate, their features held against the gaps of the training pairs."""
    measured = (one for one in at_one_rate(place, best) if one.facts["seed"] in FEWER_SEEDS)
    return (replace(one, drifts=True) for one in measured)


def ablations(place: Place, fpo: Choice) -> Iterator[Work]:
    """FPO as tuned with one thing changed."""
    for ablation in ABLATIONS:
        for seed in FEWER_SEEDS:
            objective = {**fpo["objective"], "alpha": ablation.alpha, **ablation.changed}
            facts = {"ablation": ablation.name, "objective": objective, "rate": fpo["rate"], "seed": seed}
            if ablation.is_in_grid:
                # Another alpha alone may have been trained in tuning, or be the tuned one.
                yield replace(work(place, FPO, {**fpo, "objective": objective}, seed), facts=facts)
                continue
            planned = recipe(place, objective, fpo["rate"], seed, ablation.layers, ablation.top_k)
            yield Work(planned, place.root / "ablations" / f"{ablation.name}__seed={seed}", facts)


def work(place: Place, method: Method, choice: Choice, seed: int = SEEDS[0]) -> Work:
    """One training of a method."""
    objective, rate = choice["objective"], choice["rate"]
    folder = place.root / "methods" / named(method, objective, rate, seed)
    facts = {"method": method.name, "objective": objective, "rate": rate, "seed": seed}
    return Work(recipe(place, composed(objective), rate, seed), folder, facts)


def _write_reference(place: Place) -> None:
    if not place.reference.is_file():
        write_whole(place.reference, json.dumps(spoken(place.world / "model", place.world)) + "\n")


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


def _all(place: Place, works: Sequence[Work], processes: int) -> list[Result]:
    """All of them, several at a time; what is there already costs nothing."""
    left = [work for work in works if not work.is_done]
    # Inherited by the processes: models this small gain nothing from a second thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool,
        progress_bar(len(works), "runs", "study", initial=len(works) - len(left)) as bar,
    ):
        try:
            for finished in as_completed([pool.submit(_quietly, work, place) for work in left]):
                finished.result()
                bar.update(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [work.read() for work in works]


def _end_with_parent() -> None:
    """In a process of the pool: a study that was killed leaves nobody behind who holds its run folders."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _quietly(work: Work, place: Place) -> None:
    """In a process of the pool: what a run says goes into a file of its own, not across the bars of others."""
    work.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(work.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    carry_out(work, place)
