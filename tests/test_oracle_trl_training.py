"""
TRL's own trainers with their models in memory, and the pipeline - stage 1 caches the reference, stage 2 trains from the
cache - give the same losses and gradient norms, step by step, from the same weights, on the same pairs in the same
order. Needs the `oracles` extra; with -s it ends with the table of docs/objectives.md.

SGD in float32 without clipping, so that a step is as large as its gradient and a wrong scale shows.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
from collections.abc import Iterator
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from tiny_world import WORDS, build_tiny_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo.objectives import DEFAULT_OBJECTIVE
from fpo.objectives.kto import Kto
from fpo.recipe import Recipe, validate_recipe
from fpo.scoring import Packed
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.stream import PairStream
from fpo.store import Groups, Mismatched

pytestmark = [
    pytest.mark.oracle,
    # TRL and torch announce their own deprecations; they are not what is compared here.
    pytest.mark.filterwarnings("default"),
]

STEPS = 10
BATCH = 4
SEED = 42
CLOSE = 1e-4
"""Relative difference of two losses, or of two gradient norms, that are the same."""
MOVED = 0.01
"""How far, relatively, training must move a loss of the ten, or the comparison would not see a wrong step."""

# Where TRL keeps a trainer and its config, and which of them take a reference.
TRAINERS = {"dpo": "trl", "kto": "trl", "cpo": "trl.experimental.cpo", "orpo": "trl.experimental.orpo"}
WITH_REFERENCE = ("dpo", "kto")

SHARED: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 1,
    "seed": SEED,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
"""Training arguments of both sides, which have one name for each."""

TEMPLATE = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"


class Case(NamedTuple):
    """A loss as both sides name it, and what is trained with it."""

    objective: dict[str, Any]
    trainer: str
    theirs: dict[str, Any]
    """Settings of TRL's config, its defaults otherwise."""
    start: str
    """The model that is trained: the reference, or one near it."""
    data: str
    rate: float


def case(
    name: str,
    theirs: dict[str, Any],
    *,
    trainer: str = "dpo",
    start: str = "policy",
    data: str = "texts",
    rate: float = 0.1,
    **settings: Any,
) -> Any:
    """A comparison; `settings` are the objective's."""
    given = [f"{key}={value}" for key, value in settings.items()]
    unusual = [word for word in (start, data) if word not in ("policy", "texts")]
    label = " ".join([f"{name}({', '.join(given)})", trainer, *unusual])
    return pytest.param(Case({"name": name, **settings}, trainer, theirs, start, data, rate), id=label)


def divergence(name: str, loss_type: str, kind: str, *, rate: float = 0.1, **settings: Any) -> Any:
    shared = {**settings, "f_divergence_type": kind}
    return case(name, {"loss_type": loss_type, **shared}, rate=rate, **shared)


TWICE = {"desirable_weight": 2.0, "undesirable_weight": 2.0}
"""Completions that stand alone are twice as many as pairs, and TRL's mean is over them."""

UNEQUAL = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
MPO: dict[str, Any] = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
"""https://arxiv.org/abs/2411.10442"""

