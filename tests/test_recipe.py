"""A recipe is refused before anything loads, in one line that names the field and the nearest valid value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fpo.errors import RecipeError
from fpo.objectives import OBJECTIVES, Fpo, Simpo
from fpo.recipe import (
    OWNED_ARGUMENTS,
    PUBLISHING_ARGUMENTS,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_schema,
    reference_page,
    trl_names,
    validate_recipe,
)
from fpo.recipe.parsing import parse_yaml
from fpo.recipe.training import training_fields
from fpo.section import Section

MINIMAL: dict[str, Any] = {
    "reference": {"model": "some/model"},
    "features": [{"sae": "some/sae", "hookpoint": "model.layers.3", "top_k": 64}],
    "data": {"source": "pairs.jsonl"},
}


READY = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_recipe_has_the_papers_objective() -> None:
    recipe = validate_recipe(MINIMAL, "test")
    assert recipe.objective == Fpo(name="fpo", beta=0.1, alpha=0.5, k=50, feature_set="reference")
    assert recipe.constrained_features() == recipe.features


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.betta=1", "objective.betta: no such field; nearest is beta"),
        ("objective.beta=x", "objective.beta: must be a valid number, not 'x'"),
        ("objective.beta=-1", "objective.beta: must be greater than 0, not -1"),
        ("objective.alpha=.nan", "objective.alpha: must be a finite number, not nan"),
        ("objective.name=fpoo", "objective.name: 'fpoo' is no objective; nearest is fpo"),
        ("objective.feature_set=refrence", "objective.feature_set: 'refrence' is not valid; nearest is reference"),
        ("objective.k=65", "objective.k: 65 features are asked for, the cache keeps top_k: 64"),
        ("objective.hookpoints=[model.layers.2]", "model.layers.2 is not among features; nearest is model.layers.3"),
        ("features=[]", "objective.name: fpo needs an entry in features"),
        ("features.0.hook=1", "features[0].hook: no such field; nearest is hookpoint"),
        ("features.0.top_k=al", "features[0].top_k: 'al' is not valid; nearest is all"),
        ("features.1.top_k=3", "1 is not one of the 1 entries, counted from 0"),
        ("reference.dtype=bf16", "reference.dtype: 'bf16' is not valid; nearest is bfloat16"),
        ("dat.source=x", "dat: no such field; nearest is data"),
        ("data.max_length=1.5", "data.max_length: must be a valid integer"),
        ("policy.lora.rr=8", "policy.lora.rr: no such field; nearest is r"),
        (
            "training.learning_rte=1",
            "training.learning_rte: no such argument of TrainingArguments; nearest is learning_rate",
        ),
        ("training.learning_rate=fast", "training.learning_rate: must be a valid number"),
        ("training.output_dir=x", "training.output_dir: not set here; give the run folder with --output"),
        ("training.save_strategy=no", 'training.save_strategy: YAML reads a bare no as false; write "no"'),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size: must be at least 1, not 0"),
        ("training.max_steps='2'", "training.max_steps: must be a valid integer, not '2'"),
        ("training.gradient_checkpointing_kwargs={use_reentrant: true}", "use_reentrant loses the gradient"),
        ("policy.dtype=bfloat16", "policy.dtype: bfloat16 weights swallow an update below 1/256 of their size"),
        (
            "training.neftune_noise_alpha=5",
            "training.neftune_noise_alpha: not set here; its noise would stand",
        ),
        (
            "reference={model: m, dtype: bfloat16, autocast: bfloat16}",
            "reference.autocast: bfloat16 rounds the",
        ),
        ("reference.autocast=bf16", "reference.autocast: 'bf16' is not valid; nearest is bfloat16"),
        ("training.beta=0.1", "training.beta: no argument of TrainingArguments; it is objective.beta"),
        ("training.loss_type=ipo", "training.loss_type: no argument of TrainingArguments; it is objective.name"),
        (
            "training.early_stopping_patience=2",
            "early_stopping_patience: 2 goes by evaluations, and there are none",
        ),
        ("training.early_stopping_patience=0", "training.early_stopping_patience: must be at least 1, not 0"),
        ("training.early_stopping_patiense=1", "nearest is early_stopping_patience"),
        ("training.warmup_ratio=0.1", "it is warmup_steps: below 1 it is a share of the run"),
        (
            "training.eval_steps=5",
            "eval_steps: 5 goes by evaluations, and there are none; set training.eval_s",
        ),
        ("training.eval_steps=0", "training.eval_steps: must be greater than 0, not 0"),
        ("training.greater_is_better=true", "training.greater_is_better: True goes by evaluations, and there are none"),
        ("training.eval_strategy=stepps", "training.eval_strategy: 'stepps' is not valid; nearest is steps"),
        ("training.eval_strategy=steps", "training.eval_strategy: there are no held-out groups; name a split in data."),
        ("training.eval_on_start=true", "training.eval_on_start: there are no held-out groups; name a split in data."),
        (
            "training.evaluation_strategy=steps",
            "no argument of TrainingArguments; it is eval_strategy",
        ),
        ("training.eval_accumulation_steps=2", "an evaluation adds metrics up and keeps no predictions"),
        ("training.bf16_full_eval=true", "the policy is evaluated in the arithmetic that it trains in"),
        ("training.learning_rate=-1", "training.learning_rate: must be at least 0, not -1"),
        ("training.max_steps=-5", "training.max_steps: must be at least 1, not -5"),
        ("training.max_steps=0", "training.max_steps: must be at least 1, not 0"),
        ("training.num_train_epochs=0", "training.num_train_epochs: must be greater than 0, not 0"),
        ("training.optim=adamw_torhc", "training.optim: 'adamw_torhc' is not valid; nearest is adamw_torch"),
        ("training.lr_scheduler_type=cosin", "training.lr_scheduler_type: 'cosin' is not valid; nearest is cosine"),
        ("training.lr_scheduler_type=reduce_lr_on_plateau", "reduce_lr_on_plateau goes by evaluations, and there are"),
        ("training.save_strategy=best", "training.save_strategy: best goes by evaluations, and there are none"),
        ("objective.name=grpo", "objective.name: grpo: it is not there yet; valid are dpo, simpo, fpo"),
        ("objective.name=sigmoid", "objective.name: sigmoid: it is called dpo here"),
        ("objective={name: dpo, alpha: 1}", "objective.alpha: dpo has no such field, fpo has; another objective is"),
        ("objective={name: dpo, alpha: 1}", "is given whole: --set 'objective={name: dpo}'"),
        ("data.max_length=true", "data.max_length: must be a valid integer, not True"),
        ("data=pairs.jsonl", "data: must be a mapping of fields, not 'pairs.jsonl'"),
        ("reference.model", "--set reference.model: write it as section.field=value"),
        ("Data.source=x", "Data: no such field; nearest is data"),
        ("data.Source=x", "data.Source: no such field; nearest is source"),
        ("objective.Beta=1", "objective.Beta: no such field; nearest is beta"),
        ("cache.shard-pairs=1", "cache.shard-pairs: no such field; nearest is shard_pairs"),
        ("0=1", "0: no such field; valid are reference, features"),
        ("..=1", "no such field; valid are reference, features"),
        ("data.source=2026-99-99", "`2026-99-99` is no timestamp; for text, write it in quotes"),
        ("cache.seed=!!int five", "`five` is no int; for text, write it in quotes"),
        ("data.columns={question: prompt}", "our name comes first, write {prompt: question}"),
        (
            "data.columns.promt=question",
            "promt is no column of ours; our name comes first, write one of prompt, chosen",
        ),
        ("data.columns={prompt: a, chosen: a}", "data.columns: a is given for two columns"),
        ("data.columns=[question]", "data.columns: must be a mapping of fields, not ['question']"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_valid_value(tmp_path: Path, override: str, message: str) -> None:
    raw = {**MINIMAL, "objective": {"name": "fpo"}}
    path = written(tmp_path, yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value).splitlines()[0]


def test_what_sends_a_run_away_comes_from_the_command_line_and_is_written_nowhere(tmp_path: Path) -> None:
    stranger = {**MINIMAL, "training": {"push_to_hub": True, "hub_model_id": "stranger/model"}}
    with pytest.raises(RecipeError, match=r"push_to_hub: not from a file; .*: --set training\.push_to_hub=True"):
        load_recipe(written(tmp_path, yaml.safe_dump(stranger)))
    path = written(tmp_path, yaml.safe_dump(MINIMAL))
    own = load_recipe(path, ["training.push_to_hub=true", "training.hub_token=secret", "training.seed=3"])
    assert own.training["push_to_hub"] is True
    assert "secret" not in dump_recipe(own)
    assert yaml.safe_load(dump_recipe(own))["training"] == {"seed": 3}


def test_every_argument_of_transformers_is_ours_or_does_something() -> None:
    """A name that transformers no longer has cannot be refused by name; a new one must be looked at."""
    known = set(training_fields())
    assert set(OWNED_ARGUMENTS) - known == {"max_length"}
    assert set(PUBLISHING_ARGUMENTS) <= known
    assert not set(trl_names.ARGUMENTS) & known
    evaluation = {name for name in known if name.startswith("eval_") or "best" in name}
    works = {"eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end"}
    assert evaluation - set(OWNED_ARGUMENTS) == works | {"metric_for_best_model"}
    assert {"early_stopping_patience", "early_stopping_threshold"} <= known


def test_a_missing_section_is_named() -> None:
    with pytest.raises(RecipeError, match="data: this field is required"):
        validate_recipe({"reference": {"model": "m"}}, "test")


def test_a_mistyped_file_name_gets_the_nearest_one(tmp_path: Path) -> None:
    written(tmp_path, "a: 1")
    with pytest.raises(RecipeError, match=r"no such recipe; nearest is .*mine\.yaml"):
        load_recipe(tmp_path / "mien.yaml")


def test_yaml_errors_name_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="line 2, column"):
        load_recipe(written(tmp_path, "data: {\nsource: ]"))
    with pytest.raises(RecipeError, match="`model` is given twice"):
        load_recipe(written(tmp_path, "reference: {model: a, model: b}"))
    with pytest.raises(RecipeError, match="a recipe is a mapping of sections, this is a list"):
        load_recipe(written(tmp_path, "- a"))
    with pytest.raises(RecipeError, match="line 3, column 1: `data` is given twice"):
        load_recipe(written(tmp_path, "data: {source: a}\nreference: {model: b}\ndata: {source: c}"))
    with pytest.raises(RecipeError, match=r"line 2: the character '.*' is not allowed"):
        load_recipe(written(tmp_path, "data:\n  source: \x07"))


def test_a_file_that_is_no_recipe_is_refused_as_what_it_is(tmp_path: Path) -> None:
    for empty in ("", "# nothing yet\n", "null"):
        with pytest.raises(RecipeError, match="the recipe is empty; it needs reference and data at least"):
            load_recipe(written(tmp_path, empty))
    with pytest.raises(RecipeError, match="a recipe is a mapping of sections, this is plain text"):
        load_recipe(written(tmp_path, "hello"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# a\n# caf\xe9\nreference: {}\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml: line 2: not UTF-8"):
        load_recipe(path)


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    """Ten lines, each ten times the line above: ten billion values in 500 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(
        RecipeError, match=r"line 2, column 10: `\*a0` is an alias, which recipes do not have"
    ) as caught:
        load_recipe(written(tmp_path, "\n".join(lines)))
    assert "\n" not in str(caught.value)


