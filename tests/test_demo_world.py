"""The demo world: a grammar whose figures are exact, and a miniature world built twice."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo.demo import build as build_module
from fpo.demo import evaluate as evaluate_module
from fpo.demo.autoencoder import AutoencoderSettings, JumpReluSae, _batch_topk, record_activations
from fpo.demo.build import WorldSettings, build_world, read_card, world_digest
from fpo.demo.evaluate import evaluate, table
from fpo.demo.grammar import STORIES, Grammar, gold_reward
from fpo.demo.language_model import LanguageModelSettings
from fpo.demo.preferences import PreferenceSettings, label_pairs, sample_openings, sample_preferences
from fpo.demo.sampling import _inverse_transform, completion_logps, sample_completions
from fpo.demo.words import HAPPY_WORDS, RULES, SAD_WORDS
from fpo.errors import DataError, ModelError, RunError

MINIATURE = WorldSettings(
    threads=1,
    vocab_size=700,
    tokenizer_stories=400,
    language_model=LanguageModelSettings(
        hidden_size=48, intermediate_size=96, layers=2, steps=70, batch_size=8, heldout_stories=40
    ),
    autoencoder=AutoencoderSettings(layer=0, d_sae=96, k=8, stories=60, steps=60, batch_size=128, heldout_stories=20),
    preferences=PreferenceSettings(train_pairs=24, test_pairs=8),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "world"
    _, built = build_world(output, MINIATURE)
    assert built
    return output


# The grammar


def test_entropy_of_a_small_grammar_matches_hand_calculation():
    """
    slot      1 bit
    opening   no choice
    continuation   "a" with 1/2, or <x> (two even productions) with 1/2: 1 bit + 1/2 * 1 bit
    in all    2.5 bits
    """
    grammar = Grammar(
        {"name": {"Tim": 2, "Mia": 2}},
        {"opening": {"{name}": 1}, "continuation": {" a": 1, " <x>": 1}, "x": {"b": 3, "c": 3}},
    )
    assert grammar.entropy() == pytest.approx(2.5 * math.log(2))
    assert dict(grammar.enumerate("continuation")) == {" a": 0.5, " b": 0.25, " c": 0.25}
    story = grammar.sample(np.random.default_rng(0))
    expected = {" a": 0.25, " b": 0.125, " c": 0.125}[story.continuation]
    assert math.exp(story.log_probability) == pytest.approx(expected)


def test_every_continuation_is_derived_once_and_probabilities_sum_to_one():
    texts, probabilities = zip(*STORIES.enumerate("continuation"), strict=True)
    assert len(set(texts)) == len(texts)  # two derivations of one text would make its probability wrong
    assert math.fsum(probabilities) == pytest.approx(1)
    entropy = -math.fsum(p * math.log(p) for p in probabilities)
    assert STORIES.symbol_entropy("continuation") == pytest.approx(entropy)


def test_sampled_stories_cost_the_entropy_on_the_average():
    rng = np.random.default_rng(0)
    nats = np.array([-STORIES.sample(rng).log_probability for _ in range(2000)])
    assert abs(nats.mean() - STORIES.entropy()) < 4 * nats.std() / len(nats) ** 0.5


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (
            "Tim fell. Tim cried. Tim smiled and was happy. They danced all day.",
            1.0,
        ),  # only the ending counts
        ("The boat sank. Tim cried and was sad. Tim felt lonely.", -1.0),
        ("Tim went home. The sun went down.", 0.0),
        ("Tim smiled. Then it was time for bed.", 0.5),
        ("Tim smiled. Tim cried.", 0.0),
        (
            "Tim went home. Tim wept, sad and alone, but glad",
            -0.5,
        ),  # three sad words, one happy; no full stop
        ("happy", 1.0),  # the only sentence is the ending
        ("Happy happy happy! ... . !", 1.0),
        ("", 0.0),
        (" ... 12 !?", 0.0),
        ("unhappy", 0.0),  # whole words
    ],
)
def test_gold_reward_is_the_mood_of_the_last_two_sentences(text: str, reward: float):
    assert gold_reward(text) == reward


def test_every_closing_sentence_has_the_mood_that_its_rule_names():
    for mood, reward in {"happy": 1.0, "neutral": 0.0, "sad": -1.0}.items():
        for sentence in [*RULES[mood], *RULES[f"{mood}-close"]]:
            assert gold_reward(sentence) == reward, sentence
    assert not HAPPY_WORDS & SAD_WORDS


# The miniature world


@pytest.mark.long
def test_a_world_built_again_has_the_same_bytes(world: Path, tmp_path: Path):
    again, built = build_world(tmp_path / "again", MINIATURE)
    assert built
    assert again == read_card(world)
    assert len(again["files"]) >= 7


def test_a_world_that_fits_is_left_alone_and_a_damaged_one_is_built_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = shutil.copytree(world, tmp_path / "world")
    monkeypatch.setattr(build_module, "_build_parts", lambda folder, settings: {"stub": 1})
    assert build_world(copy, MINIATURE) == (read_card(world), False)
    with (copy / "pairs" / "train.jsonl").open("a") as file:
        file.write("{}\n")
    assert build_world(copy, MINIATURE)[1]


def test_other_settings_ask_for_another_world():
    assert world_digest(MINIATURE) == world_digest(replace(MINIATURE))
    assert world_digest(MINIATURE) != world_digest(replace(MINIATURE, seed=1))
    quieter = replace(MINIATURE.preferences, label_noise=0.0)
    assert world_digest(MINIATURE) != world_digest(replace(MINIATURE, preferences=quieter))


def test_a_build_that_dies_leaves_nothing_at_the_output_and_the_next_one_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "world"

    def die(folder: Path, settings: WorldSettings) -> None:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_build_parts", die)
    with pytest.raises(KeyboardInterrupt):
        build_world(output, MINIATURE)
    assert not output.exists()
    monkeypatch.setattr(build_module, "_build_parts", lambda folder, settings: {})
    card, built = build_world(output, MINIATURE)
    assert built
    assert card["files"] == {}  # not even the half
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_folder_that_is_no_world_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds something that is not a demo world"):
        build_world(tmp_path, MINIATURE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert build_module.main(["--output", str(tmp_path)]) == 1


def test_model_and_tokenizer_open_as_any_other(world: Path):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    story = STORIES.sample(np.random.default_rng(1))
    whole = tokenizer(story.text)["input_ids"]
    prompt = tokenizer(story.opening)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[0] == tokenizer.bos_token_id
    assert tokenizer.decode(whole, skip_special_tokens=True) == story.text
    assert tokenizer("né 漢 \n")["input_ids"]  # any text is tokens


def test_a_short_training_already_beats_guessing(world: Path):
    figures = json.loads((world / "world.json").read_text())["figures"]
    assert figures["grammar_nats_per_token"] < figures["heldout_nats_per_token"]
    assert figures["heldout_nats_per_token"] < math.log(figures["vocabulary"]) / 2


def test_the_exported_autoencoder_has_saelens_shapes_and_the_l0_it_advertises(world: Path):
    config = json.loads((world / "sae" / "cfg.json").read_text())
    tensors = load_file(world / "sae" / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (48, 96),
        "b_enc": (96,),
        "W_dec": (96, 48),
        "b_dec": (48,),
        "threshold": (96,),
    }
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", 48, 96)
    assert config["metadata"]["hf_hook_name"] == "model.layers.0"
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rng = np.random.default_rng([MINIATURE.seed, 2])
    stories = [STORIES.sample(rng) for _ in range(80)][60:]  # the held-out ones
    x = record_activations(model, tokenizer, stories, layer=0)
    active = JumpReluSae(**tensors).encode(x) > 0
    assert float(active.sum(1).float().mean()) == pytest.approx(config["metadata"]["l0"], abs=1e-3)


def test_batch_topk_keeps_the_largest_values_of_the_batch_not_of_each_row():
    """N = 2, k = 2: four values are kept, three of them in the first row."""
    kept, smallest = _batch_topk(torch.tensor([[5.0, 4.0, 3.0], [2.5, 1.0, -9.0]]), 2)
    assert kept.tolist() == [[5.0, 4.0, 3.0], [2.5, 0.0, 0.0]]
    assert smallest == 2.5


def test_pairs_carry_their_gold_rewards_and_share_no_opening(world: Path):
    train, test = (
        [json.loads(line) for line in (world / "pairs" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (24, 8)
    assert len({pair["prompt"] for pair in train + test}) == 32
    for pair in train + test:
        assert pair["chosen_reward"] == gold_reward(pair["chosen"]) != pair["rejected_reward"]
        assert pair["rejected_reward"] == gold_reward(pair["rejected"])


# Pairs and sampling


def test_labels_follow_the_reward_and_noise_turns_them_over():
    openings, sad, happy = ["A.", "B.", "C.", "D."], " Tim cried.", " Tim smiled."
    first, second = [sad, happy, sad, None], [happy, sad, sad, happy]  # C is a tie, D has no end
    honest = label_pairs(openings, first, second, 0.0, np.random.default_rng(0))
    assert [(p.prompt, p.chosen, p.rejected) for p in honest] == [("A.", happy, sad), ("B.", happy, sad)]
    perverse = label_pairs(openings, first, second, 1.0, np.random.default_rng(0))
    assert [(p.chosen_reward, p.rejected_reward) for p in perverse] == [(-1.0, 1.0)] * 2


def test_a_model_whose_completions_never_end_makes_no_endless_loop(world: Path):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    too_short = PreferenceSettings(train_pairs=1, test_pairs=1, max_new_tokens=2)
    with pytest.raises(DataError, match="gave 0 of 2 pairs"):
        sample_preferences(model, tokenizer, too_short, seed=0)


def test_openings_are_distinct_and_not_the_excluded_ones():
    known = sample_openings(np.random.default_rng(0), 30, [])
    fresh = sample_openings(np.random.default_rng(0), 30, known[:10])
    assert len(set(known)) == 30
    assert not set(known[:10]) & set(fresh)
    assert fresh[:20] == known[10:]


def test_inverse_transform_picks_the_token_whose_share_holds_the_number():
    """Probabilities 0.5, 0.2, 0.3: shares [0, 0.5), [0.5, 0.7), [0.7, 1)."""
    logits = torch.tensor([0.5, 0.2, 0.3]).log().repeat(5, 1)
    tokens = _inverse_transform(logits, torch.tensor([0.0, 0.49, 0.51, 0.69, 0.99999]))
    assert tokens[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_padding_changes_neither_samples_nor_their_log_probability(world: Path):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time there was a", "Tim", "One day")]
    uniforms = np.random.default_rng(0).random((3, 30), dtype=np.float32)
    together = sample_completions(model, prompts, uniforms, "together")
    alone = [sample_completions(model, [p], u[None], "alone")[0] for p, u in zip(prompts, uniforms, strict=True)]
    assert together == alone
    for prompt, completion, logp in zip(prompts, together, completion_logps(model, prompts, together), strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        expected = sum(float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(completion))
        assert logp == pytest.approx(expected, abs=1e-4)


# Evaluation


def test_the_reference_neither_gains_on_itself_nor_leaves_itself(world: Path):
    evaluation = evaluate(world / "model", world, samples=12)
    assert (evaluation.gain.mean, evaluation.kl.mean, evaluation.win_rate.mean) == (0.0, 0.0, 0.5)
    assert evaluation.reference_reward == evaluation.policy_reward
    assert evaluation.example is None


def test_a_changed_policy_has_a_divergence_and_its_report_is_json(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    with torch.no_grad():
        direction = policy.lm_head.weight[tokenizer.encode(" happy", add_special_tokens=False)[0]]
        policy.lm_head.weight += 0.05 * direction
        policy.model.norm.weight *= 0.7
    policy.save_pretrained(tmp_path / "policy")
    arguments = [str(tmp_path / "policy"), "--world", str(world), "--samples", "12"]
    assert evaluate_module.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"]["mean"] > 0.1
    assert report["samples"] == 12
    assert "KL to reference" in table(evaluate(tmp_path / "policy", world, samples=12))


def test_estimate_is_the_mean_and_196_standard_errors():
    """Values 0 and 2: mean 1, standard deviation sqrt(2), standard error 1."""
    assert evaluate_module.estimate(np.array([0.0, 2.0])) == evaluate_module.Estimate(1.0, pytest.approx(1.96))


def test_evaluation_refuses_what_is_not_there(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError, match="no demo world here"):
        evaluate(world / "model", tmp_path)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        evaluate(tmp_path, world)
    assert evaluate_module.main([str(tmp_path), "--world", str(world)]) == 1
    assert f"error: {tmp_path}: no model here" in capsys.readouterr().err