# A rate is such that the losses move and none runs away: the gradients' norms are from 0.1 to 400.
CASES = [
    case("dpo", {}),
    case("dpo", {}, start="reference"),
    case("dpo", {}, data="conversations"),
    case("dpo", {"beta": 0.7}, beta=0.7, rate=0.005),
    divergence("dpo", "sigmoid", "forward_kl", rate=1e-3),
    divergence("dpo", "sigmoid", "js_divergence"),
    divergence("dpo", "sigmoid", "alpha_divergence", rate=0.01),
    case("fpo", {"loss_type": "sigmoid_norm"}, alpha=0.0, rate=0.4),
    case("hinge", {"loss_type": "hinge"}),
    divergence("hinge", "hinge", "alpha_divergence", rate=0.01),
    case("ipo", {"loss_type": "ipo"}, rate=1e-3),
    divergence("ipo", "ipo", "js_divergence", rate=3e-3),
    # TRL asks for label_smoothing; ours is the paper's.
    case("exo_pair", {"loss_type": "exo_pair", "label_smoothing": 1e-3}, rate=0.03),
    divergence("exo_pair", "exo_pair", "js_divergence", label_smoothing=0.1),
    case("nca_pair", {"loss_type": "nca_pair"}),
    case("robust", {"loss_type": "robust", "label_smoothing": 0.1}),
    divergence("robust", "robust", "forward_kl", label_smoothing=0.1, rate=1e-3),
    case("bco_pair", {"loss_type": "bco_pair"}),
    case("sppo_hard", {"loss_type": "sppo_hard"}, rate=1e-4),
    # Both sort over the pairs of a forward, and the forwards hold the same pairs.
    case("aot", {"loss_type": "aot", "label_smoothing": 0.3}, label_smoothing=0.3),
    case("aot_unpaired", {"loss_type": "aot_unpaired"}),
    case("apo_zero", {"loss_type": "apo_zero"}),
    case("apo_zero", {"loss_type": "apo_zero_unpaired", **TWICE}, trainer="kto"),
    case("apo_down", {"loss_type": "apo_down"}),
    case("discopop", {"loss_type": "discopop"}, rate=0.03),
    divergence("discopop", "discopop", "alpha_divergence", rate=0.01),
    case("sft", {"loss_type": "sft"}, rate=0.03),
    # TRL bounds no weight.
    case("wpo", {"use_weighting": True}, max_weight=None, rate=1.0),
    case("ld_dpo", {"ld_alpha": 0.3}, ld_alpha=0.3),
    case("mixture", MPO, terms=[{"name": name} for name in ("dpo", "bco_pair", "sft")], weights=MPO["loss_weights"]),
    case("kto", {"loss_type": "kto"}, trainer="kto", rate=0.3),
    case("kto", {"loss_type": "kto", "beta": 0.5, **UNEQUAL}, trainer="kto", beta=0.5, **UNEQUAL),
    case("cpo", {}, trainer="cpo", rate=0.02),
    case("cpo", {"label_smoothing": 0.2, "cpo_alpha": 0.3}, trainer="cpo", label_smoothing=0.2, sft_weight=0.3),
    # TRL's defaults of SimPO are those of CPO; ours are the paper's.
    case("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}, trainer="cpo", rate=0.01),
    case("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, trainer="cpo", sft_weight=1.0, rate=0.01),
    # TRL's likelihood takes the prompt's tokens in, but the first, which nothing precedes: here prompts have no other.
    case("orpo", {}, trainer="orpo", data="promptless", rate=0.03),
    case("orpo", {"beta": 0.7}, trainer="orpo", data="promptless", beta=0.7, rate=0.03),
]


class Curve(NamedTuple):
    """What a run logged, step by step."""

    rows: list[dict[str, float]]

    @staticmethod
    def of(logged: list[dict[str, Any]]) -> Curve:
        """Without the summary of the whole run that Trainer logs last."""
        return Curve([row for row in logged if "loss" in row])

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def grad_norms(self) -> list[float]:
        return [row["grad_norm"] for row in self.rows]


class Experiment:
    """A reference, a policy near it, data of three kinds, and one cache for each kind, whatever the loss."""

    def __init__(self, root: Path) -> None:
        self.world = build_tiny_world(root, 2, 2)
        save_models(root)
        self.keys: dict[str, str] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        """The data in the order of our steps."""
        self.mismatched: dict[str, list[list[int]]] = {}
        """The tokens of the completion that stands behind each of their prompts without answering it."""
        for data, rows in {"texts": texts(), "conversations": conversations(), "promptless": promptless()}.items():
            (root / data).mkdir()
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (root / data / "train.jsonl").write_text(lines, encoding="utf-8")
            (built,) = build_caches(self.recipe(CASES[0].values[0]._replace(data=data)), self.world.store)
            reader = Kto(name="kto") if built.columns else DEFAULT_OBJECTIVE
            stream = PairStream(built.cache, seed=SEED, per_device=BATCH, objective=reader)
            steps = [groups for groups, _ in stream._micro_batches(0)]
            self.keys[data] = built.cache.key
            self.rows[data] = [rows[int(group)] for groups in steps for group in groups.group_id]
            if built.columns:
                self.mismatched[data] = [tokens for groups in steps for tokens in mismatched_tokens(groups)]

    def recipe(self, case: Case) -> Recipe:
        raw = self.world.raw_recipe(
            reference={"model": str(self.world.root / "reference")},
            features=[],
            data={"source": str(self.world.root / case.data), "eval_split": None, "chat_template": TEMPLATE},
            cache={"mismatched": case.data != "promptless"},  # where no prompt is another
            policy={} if case.start == "reference" else {"model": str(self.world.root / case.start)},
        )
        training = {**SHARED, "learning_rate": case.rate}
        return validate_recipe({**raw, "objective": case.objective, "training": training}, "tiny")

    def ours(self, case: Case, run: Path) -> Curve:
        """Of a run from the cache."""
        recipe = self.recipe(case)
        cache = find_cache(recipe, self.world.store)
        assert cache.key == self.keys[case.data]
        align(recipe, cache, run)
        return Curve.of(read_metrics(run / METRICS_FILE))

    def untrained(self, case: Case, run: Path) -> list[float]:
        """The losses of the same steps where none of them moves a weight."""
        recipe = self.recipe(case)
        meter = ObjectiveMeter.of(recipe)
        model, losses = load_policy(recipe, meter, run), []
        for batch in PairStream(
            find_cache(recipe, self.world.store), seed=SEED, per_device=BATCH, objective=recipe.objective
        ):
            assert batch is not None
            with torch.no_grad():
                scores = model(**Packed.of(batch)._asdict())
            losses.append(meter.measure(scores, batch).value.losses.mean().item())
        return losses

    def theirs(self, case: Case, folder: Path) -> Curve:
        """Of TRL's trainer."""
        trainer = self.trl_trainer(case, folder)
        trainer.train()
        return Curve.of(trainer.state.log_history)

    def trl_trainer(self, case: Case, folder: Path) -> Any:
        """TRL's trainer over the rows of our steps, one after the other."""
        pytest.importorskip("trl")
        module, name = importlib.import_module(TRAINERS[case.trainer]), case.trainer.upper()
        rows = self.rows[case.data]
        arguments: dict[str, Any] = {**SHARED, "learning_rate": case.rate, "train_sampling_strategy": "sequential"}
        if case.trainer == "kto":
            rows = unpaired(rows)
            arguments["per_device_train_batch_size"] = 2 * BATCH
        args = getattr(module, f"{name}Config")(
            output_dir=str(folder),
            gradient_checkpointing=False,
            bf16=False,
            disable_tqdm=True,
            **arguments,
            **case.theirs,
        )
        tokenizer = AutoTokenizer.from_pretrained(self.world.root / "reference")
        tokenizer.chat_template = TEMPLATE
        trainer = getattr(module, f"{name}Trainer")(
            model=self.load(case.start),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **({"ref_model": self.load("reference")} if case.trainer in WITH_REFERENCE else {}),
        )
        if case.theirs.get("loss_type") == "kto":
            # Which completions stand behind which prompts is TRL's to choose batch by batch, and the cache's once.
            twice = [tokens for tokens in self.mismatched[case.data] for _ in ("chosen", "rejected")]
            kept = trainer.train_dataset.remove_columns("KL_completion_ids")
            trainer.train_dataset = kept.add_column("KL_completion_ids", twice)
        return trainer

    def load(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.world.root / name)


def save_models(root: Path) -> None:
    """A reference, and a policy so near it that logratios are about 1: farther out some losses' gradients vanish."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for name, distance in (("reference", 0.0), ("policy", 0.03)):
        model = tiny_model("llama", seed=3, num_hidden_layers=2)
        for weight in model.parameters():
            weight.data += distance * torch.randn_like(weight)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def texts() -> list[dict[str, Any]]:
    """Pairs of unequal lengths; one prompt is longer than all other prompts and completions."""
    draw = np.random.default_rng(7)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(low, high)))

    rows = [
        {"prompt": words(1, 9), "chosen": f" {words(1, 12)}", "rejected": f" {words(1, 12)}"}
        for _ in range(STEPS * BATCH)
    ]
    rows[17]["prompt"] = words(40, 41)
    return rows


def conversations() -> list[dict[str, Any]]:
    """The same, said by somebody."""

    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content.strip()}]

    return [
        {
            "prompt": said("user", row["prompt"]),
            "chosen": said("assistant", row["chosen"]),
            "rejected": said("assistant", row["rejected"]),
        }
        for row in texts()
    ]


def mismatched_tokens(groups: Groups) -> list[list[int]]:
    """Of each group, as its column has them."""
    (column,) = groups.columns
    assert isinstance(column, Mismatched)
    return [row.tolist() for row in np.split(column.input_ids, column.splits[1:-1].astype(int))]


def promptless() -> list[dict[str, Any]]:
    """The same completions of nothing but the token that begins a text."""
    return [{**row, "prompt": "", "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]} for row in texts()]


def unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each completion in a row of its own, the chosen before the rejected of its pair: as our forwards hold them."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest, relative to theirs."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


class Figures:
    """What was measured, and the largest of each loss."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, str], tuple[float, float]] = {}

    def add(self, case: Case, losses: float, grad_norm: float) -> None:
        """The largest difference of a loss, and that of the first gradient norm."""
        loss_type = case.theirs.get("loss_type", "sigmoid" if case.trainer in ("dpo", "cpo") else "")
        loss_type = " + ".join(loss_type) if isinstance(loss_type, list) else loss_type
        extras = [name for name in ("use_weighting", "f_divergence_type", "ld_alpha") if name in case.theirs]
        theirs = " ".join(filter(None, [f"{case.trainer.upper()}Trainer", loss_type, *extras]))
        known = self.largest.get((theirs, case.objective["name"]), (0.0, 0.0))
        self.largest[theirs, case.objective["name"]] = max(known[0], losses), max(known[1], grad_norm)

    def table(self) -> str:
        return "\n".join(
            f"| {theirs} | {ours} | {rounded_up(losses)} | {rounded_up(norm)} |"
            for (theirs, ours), (losses, norm) in self.largest.items()
        )


def rounded_up(figure: float) -> str:
    """Two digits of it."""
    return f"{Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(figure):.1e}" if figure else "0"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    # accelerate collects garbage whenever a training begins, which takes longer than one of these unless it may leave
    # out what the libraries have made.
    gc.freeze()
    yield Experiment(tmp_path_factory.mktemp("training"))
    gc.unfreeze()


@pytest.fixture(scope="module")
def figures() -> Iterator[Figures]:
    measured = Figures()
    yield measured
    print(f"\n{measured.table()}")


def test_every_loss_type_of_trl_that_is_here_is_trained_with() -> None:
    fields = pytest.importorskip("trl").DPOConfig.__dataclass_fields__
    loss_types = set(re.findall(r"'(\w+)'", fields["loss_type"].metadata["help"]))
    assert len(loss_types) == 15
    cases = [case.values[0] for case in CASES]
    alone = [case for case in cases if "loss_weights" not in case.theirs]
    assert loss_types == {case.theirs.get("loss_type", "sigmoid") for case in alone if case.trainer == "dpo"}
    # CPOTrainer's hinge, ipo and alphapo do without a reference, which ours do not.
    others = {(case.trainer, case.theirs.get("loss_type", "")) for case in cases if case.trainer != "dpo"}
    assert others == {("cpo", ""), ("cpo", "simpo"), ("orpo", ""), ("kto", "kto"), ("kto", "apo_zero_unpaired")}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_from_the_cache_are_those_of_trls_trainer(
    experiment: Experiment, figures: Figures, case: Case, tmp_path: Path
) -> None:
    ours, theirs = experiment.ours(case, tmp_path / "ours"), experiment.theirs(case, tmp_path / "theirs")
    assert len(ours.rows) == len(theirs.rows) == STEPS
    losses, norms = difference(ours.losses, theirs.losses), difference(ours.grad_norms, theirs.grad_norms)
    figures.add(case, losses, difference(ours.grad_norms[:1], theirs.grad_norms[:1]))
    assert losses < CLOSE
    assert norms < CLOSE
    untrained = experiment.untrained(case, tmp_path / "untrained")
    assert ours.losses[0] == pytest.approx(untrained[0], rel=CLOSE)
    assert difference(ours.losses, untrained) > MOVED


@pytest.mark.parametrize("start", ["policy", "reference"])
@pytest.mark.parametrize("wrong", [{"theirs": {"beta": 0.101}}, {"rate": 0.101}], ids=["beta", "rate"])
def test_a_beta_or_a_learning_rate_that_is_a_hundredth_off_is_noticed(
    experiment: Experiment, wrong: dict[str, Any], start: str, tmp_path: Path
) -> None:
    right: Case = CASES[0].values[0]._replace(start=start)
    ours = experiment.ours(right, tmp_path / "ours")
    theirs = experiment.theirs(right._replace(**wrong), tmp_path / "theirs")
    assert difference(ours.losses, theirs.losses) > CLOSE


def test_what_trls_dpo_logs_has_the_same_values_under_the_same_names(experiment: Experiment, tmp_path: Path) -> None:
    dpo: Case = CASES[0].values[0]
    ours, theirs = experiment.ours(dpo, tmp_path / "ours"), experiment.theirs(dpo, tmp_path / "theirs")
    names = set(ours.rows[0]) & set(theirs.rows[0])
    sides = {f"{group}/{side}" for group in ("rewards", "logps") for side in ("chosen", "rejected")}
    of_tokens = {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens"}
    of_steps = {"loss", "grad_norm", "learning_rate", "epoch"}
    assert names >= sides | of_tokens | of_steps | {"rewards/margins", "rewards/accuracies"}
    assert set(theirs.rows[0]) <= set(ours.rows[0])  # docs/runs.md says so
    assert {row["mean_token_accuracy"] for row in theirs.rows} > {0.0}
    for our_row, their_row in zip(ours.rows, theirs.rows, strict=True):
        assert {name: our_row[name] for name in names} == pytest.approx(
            {name: their_row[name] for name in names}, rel=CLOSE, abs=1e-6
        )
