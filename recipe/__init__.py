"""
The recipe: one YAML file that describes an experiment, both stages.

`reference`, `features`, `data` and `cache` decide what is computed in stage 1 and therefore the cache
key; `policy`, `objective` and `training` never do. This package is the one place that says what a field
is: the docstring under a field is its documentation (`docs/recipe.md` is printed from it), and every
field is checked here before a model or data is touched.

    sections    its parts                     loading       from the file, with overrides; and back
    experiment  the whole, what fits          sweep         several values for a field: several recipes
    arithmetic  what a forward computes in    parsing       YAML
    training    TrainingArguments             explanations  what is wrong, with the nearest valid name
    evaluation  what needs held-out groups    page          docs/recipe.md, the schema for editors
"""

from fpo.recipe.arithmetic import MIXED_PRECISION, Arithmetic, Dtype, HalfDtype, training_arithmetic
from fpo.recipe.evaluation import evaluates, goes_by_evaluations, reads_held_out
from fpo.recipe.experiment import Recipe, check_arithmetic
from fpo.recipe.loading import dump_recipe, load_recipe, validate_recipe
from fpo.recipe.page import recipe_schema, reference_page
from fpo.recipe.sections import (
    CacheOptions,
    Data,
    Feature,
    Filter,
    Generate,
    Lora,
    Policy,
    Prompt,
    Reference,
    Source,
    Transform,
)
from fpo.recipe.sweep import Variant, load_variants
from fpo.recipe.training import OWNED_ARGUMENTS, PUBLISHING_ARGUMENTS

__all__ = [
    "MIXED_PRECISION",
    "OWNED_ARGUMENTS",
    "PUBLISHING_ARGUMENTS",
    "Arithmetic",
    "CacheOptions",
    "Data",
    "Dtype",
    "Feature",
    "Filter",
    "Generate",
    "HalfDtype",
    "Lora",
    "Policy",
    "Prompt",
    "Recipe",
    "Reference",
    "Source",
    "Transform",
    "Variant",
    "check_arithmetic",
    "dump_recipe",
    "evaluates",
    "goes_by_evaluations",
    "load_recipe",
    "load_variants",
    "reads_held_out",
    "recipe_schema",
    "reference_page",
    "training_arithmetic",
    "validate_recipe",
]