def test_a_recipe_of_brackets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(written(tmp_path, "a: " + "[" * 10**5))


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "training: {learning_rate: 5e-7, weight_decay: 1E-2}\n"
    assert load_recipe(written(tmp_path, text)).training == {"learning_rate": 5e-7, "weight_decay": 1e-2}


def test_overrides_replace_values_and_create_sections(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["objective={name: simpo, gamma: 1}", "features.0.top_k=all", "cache.seed=3"])
    assert recipe.objective == Simpo(name="simpo", gamma=1.0)
    assert recipe.features[0].top_k == "all"
    assert recipe.cache.seed == 3


def test_several_hookpoints_need_a_choice_and_no_hookpoint_twice() -> None:
    two = [MINIMAL["features"][0], {**MINIMAL["features"][0], "hookpoint": "model.layers.5"}]
    with pytest.raises(RecipeError, match=r"objective\.hookpoints: say which of model\.layers\.3, model\.layers\.5"):
        validate_recipe({**MINIMAL, "features": two}, "test")
    chosen = {"name": "fpo", "hookpoints": ["model.layers.5"]}
    [entry] = validate_recipe({**MINIMAL, "features": two, "objective": chosen}, "test").constrained_features()
    assert entry.hookpoint == "model.layers.5"
    with pytest.raises(RecipeError, match=r"model\.layers\.3 is listed twice"):
        validate_recipe({**MINIMAL, "features": [two[0], two[0]]}, "test")


