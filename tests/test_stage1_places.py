"""Where SAEs read: names of other libraries, names left out, and inputs of modules, from the cache to the policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_stage1_build import whole
from tiny_saes import random_sae, write_saelens
from tiny_world import D_SAE, TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM

from fpo.errors import RecipeError
from fpo.stage1_cache import build_caches, find_cache, with_module_paths
from fpo.stage1_cache.identity import cache_identities, checked
from fpo.stage2_align import align
from fpo.store import Features

pytestmark = pytest.mark.usefixtures("private_memory")

HEADS = "model.layers.1.self_attn.o_proj:input"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 4)


def sae_that_says(world: TinyWorld, folder: Path, hook_name: str | None) -> dict[str, object]:
    """An entry of features without a hookpoint; its SAE's files name one, or none."""
    metadata = {} if hook_name is None else {"hook_name": hook_name}
    sae = write_saelens(folder, random_sae(seed=5, d_in=32, d_sae=D_SAE), "jumprelu", metadata=metadata)
    return {"sae": sae, "top_k": "all", "self_check": False}


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "layers.1", "", "h.1"])
def test_every_name_of_a_place_is_one_cache(world: TinyWorld, name: str, tmp_path: Path) -> None:
    entry = sae_that_says(world, tmp_path / "sae", "blocks.1.hook_resid_post")
    named, plain = (
        checked(world.recipe(features=[{**entry, "hookpoint": place}])) for place in (name, "model.layers.1")
    )
    assert [feature.hookpoint for feature in named.features] == ["model.layers.1"]
    assert cache_identities(named)[0].specs == cache_identities(plain)[0].specs


def test_the_objective_may_use_the_name_that_the_features_have(world: TinyWorld, tmp_path: Path) -> None:
    entry = sae_that_says(world, tmp_path / "sae", None)
    features = [{**entry, "hookpoint": place} for place in ("blocks.0.hook_resid_post", "layers.2")]
    objective = {"hookpoints": ["layers.2", "blocks.0.hook_resid_post"]}
    recipe = with_module_paths(world.recipe(features=features, objective=objective))
    assert [feature.hookpoint for feature in recipe.constrained_features()] == ["model.layers.2", "model.layers.0"]


@pytest.mark.parametrize(
    ("hook_name", "hookpoint", "message"),
    [
        (None, "", "features[0].hookpoint: the files of .* do not say where it reads; name the module"),
        ("blocks.1.ln2.hook_normalized", "", "no hookpoint blocks.1.ln2.hook_normalized: no module gives or reads it"),
        (None, "blocks.3.hook_resid_post", "no hookpoint model.layers.3: this model has 3 layers"),
        (None, "blocks.1.hook_mlp", "no hookpoint blocks.1.hook_mlp: no module gives or reads it"),
        ("blocks.1.hook_resid_post", "layers.1:input", "says that it reads model.layers.1, the recipe says"),
    ],
)
def test_a_place_that_nobody_names_or_the_model_lacks_is_refused(
    world: TinyWorld, hook_name: str | None, hookpoint: str, message: str, tmp_path: Path
) -> None:
    entry = {**sae_that_says(world, tmp_path / "sae", hook_name), "self_check": True}
    with pytest.raises(RecipeError, match=message.replace("[", r"\[").replace("]", r"\]")):
        checked(world.recipe(features=[{**entry, "hookpoint": hookpoint}]))


def test_features_of_an_input_from_cache_to_policy(world: TinyWorld, tmp_path: Path) -> None:
    """What the attention's projection reads, encoded by the formula; the policy starts with the same features."""
    entry = sae_that_says(world, tmp_path / "sae", "blocks.1.attn.hook_z")
    recipe = with_module_paths(world.recipe(features=[entry]))
    assert [feature.hookpoint for feature in recipe.features] == [HEADS]
    store = tmp_path / "store"
    groups = whole(build_caches(recipe, store)[0].cache)
    [features] = groups.columns
    assert isinstance(features, Features)

    model = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    bounds = groups.splits.astype(int)
    prompt, chosen = (groups.input_ids[bounds[at] : bounds[at + 1]].astype(np.int64) for at in (0, 1))
    with torch.no_grad():
        model(torch.from_numpy(np.concatenate([prompt, chosen]))[None])
    heads = seen[0][len(prompt) - 1 : -1].numpy()
    h = (heads - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = (np.maximum(h, 0) * (h > weights["threshold"])).mean(0)
    found = np.zeros(D_SAE, dtype=np.float32)
    own = slice(int(features.splits[0]), int(features.splits[1]))
    found[features.indices[own]] = features.acts[own]
    assert found.any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    report = align(recipe, find_cache(recipe, store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-5)
    assert report.last["features/distance_rejected"] > 0
