"""Several values for a field are several recipes: which commas separate them, what their runs are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from test_recipe import MINIMAL

from fpo.errors import RecipeError
from fpo.recipe import load_recipe, load_variants
from fpo.recipe.parsing import parse_yaml, split_values, write_yaml

COLUMNS = [{"sae": "some/sae", "hookpoint": f"model.layers.{n}", "top_k": 64} for n in (3, 5)]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "objective": {"name": "fpo"}}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.5,1", ["0.1", "0.5", "1"]),
        ("0.1, 0.5", ["0.1", "0.5"]),
        ("1", ["1"]),
        ("", [""]),
        ("{name: dpo, beta: 0.1}", ["{name: dpo, beta: 0.1}"]),
        ("{name: dpo, beta: 0.1},{name: simpo}", ["{name: dpo, beta: 0.1}", "{name: simpo}"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[1, 2],[2, null]", ["[1, 2]", "[2, null]"]),
        ("[[1, 2], {a: [3, 4]}]", ["[[1, 2], {a: [3, 4]}]"]),
        ("'a,b'", ["'a,b'"]),
        ('"a,b","c"', ['"a,b"', '"c"']),
        (r'"a \", b", c', [r'"a \", b"', "c"]),
        ("'it''s, so', c", ["'it''s, so'", "c"]),
        ("it's,that's", ["it's", "that's"]),
        ("{a: 'x, y]'}, b", ["{a: 'x, y]'}", "b"]),
        ("train[:50%],train[50%:]", ["train[:50%]", "train[50%:]"]),
        ("a],b", ["a]", "b"]),
        ("[1, 2", ["[1, 2"]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@given(st.lists(VALUES, min_size=1, max_size=3))
@example(["12e4567"])
def test_what_yaml_writes_in_one_line_is_one_value_whatever_it_holds(written: list[object]) -> None:
    """Mappings, lists and quoted texts, some with commas, brackets and quotes of their own."""
    texts = [write_yaml([value], default_flow_style=True, width=10**6).strip()[1:-1] for value in written]
    texts = [text if text else '""' for text in texts]
    assert [parse_yaml(text, "x") for text in split_values(",".join(texts))] == written


def test_two_fields_with_several_values_are_their_product(mine: Path) -> None:
    variants = load_variants(mine, ["objective.alpha=0.1,1", "cache.seed=3", "training.seed=1,2"])
    assert [variant.swept for variant in variants] == [
        {"objective.alpha": alpha, "training.seed": seed} for alpha in ("0.1", "1") for seed in ("1", "2")
    ]
    last = variants[-1]
    assert last.overrides == ["objective.alpha=1", "cache.seed=3", "training.seed=2"]
    assert last.recipe == load_recipe(mine, last.overrides)
    assert (last.recipe.objective.alpha, last.recipe.cache.seed, last.recipe.training["seed"]) == (1.0, 3, 2)
    assert last.values == {"objective.alpha": 1, "training.seed": 2}


def test_one_value_for_every_field_is_one_recipe(mine: Path) -> None:
    for overrides in ([], ["objective={name: dpo, beta: 0.1}"], ["data.turns=[1, 2]", "data.score=assistant"]):
        [variant] = load_variants(mine, overrides)
        assert (variant.recipe, variant.swept) == (load_recipe(mine, overrides), {})


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["objective.alpha=.5,1.0"], ["objective.alpha=0.5", "objective.alpha=1"]),
        (["training.learning_rate=5.0e-7,1E-6"], ["training.learning_rate=5e-7", "training.learning_rate=1e-6"]),
        (["training.weight_decay=1e9,1234567"], ["training.weight_decay=1e9", "training.weight_decay=1234567"]),
        (["policy.same_arithmetic=no,true"], ["policy.same_arithmetic=false", "policy.same_arithmetic=true"]),
        (["policy.lora=null,{r: 4, alpha: 8}"], ["policy.lora=null", "policy.lora=r-4-alpha-8"]),
        (["policy.model=../a b/c,owner/été"], ["policy.model=..-a-b-c", "policy.model=owner-t"]),
        (
            ["objective={name: dpo},{name: simpo, beta: 2}", "training.seed=1,2"],
            [f"objective=name-{o}__training.seed={s}" for o in ("dpo", "simpo-beta-2") for s in (1, 2)],
        ),
    ],
)
def test_a_run_is_named_by_its_values_in_letters_that_every_file_system_has(
    mine: Path, overrides: list[str], names: list[str]
) -> None:
    assert [variant.name for variant in load_variants(mine, overrides)] == names


def test_a_long_name_ends_in_a_digest(mine: Path) -> None:
    """A component of a path has 255 bytes at most."""
    long, longer = (variant.name for variant in load_variants(mine, [f"policy.model={'x' * 300},{'x' * 301}"]))
    assert len(long) == len(longer) == 200
    assert long[:-9] == longer[:-9] == f"policy.model={'x' * 300}"[:191]
    assert long != longer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.alpha=0.1,"], "--set objective.alpha=0.1,: a value between the commas is empty"),
        (["objective.alpha=1,1.0"], "two runs of this sweep would be one, objective.alpha=1; give every value once"),
        (["objective.alpha=1,2", "objective.alpha=3"], "two runs of this sweep would be one, objective.alpha=3"),
        (["policy.model=a/b,A b"], "two runs of this sweep would be one, policy.model=a-b"),
        (["objective.alpha=1,x"], "objective.alpha: must be a valid number, not 'x'"),
        (["training.learning_rate=1,fast"], "training.learning_rate: must be a valid number"),
        (["data.max_length=64,128"], "--set data.max_length: a sweep trains from one cache, and 64, 128 need several"),
        (["reference.dtype=float32,bfloat16"], "--set reference.dtype: a sweep trains from one cache"),
        (["training.seed=1,2", "cache.seed=1,2"], "--set cache.seed: a sweep trains from one cache, and 1, 2 need"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(mine: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_variants(mine, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_beside_the_one_cache_may_differ(mine: Path) -> None:
    texts = [yaml.safe_dump([column], default_flow_style=True).strip() for column in COLUMNS]
    variants = load_variants(mine, [f"features={','.join(texts)}"])
    assert [variant.recipe.features[0].hookpoint for variant in variants] == ["model.layers.3", "model.layers.5"]


def test_a_command_that_takes_one_recipe_refuses_several_values(mine: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(mine, ["data.source=a,b.jsonl"])
    assert str(caught.value) == (
        "--set data.source=a,b.jsonl: several values are a sweep, which fpo align alone trains; a text that holds a "
        "comma goes in quotes: --set 'data.source=\"a,b.jsonl\"'"
    )
    assert load_recipe(mine, ['data.source="a,b.jsonl"']).data.source == "a,b.jsonl"
