"""
Our losses are TRL's: its own DPOTrainer runs a tiny random Llama and a reference over a few pairs, and from the token
log-probs that it saw, our formula gives the same loss and the same gradient in float64. Needs the `oracles` extra.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fpo.objectives import OBJECTIVES, Evidence, Logps, Objective, Orpo, Sft
from fpo.objectives.trl_names import LOSSES

pytestmark = [
    pytest.mark.oracle,
    # TRL and torch announce their own deprecations; they are not what is compared here.
    pytest.mark.filterwarnings("default"),
]

PAIRS = 6
CLOSE = 1e-6
"""Relative difference that is the same loss, in float64."""


class Case(NamedTuple):
    """An objective with its settings, and TRL's."""

    objective: Objective
    theirs: dict[str, Any]


def case(name: str, theirs: dict[str, Any], **settings: Any) -> Any:
    given = ", ".join(f"{key}={value}" for key, value in settings.items())
    return pytest.param(Case(OBJECTIVES[name](name=name, **settings), theirs), id=f"{name}({given})")


def divergences(name: str, loss_type: str, **settings: Any) -> Iterator[Any]:
    for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
        shared = {**settings, "f_divergence_type": kind, "f_alpha_divergence_coef": 0.7}
        yield case(name, {"loss_type": loss_type, **shared}, **shared)