def test_an_objective_without_a_feature_term_needs_no_features() -> None:
    bare = {name: section for name, section in MINIMAL.items() if name != "features"}
    for objective in ({"name": "dpo"}, {"name": "simpo"}, {"name": "fpo", "alpha": 0}):
        assert validate_recipe({**bare, "objective": objective}, "test").constrained_features() == ()


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "dpo", "features": {"alpa": 1}}, r"objective\.features\.alpa: no such field; nearest is alpha"),
        ({"name": "dpo", "features": {"k": 99}}, r"objective\.features\.k: 99 features are asked for"),
        (
            {"name": "dpo", "features": {"hookpoints": ["model.layers.4"]}},
            r"hookpoints: model\.layers\.4 is not among",
        ),
        ({"name": "dpo", "features": {"include": []}}, r"objective\.features: .* leave no feature that counts"),
        ({"name": "dpo", "features": {"include": [1], "weights": {2: 3.0}}}, "weights name feature 2, which include"),
        (
            {"name": "mixture", "terms": [{"name": "sft"}], "features": {}},
            "no term of the mixture has a margin",
        ),
        ({"name": "mixture", "terms": [{"name": "dpo"}], "weights": [0.0]}, "none is below 0, and one is above it"),
        (
            {"name": "mixture", "terms": [{"name": "fpo", "alpha": 0}, {"name": "sft"}], "features": {"k": 99}},
            r"objective\.features\.k: 99",
        ),
        ({"name": "fpo", "features": {"alpha": 1}}, "fpo has the fields of a feature term as its own"),
        (
            {"name": "mixture", "terms": [{"name": "dpo"}, {"name": "simpo", "gama": 1}]},
            r"terms\[1\]\.gama: .* gamma",
        ),
        ({"name": "mixture", "terms": [{"name": "dp"}]}, r"objective\.terms\[0\]\.name: 'dp' is no .*nearest is dpo"),
        ({"name": "mixture", "terms": [{"name": "kto"}]}, r"terms\[0\]\.name: kto is no loss over pairs"),
        ({"name": "kto"}, r"cache\.mismatched: kto takes .*set it to true \(a column beside the cache: one pass"),
        ({"name": "kto", "pairs": "all"}, r"objective\.pairs: kto has no such field"),
        ({"name": "tdpo2"}, r"cache\.top_logits: tdpo2 takes .*a column beside the cache: one pass"),
    ],
)
def test_what_an_objective_cannot_be_given_is_refused_by_its_field(objective: dict[str, Any], said: str) -> None:
    """Nested fields too, in one line each."""
    with pytest.raises(RecipeError, match=said) as refusal:
        validate_recipe({**MINIMAL, "objective": objective}, "test")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_recipe_of_a_run_reads_back_whatever_the_objective(name: str) -> None:
    """It spells every default out."""
    given = {"name": name} | (
        {"terms": [{"name": "dpo"}, {"name": "sft"}, {"name": "adpo"}]} if name == "mixture" else {}
    )
    recipe = validate_recipe({**MINIMAL, "objective": given, "cache": {"top_logits": 4, "mismatched": True}}, "test")
    assert validate_recipe(yaml.safe_load(dump_recipe(recipe)), "test") == recipe


