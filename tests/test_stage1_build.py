"""Stage 1: the key, what the cache holds, killed and resumed, found again, and every refusal before the model loads."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model
from tiny_saes import random_sae, write_saelens
from tiny_world import D_SAE, TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM

import fpo.stage1_cache.score as score_module
from fpo.errors import CacheMissing, DataError, FpoError, ModelError, RecipeError, SaeError, SelfCheckError
from fpo.recipe import validate_recipe
from fpo.scoring import install_scoring, pack
from fpo.scoring.hookpoints import capture
from fpo.scoring.sae import Decoder, Sae, SaeArrays, SaeFacts
from fpo.scoring.self_check import SelfCheck, check_sae
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage1_cache.identity import cache_identities
from fpo.store import Cache, Features, Groups, Store, TopLogits, cache_key, verify

pytestmark = pytest.mark.usefixtures("private_memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


def whole(cache: Cache) -> Groups:
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    return groups.take(np.argsort(groups.group_id))


def test_the_cache_holds_what_a_plain_forward_says(world: TinyWorld, tmp_path: Path) -> None:
    """
    Token log-probs, top logits, pooled features of completions and prompts and the hidden gram, from unpadded forwards
    of transformers and the SAE's formula.
    """
    recipe = world.recipe(cache={"top_logits": 3, "prompt_features": True, "hidden_gram": True})
    groups = whole(build_caches(recipe, tmp_path)[0].cache)
    features, prompts, top, gram = groups.columns
    assert isinstance(features, Features)
    assert isinstance(prompts, Features)
    assert isinstance(top, TopLogits)
    model = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    sae = load_file(world.root / "sae" / "sae_weights.safetensors")

    def pooled(hidden: np.ndarray) -> np.ndarray:
        h = (hidden - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]
        return (np.maximum(h, 0) * (h > sae["threshold"])).mean(0)

    def check(column: Features, row: int, expected: np.ndarray) -> None:
        kept = slice(int(column.splits[row]), int(column.splits[row + 1]))
        best = np.sort(np.argsort(-expected)[: min(16, (expected > 0).sum())])
        assert column.indices[kept].tolist() == best.tolist()
        np.testing.assert_allclose(column.acts[kept], expected[best], rtol=1e-4, atol=1e-5)
        assert column.active[row] == (expected > 0).sum()
        rest = np.delete(expected, best)
        np.testing.assert_allclose(column.tail_sq[row], (rest**2).sum(), rtol=1e-3, atol=1e-6)

    bounds = groups.splits.astype(int)
    for row in range(0, len(groups), 7):
        prompt = groups.input_ids[bounds[3 * row] : bounds[3 * row + 1]]
        sums = []
        for side in (0, 1):
            completion = groups.input_ids[bounds[3 * row + 1 + side] : bounds[3 * row + 2 + side]]
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
            with torch.no_grad():
                output = model(input_ids=ids, output_hidden_states=True)
            here = np.arange(len(prompt), ids.shape[1])
            logps = output.logits[0].log_softmax(-1)[here - 1]
            one = 2 * row + side
            scored = slice(groups.scored_splits[one], groups.scored_splits[one + 1])
            expected = logps[np.arange(len(here)), completion.astype(np.int64)].numpy()
            np.testing.assert_allclose(groups.token_logps[scored], expected, atol=1e-5)
            np.testing.assert_allclose(groups.ref_logps[one], expected.sum(), atol=1e-4)
            np.testing.assert_allclose(top.logps[scored], logps.topk(3).values, atol=1e-5)
            check(features, one, pooled(output.hidden_states[2][0, here - 1].numpy()))
            sums.append(output.hidden_states[-1][0, here - 1].sum(0))
        # Positions 0 to n-2 of a prompt of n tokens predict its tokens 1 to n-1.
        if len(prompt) > 1:
            check(prompts, row, pooled(output.hidden_states[2][0, : len(prompt) - 1].numpy()))
        expected = torch.stack(sums) @ torch.stack(sums).T
        np.testing.assert_allclose(gram.take([row]).products.reshape(2, 2), expected, rtol=1e-4)


def test_a_second_call_hits_without_loading_the_model(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_caches(world.recipe(), tmp_path)
    assert [report.built_shards for report in first] == [3, 1]
    assert [report.cache.n_groups for report in first] == [40, 10]
    monkeypatch.setattr(score_module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("fpo.stage1_cache.identity.tokenise", lambda *_, **__: pytest.fail("the pairs were tokenised"))
    again = build_caches(world.recipe(), tmp_path)
    assert [report.built_shards for report in again] == [0, 0]
    assert [report.cache.digest for report in again] == [report.cache.digest for report in first]


def test_the_key_depends_on_what_changes_numbers_and_on_nothing_else(world: TinyWorld, tmp_path: Path) -> None:
    def key(**sections: object) -> str:
        return cache_key(cache_identities(world.recipe(**sections))[0].key_recipe)

    base = key()
    feature = world.raw_recipe()["features"][0]
    same = [
        key(objective={"name": "fpo", "beta": 7.0}),
        key(training={"learning_rate": 1.0, "seed": 9}),
        key(policy={"lora": {"r": 4}, "same_arithmetic": False}),
        key(features=[{**feature, "sae": str(world.root / "pairs" / ".." / "sae")}]),
        # What stands in a column decides nothing of the base.
        key(features=[], objective={"name": "dpo"}),
        key(features=[{**feature, "top_k": 17}]),
        key(features=[{**feature, "hookpoint": "model.layers.2"}]),
        key(cache={"top_logits": 1, "prompt_features": True, "hidden_gram": True}),
    ]
    assert same == [base] * len(same)
    other = [
        key(reference={"dtype": "bfloat16"}, policy={"same_arithmetic": False}),
        key(reference={"autocast": "bfloat16"}, policy={"same_arithmetic": False}),
        key(reference={"autocast": "float16"}, policy={"same_arithmetic": False}),
        key(data={"split": "train[:39]"}),
        key(data={"max_length": 9}),
        key(cache={"shard_pairs": 15}),
        key(cache={"seed": 1}),
    ]
    assert len({base, *other}) == 1 + len(other)


def test_changed_weights_config_or_sae_make_another_key_and_resharding_does_not(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", 4, 2)

    def key() -> list[str]:
        identity = cache_identities(world.recipe())[0]
        return [cache_key(identity.key_recipe), cache_key(identity.column_recipe(identity.specs[0]))]

    base = key()
    model = AutoModelForCausalLM.from_pretrained(world.root / "model")
    (world.root / "model" / "model.safetensors").unlink()
    model.save_pretrained(world.root / "model", max_shard_size="20KB")
    assert len(list((world.root / "model").glob("*.safetensors"))) > 1
    assert key() == base
    config = world.root / "model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    changed_config = key()
    weights = world.root / "sae" / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["b_enc"][0] += 1
    save_file(tensors, weights)
    changed_sae = key()
    # The base does not know the SAE; a column's key holds its base's.
    assert len({base[0], changed_config[0], changed_sae[0]}) == 2
    assert len({base[1], changed_config[1], changed_sae[1]}) == 3


def test_batch_size_changes_numbers_by_rounding_only(world: TinyWorld, tmp_path: Path) -> None:
    wide = whole(build_caches(world.recipe(), tmp_path / "wide", batch_tokens=4096)[0].cache)
    narrow = whole(build_caches(world.recipe(), tmp_path / "narrow", batch_tokens=1)[0].cache)
    np.testing.assert_allclose(wide.token_logps, narrow.token_logps, atol=1e-5)
    assert np.array_equal(wide.columns[0].indices, narrow.columns[0].indices)


BUILD = """
import sys
from pathlib import Path
from fpo.recipe import load_recipe
from fpo.stage1_cache import build_caches
build_caches(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.long
def test_killed_and_resumed_gives_the_same_bytes_as_never_killed(world: TinyWorld, tmp_path: Path) -> None:
    """SIGKILL between a base's shard and its column's, each time, until a process gets to the end."""
    recipe = world.recipe_file(cache={"shard_pairs": 20})
    store = tmp_path / "killed"
    kills = 0
    for target in range(1, 20, 3):
        process = subprocess.Popen([sys.executable, "-c", BUILD, str(recipe), str(store)], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(store.rglob("records/*.json"))) < target:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 2
    whole_store = tmp_path / "whole"
    subprocess.run([sys.executable, "-c", BUILD, str(recipe), str(whole_store)], check=True, stderr=subprocess.DEVNULL)

    def contents(root: Path) -> dict[str, bytes]:
        kept = [p for p in root.rglob("*") if p.is_file() and "records" not in p.parts and "tmp" not in p.parts]
        return {str(p.relative_to(root)): p.read_bytes() for p in kept}

    assert contents(store) == contents(whole_store)
    for folder in store.iterdir():
        if len(folder.name) == 64:
            assert verify(store, folder.name).problems == []


def refusal(recipe_sections: dict[str, object], world: TinyWorld, store: Path, kind: type[FpoError]) -> str:
    """The first line of what build_caches says, with every model load forbidden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "load_model", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(kind) as caught:
            build_caches(world.recipe(**recipe_sections), store)
    return str(caught.value).splitlines()[0]


def test_wrong_files_hookpoints_widths_and_columns_are_refused_before_the_model_loads(
    world: TinyWorld, tmp_path: Path
) -> None:
    feature = world.raw_recipe()["features"][0]
    wide = write_saelens(tmp_path / "wide", random_sae(d_in=40, d_sae=48), "jumprelu")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a", "choosen": "b", "rejected": "c"}\n')

    def with_feature(**changes: object) -> dict[str, object]:
        return {"features": [{**feature, **changes}]}

    model = str(world.root / "modle")
    assert "nearest is" in refusal({"reference": {"model": model}}, world, tmp_path, ModelError)
    said = refusal(with_feature(hookpoint="model.layers.3"), world, tmp_path, RecipeError)
    assert "features[0].hookpoint" in said
    assert "model.layers.0 to model.layers.2" in said
    said = refusal(with_feature(hookpoint="model.layers.1.mlpp"), world, tmp_path, RecipeError)
    assert "did you mean model.layers.1.mlp?" in said
    said = refusal(with_feature(sae=wide), world, tmp_path, RecipeError)
    assert "features[0].sae" in said
    assert "reads 40 numbers per token" in said
    assert "gives 32" in said
    said = refusal(with_feature(top_k=D_SAE + 1), world, tmp_path, RecipeError)
    assert f"features[0].top_k: {D_SAE + 1} is more than the SAE's {D_SAE} features" in said
    assert "sea" in refusal(with_feature(sae=str(world.root / "sea")), world, tmp_path, SaeError)
    assert "data.max_length: 65 is more than the 64 positions" in refusal(
        {"data": {"max_length": 65}}, world, tmp_path, RecipeError
    )
    said = refusal({"data": {"source": str(world.root / "pears")}}, world, tmp_path, DataError)
    assert "pairs" in said
    said = refusal({"data": {"split": "tran"}}, world, tmp_path, DataError)
    assert "train" in said
    odd = {"source": str(tmp_path / "odd.jsonl"), "eval_split": None}
    said = refusal({"data": odd}, world, tmp_path, DataError)
    assert "chosen" in said
    assert "choosen" in said


def test_without_a_cut_a_sequence_beyond_the_models_positions_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    words = " ".join(["w1"] * 70)
    (tmp_path / "long.jsonl").write_text(f'{{"prompt": "w1", "chosen": "w2", "rejected": " {words}"}}\n')
    data = {"source": str(tmp_path / "long.jsonl"), "eval_split": None, "max_length": None}
    said = refusal({"data": data}, world, tmp_path, RecipeError)
    assert "row 0 has 73 tokens, more than the 64 positions" in said  # bos, prompt, 70 words, eos


def test_a_run_killed_before_the_manifest_seals_the_same_bytes(world: TinyWorld, tmp_path: Path) -> None:
    cache = build_caches(world.recipe(), tmp_path)[0].cache
    manifest = tmp_path / cache.key / "manifest.json"
    before = manifest.read_bytes()
    manifest.unlink()
    assert build_caches(world.recipe(), tmp_path)[0].built_shards == 0
    assert manifest.read_bytes() == before


def test_model_files_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    """transformers would fill it with random numbers, other ones every time, and a cache would hold them."""
    world = build_tiny_world(tmp_path / "world", 4, 2)
    weights = world.root / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.layers.2.mlp.down_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 1 of the model's tensors, the first is model\.layers\.2\.mlp\.down_proj"
    ):
        build_caches(world.recipe(), tmp_path / "store")


def test_a_changed_data_file_with_its_old_mtime_is_read_anew(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", 4, 2)
    path = world.root / "pairs" / "train.jsonl"
    before = cache_identities(world.recipe())[0].key_recipe["groups"]
    stat = path.stat()
    row = '{"prompt": "w1", "chosen": " w2", "rejected": " w3 w4"}\n'
    path.write_text(row * 3)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = cache_identities(world.recipe())[0]
    assert after.key_recipe["groups"] != before
    assert len(after.tokens) == 3


def test_another_column_for_the_prompt_makes_other_tokens_and_is_asked_anew(world: TinyWorld, tmp_path: Path) -> None:
    """The key holds tokens, not names: the same prompts under another name give the same key."""
    rows = [json.loads(line) for line in (world.root / "pairs" / "train.jsonl").read_text().splitlines()]
    renamed = [{"question": row["prompt"], **row, "prompt": "w1 w2"} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))

    def key(**data: object) -> str:
        return cache_key(cache_identities(world.recipe(data=data))[0].key_recipe)

    plain = key()
    here = {"source": str(tmp_path), "eval_split": None}
    assert key(**here) != plain
    assert key(**here, columns={"prompt": "question"}) == plain
    assert key(**here) != plain


def test_without_a_terminal_lines_say_where_stage_1_stands(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line for every step instead of one a minute: three shards of 16, 16 and 8 pairs of completions."""
    monkeypatch.setattr("fpo.progress.LINE_SECONDS", 0.0)
    build_caches(world.recipe(data={"eval_split": None}), tmp_path)
    said = capsys.readouterr().err
    rate = r"[\d,.e+]+"
    assert re.search(rf"^tokenise: 40/40 pairs, {rate} pairs/s$", said, re.MULTILINE)
    assert f"loading the reference {world.root / 'model'} ...\n" in said
    # Which shard comes first is the process's own.
    assert re.search(
        rf"^cache train: (16|32|48|64)/80 completions, ({rate} tokens/s, )?{rate} completions/s, eta \d+ s$",
        said,
        re.MULTILINE,
    )
    assert re.search(rf"^cache train: 80/80 completions, {rate} tokens/s, {rate} completions/s$", said, re.MULTILINE)


def test_repeated_and_shared_pairs_are_counted(world: TinyWorld, tmp_path: Path) -> None:
    """Held out are the first two training pairs twice and one of its own: four of five stand in training too."""
    train = (world.root / "pairs" / "train.jsonl").read_text().splitlines()
    own = (world.root / "pairs" / "test.jsonl").read_text().splitlines()[0]
    (tmp_path / "train.jsonl").write_text("\n".join(train))
    (tmp_path / "test.jsonl").write_text("\n".join([*train[:2], *train[:2], own]))
    for _ in ("built", "found"):
        held_in, held_out = build_caches(world.recipe(data={"source": str(tmp_path)}), tmp_path / "store")
        assert held_in.drops.noted == {}
        assert held_out.drops.noted["repeated"].rows == [2, 3]
        assert (held_in.trained_on, held_out.trained_on) == (0, 4)


def test_tokens_that_the_reference_does_not_know_are_refused(world: TinyWorld, tmp_path: Path) -> None:
    small = build_tiny_world(tmp_path / "small", 4, 2)
    tiny_model("llama", seed=3, vocab_size=50).save_pretrained(small.root / "model")
    said = refusal(
        {"reference": {"model": str(small.root / "model")}, "features": [], "objective": {"name": "dpo"}},
        world,
        tmp_path,
        RecipeError,
    )
    assert "data.tokenizer: it gives token" in said
    assert "knows 50 tokens" in said


def test_a_hookpoint_that_gives_something_else_than_its_sae_reads_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    feature = world.raw_recipe()["features"][0]
    for hookpoint, message in (
        ("model.layers.1.mlp.gate_proj", "gives 48 numbers per token, its SAE reads 32"),
        ("lm_head", "gives no vector per token while the decoder runs"),
    ):
        with pytest.raises(FpoError, match=message):
            build_caches(world.recipe(features=[{**feature, "hookpoint": hookpoint}]), tmp_path)


def test_a_build_that_fails_leaves_a_cache_with_names(world: TinyWorld, tmp_path: Path) -> None:
    feature = world.raw_recipe()["features"][0]
    with pytest.raises(FpoError):
        build_caches(world.recipe(features=[{**feature, "hookpoint": "lm_head"}]), tmp_path)
    (summary,) = Store(tmp_path).summaries()
    assert summary.state == "0 of 3 shards"
    assert str(world.root / "model") in summary.reference
    assert summary.data.endswith("pairs train")


def test_a_missing_cache_is_not_built_by_stage_2(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(CacheMissing):
        find_cache(world.recipe(), tmp_path / "empty")


def test_the_self_check_refuses_a_wrong_hookpoint_and_says_the_right_one() -> None:
    """
    An "SAE" that fits layer 1 alone: its features are the positive and negative parts of that layer's coordinates along
    its own principal axes, so that FVU is 0 there and large elsewhere.
    """
    torch.manual_seed(0)
    model = tiny_model("llama", seed=3)
    install_scoring(model)
    ids = np.random.default_rng(0).integers(3, 97, 120)
    packed = pack(ids, np.array([0, 2, 61, 120]), np.array([2]))
    with capture(model, ["model.layers.1"]) as outputs, torch.no_grad():
        model(**packed._asdict())
    x = outputs["model.layers.1"].flatten(0, 1)[packed.predictors].double()
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:20].float().numpy()
    facts = SaeFacts(32, 40, "relu", "test", 20.0, None, False)
    arrays = SaeArrays(facts, np.concatenate([axes, -axes]).T.copy(), np.zeros(40, np.float32), "relu", "none")
    decoder = Decoder(np.concatenate([axes, -axes]), np.zeros(32, np.float32))
    right = check_sae(model, Sae(arrays), decoder, "model.layers.1", packed)
    right.raise_if_unfit()
    assert right.best == "model.layers.1"
    assert right.l0 == pytest.approx(20, abs=0.5)
    wrong = check_sae(model, Sae(arrays), decoder, "model.layers.2", packed)
    with pytest.raises(SelfCheckError) as caught:
        wrong.raise_if_unfit()
    assert "it explains model.layers.1 better" in str(caught.value)
    assert f"FVU {wrong.fvu:.3f}" in str(caught.value)


def measured(**facts: Any) -> SelfCheck:
    shown = {"l0": 16.0, "advertised_l0": 16.0, "fvu": 0.2, "elsewhere": {"model.layers.1": 0.5, "model.layers.3": 0.4}}
    return SelfCheck(hookpoint="model.layers.2", tokens=512, **{**shown, **facts})


@pytest.mark.parametrize(("elsewhere", "refused"), [(0.19, False), (0.172, False), (0.168, True), (0.1, True)])
def test_another_layer_must_fit_better_by_more_than_noise(elsewhere: float, refused: bool) -> None:
    """FVU 0.2 here: 15 % less is 0.17."""
    check = measured(elsewhere={"model.layers.1": elsewhere, "model.layers.3": 0.4})
    assert check.best == ("model.layers.1" if refused else "model.layers.2")
    if refused:
        with pytest.raises(SelfCheckError, match=r"it explains model\.layers\.1 better"):
            check.raise_if_unfit()
    else:
        check.raise_if_unfit()


def test_an_sae_that_fits_is_not_refused_for_an_old_average_in_its_file() -> None:
    """FVU 0.246 at the best hookpoint, L0 10.1 where the file says 84.2: its trainer wrote an average of training."""
    check = measured(l0=10.1, advertised_l0=84.1933, fvu=0.246)
    check.raise_if_unfit()
    assert check.note is not None
    assert "the advertised L0 is wrong or old" in check.note
    assert measured().note is None


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"l0": 208.0, "fvu": 0.1}, "far more features"),  # a missing threshold: 13 times as many, and FVU may be good
        ({"l0": 48.0, "fvu": 0.3}, "far more features"),  # b_dec left in: 3 times as many
        ({"l0": 5.0, "fvu": 0.6, "elsewhere": {}}, "far fewer features"),
        ({"fvu": 0.9, "elsewhere": {}}, "above 0.8"),
        ({"fvu": math.nan}, "all alike"),
    ],
)
def test_wrong_loads_are_refused_by_their_figures(facts: dict[str, Any], cause: str) -> None:
    with pytest.raises(SelfCheckError, match=cause) as caught:
        measured(**facts).raise_if_unfit()
    assert "set self_check: false in this entry" in str(caught.value)


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="no real data beside the project")
@pytest.mark.parametrize("sae", ["gemmascope", "saelens", "sparsify"])
def test_the_self_check_on_a_real_sae_finds_its_layer_among_all(sae: str, tmp_path: Path) -> None:
    source = DATA / "saes" / "stories260K-hs3-topk16-512" / sae
    raw = {
        "reference": {"model": str(DATA / "models" / "stories260K")},
        "features": [{"sae": str(source), "hookpoint": "model.layers.2", "top_k": 32}],
        "data": {
            "source": str(DATA / "pairs" / "llms_from_scratch.str.jsonl"),
            "split": "train[:60]",
            "max_length": 512,
        },
        "objective": {"name": "dpo"},
    }
    (check,) = build_caches(validate_recipe(raw, "test"), tmp_path)[0].self_checks
    assert check.fvu is not None
    assert 0.05 < float(check.fvu) < 0.2
    assert float(check.fvu) < min(float(value) for value in check.elsewhere.values())
    raw["features"] = [{"sae": str(source), "hookpoint": "model.layers.3", "top_k": 32}]
    with pytest.raises((SelfCheckError, RecipeError)) as caught:
        build_caches(validate_recipe(raw, "test"), tmp_path)
    # SAELens' files name their hookpoint, the others are caught by their fit.
    expected = "says that it reads model.layers.2" if sae == "saelens" else "it explains model.layers.2 better"
    assert expected in str(caught.value)