CASES = [
    case("dpo", {}),
    case("dpo", {"beta": 0.7}, beta=0.7),
    *divergences("dpo", "sigmoid"),
    case("fpo", {"loss_type": "sigmoid_norm"}, alpha=0.0),
    case("hinge", {"loss_type": "hinge"}),
    case("hinge", {"loss_type": "hinge", "beta": 0.02}, beta=0.02),
    *divergences("hinge", "hinge"),
    case("ipo", {"loss_type": "ipo"}),
    case("ipo", {"loss_type": "ipo", "beta": 0.9}, beta=0.9),
    *divergences("ipo", "ipo"),
    # TRL asks for label_smoothing; ours is the paper's.
    case("exo_pair", {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    case("exo_pair", {"loss_type": "exo_pair", "label_smoothing": 0.2, "beta": 0.4}, label_smoothing=0.2, beta=0.4),
    *divergences("exo_pair", "exo_pair", label_smoothing=1e-3),
    case("nca_pair", {"loss_type": "nca_pair"}),
    case("robust", {"loss_type": "robust"}, label_smoothing=0.0),
    case("robust", {"loss_type": "robust", "label_smoothing": 0.1}),
    *divergences("robust", "robust", label_smoothing=0.3),
    case("bco_pair", {"loss_type": "bco_pair"}),
    case("sppo_hard", {"loss_type": "sppo_hard"}),
    case("aot", {"loss_type": "aot"}),
    case("aot", {"loss_type": "aot", "label_smoothing": 0.3, "beta": 0.4}, label_smoothing=0.3, beta=0.4),
    case("aot_unpaired", {"loss_type": "aot_unpaired"}),
    case("aot_unpaired", {"loss_type": "aot_unpaired", "label_smoothing": 0.3}, label_smoothing=0.3),
    case("apo_zero", {"loss_type": "apo_zero"}),
    case("apo_down", {"loss_type": "apo_down"}),
    case("discopop", {"loss_type": "discopop"}),
    case("discopop", {"loss_type": "discopop", "discopop_tau": 0.4}, tau=0.4),
    *divergences("discopop", "discopop"),
    case("sft", {"loss_type": "sft"}),
    # TRL bounds no weight.
    case("wpo", {"use_weighting": True}, max_weight=None),
    case("wpo", {"use_weighting": True, "beta": 0.3}, max_weight=None, beta=0.3),
]


class Oracle:
    """TRL's trainer with a batch of pairs, and what its two models said about it."""

    def __init__(self, folder: str) -> None:
        trl = pytest.importorskip("trl")
        self.defaults = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_weighting=True,  # or its model would not say what weights are made of
        )
        self.trainer = trl.DPOTrainer(
            model=tiny_llama(1),
            ref_model=tiny_llama(2),
            args=self.defaults,
            train_dataset=Dataset.from_list(some_rows()),
            processing_class=words_tokenizer(),
        )
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.mask = self.batch["completion_mask"][:, 1:]
        self.seen: dict[str, Tensor] = {}
        self.wide = True
        self.trainer.model.register_forward_hook(lambda _model, _inputs, outputs: self._keep("policy", outputs))
        self.trainer.ref_model.register_forward_hook(lambda _model, _inputs, outputs: self._keep("reference", outputs))

    def _keep(self, side: str, outputs: Any) -> Any:
        """Token log-probs as a leaf of their own, so that both losses are differentiated in the same thing."""
        leaf = outputs.log_probs.detach().to(torch.float64 if self.wide else torch.float32)
        self.seen[side] = leaf.requires_grad_(side == "policy")
        outputs.log_probs = self.seen[side]
        if side == "policy":
            self.log_sum_squares = outputs.log_sum_sq_probs
        return outputs

    def loss_and_gradient(self, **settings: Any) -> tuple[Tensor, Tensor]:
        """TRL's, under these settings of DPOConfig and the defaults of the others."""
        # A second DPOConfig would end the first one's accelerator.
        args = copy(self.defaults)
        args.use_weighting = False
        for name, value in settings.items():
            setattr(args, name, [value] if name == "loss_type" else value)
        # TRL looks up how far its exponent may go by dtype, and has nothing for float64.
        self.wide = args.f_divergence_type != "alpha_divergence"
        self.trainer.args = args
        self.trainer.loss_types, self.trainer.loss_weights = args.loss_type, [1.0]
        for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting"):
            setattr(self.trainer, name, getattr(args, name))
        loss = self.trainer._compute_loss(self.trainer.model, self.batch, return_outputs=False)
        (gradient,) = torch.autograd.grad(loss, self.seen["policy"])
        # The others' log-probs come as constant zeros, so it sums over them.
        return loss.detach(), gradient * self.mask

    def evidence(self) -> tuple[Evidence, Tensor]:
        """What our objectives see of the last batch, and the token log-probs that it is computed from."""
        # TRL's batch is all chosen, then all rejected.
        lengths = self.mask.sum(1).view(2, -1).T.to(self.seen["policy"].dtype)
        tokens = self.seen["policy"].detach().requires_grad_()
        sides = [(seen * self.mask).sum(1).view(2, -1).T for seen in (tokens, self.seen["reference"].detach())]
        policy, reference = (Logps(logps, logps / lengths) for logps in sides)
        apart = (tokens.detach() - self.log_sum_squares) * self.mask
        typicality = apart.sum(1).view(2, -1).T / lengths
        nothing = torch.full_like(lengths, torch.nan)
        return Evidence(policy, reference, lengths, None, nothing, typicality), tokens


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=43,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def some_rows() -> list[dict[str, str]]:
    """Pairs of unequal lengths."""
    draw = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(f"w{draw.randrange(40)}" for _ in range(draw.randint(1, longest)))

    return [{"prompt": text(5) + " ", "chosen": text(9), "rejected": text(9)} for _ in range(PAIRS)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(str(tmp_path_factory.mktemp("trl")))


def test_every_loss_type_of_trl_is_compared_and_found_by_its_name() -> None:
    fields = pytest.importorskip("trl").DPOConfig.__dataclass_fields__
    loss_types = set(re.findall(r"'(\w+)'", fields["loss_type"].metadata["help"]))
    assert len(loss_types) == 15
    cases = [case.values[0] for case in CASES]
    assert loss_types - {"sigmoid"} <= {case.theirs.get("loss_type") for case in cases}
    assert loss_types <= OBJECTIVES.keys() | LOSSES.keys()


def test_the_batch_tells_losses_apart(oracle: Oracle) -> None:
    """Margins of either sign and of about 1 / beta, and pairs whose completions differ in length."""
    oracle.loss_and_gradient()
    evidence, _ = oracle.evidence()
    logratios = (evidence.policy.logps - evidence.reference.logps).detach()
    margins = logratios[:, 0] - logratios[:, 1]
    assert margins.min() < -1
    assert margins.max() > 1
    assert margins.abs().max() < 20
    assert (evidence.lengths[:, 0] != evidence.lengths[:, 1]).sum() >= 3


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trls(oracle: Oracle, case: Case) -> None:
    loss, gradient = oracle.loss_and_gradient(**case.theirs)
    evidence, tokens = oracle.evidence()
    ours = case.objective.value(evidence).losses.mean()
    assert ours.item() == pytest.approx(loss.item(), rel=CLOSE)
    (our_gradient,) = torch.autograd.grad(ours, tokens)
    assert (our_gradient - gradient).norm() <= CLOSE * gradient.norm()
    assert gradient.norm() > 0


class NoReference:
    """One of TRL's trainers without a reference, with a batch of pairs and what its model said about it."""

    def __init__(self, kind: str, folder: str) -> None:
        module = pytest.importorskip(f"trl.experimental.{kind}")
        name = kind.upper()
        defaults = getattr(module, f"{name}Config")(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        self.trainer = getattr(module, f"{name}Trainer")(
            model=tiny_llama(1).double(),
            args=defaults,
            train_dataset=Dataset.from_list(some_rows()),
            processing_class=words_tokenizer(),
        )
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.trainer.model.register_forward_hook(lambda _model, _inputs, outputs: self._keep(outputs))

    def _keep(self, outputs: Any) -> Any:
        self.logits = outputs.logits.detach().requires_grad_()
        outputs.logits = self.logits
        return outputs

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """TRL's loss of the batch, and its gradient in the logits."""
        loss, _ = self.trainer.get_batch_loss_metrics(self.trainer.model, self.batch)
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient

    def evidence(self) -> tuple[Evidence, Tensor]:
        """What our objectives see of the last batch, and the logits that it is computed from."""
        logits = self.logits.detach().requires_grad_()
        longest = logits.shape[1]
        sides = []
        for side, rows in zip(("chosen", "rejected"), logits.chunk(2), strict=True):
            labels = self.batch[f"{side}_labels"]
            labels = torch.nn.functional.pad(labels, (0, longest - labels.shape[1]), value=-100)[:, 1:]
            counts = labels != -100
            tokens = rows[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            sides.append(((tokens * counts).sum(1), counts.sum(1).double()))
        logps, lengths = (torch.stack(values, 1) for values in zip(*sides, strict=True))
        nothing = torch.full_like(lengths, torch.nan)
        return Evidence(Logps(logps, logps / lengths), Logps(nothing, nothing), lengths, None, nothing), logits


@pytest.fixture(scope="module")
def cpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> NoReference:
    return NoReference("cpo", str(tmp_path_factory.mktemp("cpo")))


@pytest.fixture(scope="module")
def orpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> NoReference:
    return NoReference("orpo", str(tmp_path_factory.mktemp("orpo")))


@pytest.mark.parametrize(
    "case",
    [
        case("cpo", {}),
        case("cpo", {"beta": 0.4, "cpo_alpha": 0.3}, beta=0.4, sft_weight=0.3),
        case("cpo", {"label_smoothing": 0.2}, label_smoothing=0.2),
        # TRL's defaults of SimPO are those of CPO; ours are the paper's.
        case("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
        case("simpo", {"loss_type": "simpo", "beta": 0.5, "simpo_gamma": 0.7}, beta=0.5, gamma=0.7, sft_weight=1.0),
    ],
)
def test_losses_without_a_reference_are_trls(
    cpo_trainer: NoReference, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in case.theirs.items():
        # What SimPO alone has, the trainer has under that loss_type only.
        monkeypatch.setattr(cpo_trainer.trainer, name, value, raising=False)
    loss, gradient = cpo_trainer.loss_and_gradient()
    evidence, logits = cpo_trainer.evidence()
    ours = case.objective.value(evidence).losses.mean()
    assert ours.item() == pytest.approx(loss.item(), rel=CLOSE)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    assert (our_gradient - gradient).norm() <= CLOSE * gradient.norm()


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_odds_ratio_of_orpo_is_trls(
    orpo_trainer: NoReference, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's likelihood takes the prompts in, so the rest is compared; TRL computes it in float32."""
    monkeypatch.setattr(orpo_trainer.trainer, "beta", beta)
    orpo_trainer.loss_and_gradient()
    evidence, _ = orpo_trainer.evidence()
    ratio, *_ = orpo_trainer.trainer.odds_ratio_loss(*evidence.policy.mean_logps.detach().unbind(1))
    odds_ratio = Orpo(name="orpo", beta=beta).value(evidence).losses - Sft(name="sft").value(evidence).losses
    assert odds_ratio.tolist() == pytest.approx((-ratio).tolist(), rel=CLOSE)