MIXED = {"model": "m", "autocast": "bfloat16"}
HALF = {"model": "m", "dtype": "bfloat16"}
ADAPTERS = {"dtype": "bfloat16", "lora": {"r": 4}}


@pytest.mark.parametrize(
    ("reference", "policy", "training"),
    [
        (MIXED, {}, {"bf16": True}),
        ({"model": "m", "autocast": "float16"}, {}, {"fp16": True}),
        ({"model": "m"}, {}, {"learning_rate": 1e-6}),
        (HALF, ADAPTERS, {"bf16": True}),
        (HALF, ADAPTERS, {"learning_rate": 1e-6}),
        (HALF, {}, {"bf16": True, "fsdp": "full_shard"}),
        (HALF, {"model": "another"}, {"bf16": True}),
        (HALF, {"same_arithmetic": False}, {"bf16": True}),
        (HALF, {}, {}),
    ],
)
def test_a_reference_in_the_policys_own_arithmetic_is_valid(
    reference: dict[str, Any], policy: dict[str, Any], training: dict[str, Any]
) -> None:
    """Also where the policy starts elsewhere, where the recipe says so, and where it does not say how it trains."""
    validate_recipe({**MINIMAL, "reference": reference, "policy": policy, "training": training}, "test")


@pytest.mark.parametrize(
    ("reference", "policy", "training", "wanted"),
    [
        (HALF, {}, {"bf16": True}, "set reference.dtype: float32 and reference.autocast: bfloat16"),
        ({"model": "m"}, {}, {"bf16": True}, "set reference.dtype: float32 and reference.autocast: bfloat16"),
        (MIXED, {}, {"fp16": True}, "set reference.dtype: float32 and reference.autocast: float16"),
        (MIXED, {}, {"learning_rate": 1e-6}, "set reference.dtype: float32,"),
        ({"model": "m"}, ADAPTERS, {"bf16": True}, "set reference.dtype: bfloat16,"),
        (MIXED, {}, {"bf16": True, "fsdp": "full_shard"}, "set reference.dtype: bfloat16,"),
    ],
)
def test_a_reference_in_another_arithmetic_than_training_is_refused_with_what_to_set(
    reference: dict[str, Any], policy: dict[str, Any], training: dict[str, Any], wanted: str
) -> None:
    raw = {**MINIMAL, "reference": reference, "policy": policy, "training": training}
    with pytest.raises(RecipeError, match="would stand in every logratio") as caught:
        validate_recipe(raw, "test")
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    validate_recipe({**raw, "objective": {"name": "simpo"}}, "test")


