"""
What is trained: every method tuned with the same budget on held-out pairs, then over seeds; and FPO as tuned with one
thing changed.

Tuning tries four settings of a method's own fields and then two more learning rates, with the first seed. `run.chosen`
goes by held-out pairs alone; nothing asks for the gold reward before all is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fpo.recipe import Recipe, validate_recipe

SEEDS = tuple(range(5))
FEWER_SEEDS = SEEDS[:3]
"""Of ablations and of drifts."""
LAYERS = (1, 3, 5)
"""Of six: those that have an SAE. The demo's own is the middle one's."""
LAYER = 3
RATE = 1e-4
OTHER_RATES = (3e-5, 3e-4)
ONE_RATE = 3e-4
"""At which all methods are trained once more, since a rate decides how far a policy goes from the reference."""

Settings = dict[str, Any]
Choice = dict[str, Any]
"""What a method is trained with: its `objective` and its learning `rate`."""


@dataclass(frozen=True)
class Method:
    """An objective, and the grid that it is tuned over."""

    name: str
    label: str
    fixed: Settings
    grid: dict[str, Sequence[float]]
    """Fields of the objective by the values that are tried; their product is four settings."""

    def settings(self) -> Iterator[Settings]:
        """Every objective of the grid."""
        for values in product(*self.grid.values()):
            yield {**self.fixed, **dict(zip(self.grid, values, strict=True))}


METHODS = (
    # Completions have about 50 tokens here, so where beta scales their mean log-probs it is about 50 times as large.
    Method("dpo", "DPO", {"name": "dpo"}, {"beta": (0.1, 0.3, 1.0, 3.0)}),
    Method("tdpo1", "TDPO1", {"name": "tdpo1"}, {"beta": (0.1, 0.3, 1.0, 3.0)}),
    Method("tdpo2", "TDPO2", {"name": "tdpo2"}, {"beta": (0.3, 1.0), "alpha": (0.5, 2.0)}),
    Method("simpo", "SimPO", {"name": "simpo"}, {"beta": (5.0, 25.0), "gamma": (0.5, 1.5)}),
    Method("simpo_kl", "SimPO + KL", {"name": "simpo_kl", "gamma": 0.5}, {"beta": (5.0, 25.0), "alpha": (0.5, 2.0)}),
    Method(
        "fpo_sums",
        "FPO, not normalised by length",
        {"name": "dpo", "features": {"k": 32}},
        {"beta": (0.3, 1.0), "alpha": (1000.0, 10000.0)},
    ),
    Method("fpo", "FPO", {"name": "fpo", "k": 32}, {"beta": (15.0, 50.0), "alpha": (20.0, 200.0)}),
    Method("fpo_0", "FPO, alpha 0", {"name": "fpo", "k": 32, "alpha": 0.0}, {"beta": (5.0, 15.0, 50.0, 150.0)}),
)


FPO = next(method for method in METHODS if method.name == "fpo")


@dataclass(frozen=True)
class Ablation:
    """FPO as it was tuned but for what is changed."""

    name: str
    label: str
    changed: Settings
    alpha: float = 200.0
    """At the tuned one the term may be too weak for its parts to differ."""
    top_k: int | str = 32
    """Features that the cache is asked for."""
    layers: Sequence[int] = (LAYER,)
    base: str = "alpha-200"
    """The ablation that it is held against."""

    @property
    def is_in_grid(self) -> bool:
        """Whether it is FPO with another alpha and nothing else."""
        return not self.changed and self.layers == (LAYER,)


# What alpha is multiplied by so that alpha D stays what it is at layer 3 with k 32: D of the held-out rejected
# completions there against D with the change, of a policy that was trained with beta 50 and alpha 0.
SCALES = {
    "k-4": 0.62,
    "k-128": 2.06,
    "layer-1": 3.33,
    "layer-5": 0.41,
    "layers-1-3-5": 0.27,
    "l1": 0.038,
    "cosine": 0.74,
}


def _scaled(name: str, label: str, changed: Settings, **elsewhere: Any) -> Ablation:
    return Ablation(name, label, changed, 200.0 * SCALES[name], **elsewhere)


TUNED = "alpha-20"
ABLATIONS = (
    *(Ablation(f"alpha-{alpha:g}", f"alpha {alpha:g}", {}, alpha, base=TUNED) for alpha in (20.0, 200.0, 2000.0)),
    # Whether a larger beta does what the term does.
    *(
        Ablation(f"beta-{beta:g}", f"alpha 0, beta {beta:g}", {"beta": beta}, alpha=0.0, base=TUNED)
        for beta in (100.0, 200.0)
    ),
    _scaled("layer-1", "layer 1", {}, layers=(1,)),
    _scaled("layer-5", "layer 5, the last", {}, layers=(5,)),
    _scaled(
        "layers-1-3-5",
        "layers 1, 3 and 5",
        {"hookpoints": [f"model.layers.{layer}" for layer in LAYERS]},
        layers=LAYERS,
    ),
    Ablation("union-all", "both models' top k", {"feature_set": "union"}, top_k="all"),
    _scaled("k-4", "k 4", {"k": 4}),
    _scaled("k-128", "k 128", {"k": 128}, top_k=128),
    _scaled("cosine", "one minus the cosine", {"distance": "cosine"}),
    Ablation("union-32", "both models' top k, 32 features cached", {"feature_set": "union"}),
    Ablation("policy-all", "the policy's top k", {"feature_set": "policy"}, top_k="all"),
    _scaled("l1", "mean absolute difference", {"distance": "l1"}),
)


@dataclass(frozen=True)
class Place:
    """Where the study's files are."""

    world: Path
    root: Path

    def sae(self, layer: int) -> Path:
        """Of a layer; the world has one of its own."""
        return self.world / "sae" if layer == LAYER else self.root / f"sae-{layer}"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def chosen(self) -> Path:
        """What tuning chose."""
        return self.root / "chosen.json"

    @property
    def reference(self) -> Path:
        """What the reference's own stories are worth."""
        return self.root / "reference.json"


