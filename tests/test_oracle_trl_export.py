"""
TRL's own DPOTrainer trains from an exported cache with the lines of docs/export.md, and its losses are ours: a DPO
step computed with our scoring and objective on the same pairs. Needs the `oracles` extra.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from tiny_world import build_tiny_world
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo.objectives import Logps
from fpo.objectives.dpo import dpo
from fpo.scoring import install_scoring, pack, sum_logps
from fpo.stage1_cache import build_caches
from fpo.store import Groups, export_trl

pytestmark = [
    pytest.mark.oracle,
    # TRL and torch announce their own deprecations; they are not what is compared here.
    pytest.mark.filterwarnings("default"),
]

BETA, BATCH, STEPS, LEARNING_RATE = 0.5, 4, 5, 0.05
PAGE = Path(__file__).parents[1] / "docs/export.md"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return build_tiny_world(tmp_path / "world", n_train=24, n_test=2)


def test_trl_trains_from_an_export_with_our_losses(world, tmp_path):
    trl = pytest.importorskip("trl")
    (report,) = build_caches(world.recipe(data={"eval_split": None}), tmp_path / "store")
    export_trl(report.cache, tmp_path / "export")

    # The page's class as it stands; of its last lines only the arguments differ here.
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "CachedDPOTrainer" in block]
    names = {"MODEL": str(world.root / "model"), "FOLDER": str(tmp_path / "export")}
    definition = code.split("trainer = ")[0]
    exec(definition, names)

    class InOrder(names["CachedDPOTrainer"]):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(world.root / "model"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "run"),
            precompute_ref_log_probs=True,
            max_length=None,
            beta=BETA,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=load_from_disk(names["FOLDER"]),
        processing_class=AutoTokenizer.from_pretrained(world.root / "model"),
    )
    assert trainer.ref_model is None
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    ours = our_losses(world.root / "model", report.cache)
    assert len(theirs) == STEPS
    # The first is log 2: the policy is the reference. The others move, or a wrong reference would not show.
    assert theirs[0] == pytest.approx(np.log(2), abs=1e-5)
    assert max(abs(loss - np.log(2)) for loss in ours) > 1e-2
    assert theirs == pytest.approx(ours, abs=1e-5)


def our_losses(model_folder, cache) -> list[float]:
    """The same steps with our packed forward, our objective and plain SGD, from the cache itself."""
    pairs = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    pairs = pairs.take(np.argsort(pairs.group_id))
    policy = AutoModelForCausalLM.from_pretrained(model_folder)
    install_scoring(policy)
    optimiser = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        batch = pairs.take(np.arange(step * BATCH, (step + 1) * BATCH))
        packed = pack(batch.input_ids, batch.splits, batch.n_completions)
        scores = policy(**packed._asdict())
        logps = sum_logps(scores.token_logps, packed).view(-1, 2)
        counts = packed.counts.view(-1, 2)
        reference = torch.from_numpy(batch.ref_logps).view(-1, 2)
        value = dpo(Logps(logps, logps / counts), Logps(reference, reference / counts), beta=BETA)
        value.losses.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(value.losses.mean().item())
    return losses
