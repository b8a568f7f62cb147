"""Files that SAELens and sparsify wrote themselves (tests/golden/write_saes.py) encode and decode as they said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fpo.scoring.sae import load_sae, read_decoder, sae_facts

GOLDEN = sorted((Path(__file__).parent / "golden" / "saes").iterdir())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_a_library_s_own_file_encodes_and_decodes_as_it_said(folder: Path) -> None:
    transcodes = "transcoder" in folder.name
    place = "model.layers.1" + (".mlp:input" if transcodes else "")
    expected = np.load(folder / "expected.npz")
    x = torch.from_numpy(expected["x"])
    sae = load_sae(str(folder), place)
    acts = sae.encode(x).numpy()
    np.testing.assert_allclose(acts, expected["acts"], rtol=1e-5, atol=1e-5)
    assert ((acts > 0) == (expected["acts"] > 0)).all()
    facts = sae_facts(str(folder), place)
    assert facts.hook_hint == place
    assert facts.predicts == ("model.layers.1.mlp" if transcodes else None)
    decoded = torch.from_numpy(expected["decoded"])
    target = x.flip(0) if transcodes else x
    missed = (decoded - target).square().sum() / (target - target.mean(0)).square().sum()
    fvu, l0 = sae.fvu_and_l0(x, read_decoder(str(folder), place), target if transcodes else None)
    assert fvu == pytest.approx(float(missed), rel=1e-4)
    assert l0 == pytest.approx((expected["acts"] > 0).sum(1).mean())


def test_there_is_one_of_every_kind() -> None:
    assert len(GOLDEN) == 8