def recipe(
    place: Place,
    objective: Settings,
    rate: float = RATE,
    seed: int = 0,
    layers: Sequence[int] = (LAYER,),
    top_k: int | str = 32,
) -> Recipe:
    """One training, as the demo's own recipe has it but for the objective."""
    return validate_recipe(
        {
            "reference": {"model": str(place.world / "model"), "dtype": "float32"},
            "features": [
                {"sae": str(place.sae(layer)), "hookpoint": f"model.layers.{layer}", "top_k": top_k} for layer in layers
            ],
            "data": {"source": str(place.world / "pairs"), "split": "train", "eval_split": "test", "max_length": 128},
            "cache": {"shard_pairs": 256, "top_logits": 64},
            "objective": objective,
            "training": {
                "learning_rate": rate,
                "per_device_train_batch_size": 16,
                "num_train_epochs": 1,
                "lr_scheduler_type": "linear",
                "warmup_steps": 6,
                "logging_steps": 15,
                "save_strategy": "no",
                "seed": seed,
                "use_cpu": True,
            },
        },
        "study",
    )


def cached(place: Place) -> Recipe:
    """What holds every feature of every layer, so that all other recipes are served by its cache."""
    return recipe(place, METHODS[0].fixed, layers=LAYERS, top_k="all")


def composed(objective: Settings) -> Settings:
    """An objective whose feature term stands beside it takes the term's alpha there."""
    if "features" not in objective or "alpha" not in objective:
        return objective
    rest = {name: value for name, value in objective.items() if name != "alpha"}
    return {**rest, "features": {**objective["features"], "alpha": objective["alpha"]}}


def named(method: Method, objective: Settings, rate: float, seed: int) -> str:
    """A folder's name for one setting of a method, and a seed."""
    fields = {**{field: objective[field] for field in method.grid}, "rate": rate, "seed": seed}
    return "__".join([method.name, *(f"{field}={value:g}" for field, value in fields.items())])