def test_a_dumped_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = validate_recipe({**MINIMAL, "training": {"learning_rate": 5e-7}}, "test")
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("path", READY, ids=lambda p: p.name)
def test_every_ready_recipe_is_valid_and_begins_with_its_command(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith(f"# fpo align recipes/{path.name}")
    assert isinstance(load_recipe(path), Recipe)


def test_every_field_is_documented() -> None:
    def sections(model: Any) -> list[Any]:
        return [model, *(sub for sub in model.__subclasses__() for sub in sections(sub))]

    undocumented = [
        f"{model.__name__}.{name}"
        for model in sections(Section)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


@pytest.mark.parametrize("path", READY, ids=lambda p: p.name)
def test_every_ready_recipe_fits_the_schema_for_editors(path: Path) -> None:
    jsonschema.validate(parse_yaml(path.read_text(encoding="utf-8"), path.name), recipe_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": {"name": "fpo", "betta": 1}},
        {"objective": {"name": "fpoo"}},
        {"reference": {"model": "m", "dtype": "bf16"}},
        {"features": [{"sae": "some/sae", "hookpoint": "model.layers.3", "top_k": "al"}]},
        {"training": {"learning_rte": 1e-6}},
        {"training": {"output_dir": "x"}},
    ],
    ids=str,
)
def test_what_the_recipe_refuses_the_schema_refuses(wrong: dict[str, Any]) -> None:
    jsonschema.validate(MINIMAL, recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**MINIMAL, **wrong}, recipe_schema())


def test_the_reference_page_is_the_one_in_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run `make docs`"
