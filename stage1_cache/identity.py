"""
The cache key of a recipe: what decides the numbers, and nothing else. Paths, names, batch size, device and
library versions are not in it, nor anything of policy, objective or training.

No model is loaded here. Digests of big files and of the tokenised pairs are remembered, so a second call costs
seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from fpo.errors import DataError, ModelError, RecipeError
from fpo.memo import forget, remember
from fpo.recipe import Feature, Recipe, Reference
from fpo.scoring import (
    adapter_folder,
    adapter_weight_files,
    load_tokenizer,
    model_config,
    model_folder,
    positions,
    significant_config,
    weight_files,
)
from fpo.scoring.hookpoints import canonical_hookpoint, check_hookpoint, same_hookpoint
from fpo.scoring.sae.formats import SaeFacts, sae_config, sae_facts, sae_weight_files
from fpo.scoring.weights import file_digest, weights_digest
from fpo.stage1_cache.read import data_fingerprint, read_groups
from fpo.stage1_cache.tokenise import TOKENISE_RULES, TokenisedGroups, tokenise, tokenizer_identity
from fpo.store import FORMAT_VERSION, pair_digests, pairs_digest, plan_shards, shard_digest

# Completions of `top_k: all` are counted at this many features per token where a shard is closed by its size.
_FEATURES_PER_TOKEN = 100


@dataclass(frozen=True)
class CacheIdentity:
    """One cache that a recipe asks for: the pairs of one split."""

    recipe: Recipe
    split: str

    @cached_property
    def scorer(self) -> dict[str, Any]:
        """The part of the key that says how pairs are scored."""
        reference = self.recipe.reference
        config = reference_config(reference)
        adapter = None if reference.adapter is None else adapter_folder(reference.adapter)
        return {
            "reference": {
                "weights": weights_digest(weight_files(model_folder(reference.model, reference.revision))),
                "config": significant_config(config),
                "dtype": reference.dtype,
                # Not spelled where it is off.
                **({} if reference.autocast is None else {"autocast": reference.autocast}),
                "adapter": None if adapter is None else _adapter_identity(adapter),
            },
            "vocab_size": config.get_text_config().vocab_size,
            "features": [_feature_identity(feature) for feature in self.recipe.features],
            "extras": {"top_logits": self.recipe.cache.top_logits},
        }

    @cached_property
    def remembered(self) -> dict[str, Any]:
        """`pairs` (the other part of the key) and `drops`, from memory where files and rules are unchanged."""
        return remember(self._asked(), self._pairs_and_drops, self._asked)

    def _asked(self) -> dict[str, Any]:
        """What decides the tokens, without reading the data: the question that the memo answers."""
        data, options = self.recipe.data, self.recipe.cache
        name, revision = tokenizer_source(self.recipe)
        return {
            "what": "tokenised pairs, digest by shard",
            "format": FORMAT_VERSION,
            "data": data_fingerprint(data.source, self.split, data.subset, data.revision),
            "tokenizer": tokenizer_identity(name, revision=revision, chat_template=data.chat_template),
            "columns": data.columns,
            "rules": TOKENISE_RULES,
            "today": data.today,
            "score": [data.score, data.turns, data.as_messages],
            "max_length": data.max_length,
            "shard_pairs": options.shard_pairs,
            "seed": options.seed,
            "kept": [[facts.d_sae, feature.top_k] for facts, feature in self._features()],
            "top_logits": options.top_logits,
        }

    @property
    def key_recipe(self) -> dict[str, Any]:
        """What recipe.json holds and the key is the digest of."""
        return {"format": FORMAT_VERSION, "scorer": self.scorer, "pairs": self.remembered["pairs"]}

    @cached_property
    def tokens(self) -> TokenisedGroups:
        """The groups as token ids; reads the data."""
        data = self.recipe.data
        name, revision = tokenizer_source(self.recipe)
        dataset, columns = read_groups(data.source, self.split, data.subset, data.revision, data.columns)
        tokens = tokenise(
            dataset,
            load_tokenizer(name, revision),
            data.max_length,
            chat_template=data.chat_template,
            today=data.today,
            score=data.score,
            turns=data.turns,
            as_messages=data.as_messages,
        )
        tokens.drops.of_columns(*columns)
        if (tokens.n_completions != 2).any() or tokens.score_mask is not None:
            raise DataError(f"{data.source}: a cache holds pairs of which every token counts; use such a dataset")
        return tokens

    @cached_property
    def digests(self) -> np.ndarray:
        """(P, 16) digest of every pair, in dataset order; the report of the drops then counts those that repeat."""
        digests = pair_digests(self.tokens.input_ids, self.tokens.splits)
        for repeat in _repeats(digests):
            self.tokens.drops.note("repeated", int(self.tokens.group_id[repeat]))
        return digests

    def check_tokens(self) -> None:
        """
        RecipeError for a sequence longer than the reference has positions, or a token that it does not know;
        DataError where the tokens are not those that the key names.
        """
        named, made = self.remembered["pairs"]["digest"], self._pairs_digest()
        if made != named:
            forget(self._asked())
            raise DataError(
                f"{self.recipe.data.source}, split {self.split!r}: the same data, tokenizer and chat template gave "
                f"other tokens than before (digest {named[:12]}, now {made[:12]}), so the key would name what is not "
                "scored\n  run the same command again: what was remembered is dropped\n  if this comes back, chat "
                "template or tokenizer give other tokens every time; set data.chat_template or data.tokenizer"
            )
        config = reference_config(self.recipe.reference)
        vocabulary = config.get_text_config().vocab_size
        if len(self.tokens) and int(self.tokens.input_ids.max()) >= vocabulary:
            raise RecipeError(
                f"data.tokenizer: it gives token {self.tokens.input_ids.max()}, {self.recipe.reference.model} knows "
                f"{vocabulary} tokens"
            )
        limit = positions(config)
        lengths = pair_lengths(self.tokens)
        sizes = lengths[:, 0] + lengths[:, 1:].max(1)
        if limit is not None and len(sizes) and sizes.max() > limit:
            raise RecipeError(
                f"data.max_length: null cuts nothing, and row {self.tokens.group_id[sizes.argmax()]} has {sizes.max()} "
                f"tokens, more than the {limit} positions of {self.recipe.reference.model}; set it to {limit} or less"
            )

    def plan(self) -> list[np.ndarray]:
        """Which pairs (positions in `tokens`) each shard holds."""
        lengths = pair_lengths(self.tokens)
        options = self.recipe.cache
        scored = lengths[:, 1:].sum(1)
        per_pair = np.zeros(len(lengths), np.int64)
        for facts, feature in self._features():
            if feature.top_k == "all":
                per_pair += 8 * np.minimum(2 * facts.d_sae, _FEATURES_PER_TOKEN * scored)
            else:
                per_pair += 16 * min(feature.top_k, facts.d_sae)
        per_pair += 8 * options.top_logits * scored
        return plan_shards(lengths, per_pair, seed=options.seed, max_pairs=options.shard_pairs)

    def _features(self) -> list[tuple[SaeFacts, Feature]]:
        return [(sae_facts(feature.sae, feature.hookpoint), feature) for feature in self.recipe.features]

    def _pairs_digest(self) -> str:
        return pairs_digest(shard_digest(self.tokens.group_id[rows], self.digests[rows]) for rows in self.plan())

    def _pairs_and_drops(self) -> dict[str, Any]:
        return {
            "pairs": {
                "digest": self._pairs_digest(),
                "n_pairs": len(self.tokens),
                "seed": self.recipe.cache.seed,
                "shard_pairs": [len(rows) for rows in self.plan()],
            },
            "drops": self.tokens.drops.as_dict(),
        }


def pair_lengths(tokens: TokenisedGroups) -> np.ndarray:
    """(P, 3) tokens of prompt, chosen, rejected."""
    return np.diff(tokens.splits.astype(np.int64)).reshape(-1, 3)


def _repeats(digests: np.ndarray) -> np.ndarray:
    """Positions of the pairs whose digest an earlier one has, ascending."""
    _, firsts = np.unique(digests, axis=0, return_index=True)
    return np.setdiff1d(np.arange(len(digests)), firsts)


def shared_pairs(one: CacheIdentity, other: CacheIdentity) -> int:
    """How many pairs of `one` stand in `other` too, token for token; remembered."""

    def count() -> dict[str, Any]:
        theirs = set(map(bytes, other.digests))
        return {"shared": sum(bytes(digest) in theirs for digest in one.digests)}

    digests = [identity.remembered["pairs"]["digest"] for identity in (one, other)]
    return int(remember({"what": "shared pairs", "digests": digests}, count)["shared"])


def cache_identities(recipe: Recipe) -> list[CacheIdentity]:
    """The caches that a recipe asks for: the training split's, then the held-out split's if there is one."""
    splits = [recipe.data.split] + ([recipe.data.eval_split] if recipe.data.eval_split else [])
    return [CacheIdentity(recipe, split) for split in splits]


def check_inputs(recipe: Recipe) -> None:
    """
    Everything about a recipe that can be refused from headers and config files alone, before anything heavy
    loads: model folder, length, hookpoints, SAE files and widths, data files and columns.

    Raises RecipeError naming the field; other FpoErrors name the file.
    """
    with _naming("reference.model"):
        config = reference_config(recipe.reference)
    limit, length = positions(config), recipe.data.max_length
    if limit is not None and length is not None and length > limit:
        raise RecipeError(f"data.max_length: {length} is more than the {limit} positions of {recipe.reference.model}")
    if recipe.reference.adapter is not None:
        with _naming("reference.adapter"):
            adapter_folder(recipe.reference.adapter)
    vocabulary = config.get_text_config().vocab_size
    if recipe.cache.top_logits > vocabulary:
        raise RecipeError(f"cache.top_logits: {recipe.cache.top_logits} is more than the {vocabulary} tokens there are")
    width = config.get_text_config().hidden_size
    for index, feature in enumerate(recipe.features):
        try:
            check_hookpoint(config.to_dict(), feature.hookpoint)
        except ModelError as error:
            raise RecipeError(f"features[{index}].hookpoint: {error}") from None
        facts = sae_facts(feature.sae, feature.hookpoint)
        if facts.d_in != width:
            raise RecipeError(
                f"features[{index}].sae: {feature.sae} reads {facts.d_in} numbers per token, "
                f"{feature.hookpoint} of {recipe.reference.model} gives {width}"
            )
        # A hint that is no module's path fits no hookpoint: the SAE reads something that no module gives.
        if feature.self_check and facts.hook_hint and not same_hookpoint(facts.hook_hint, feature.hookpoint):
            raise RecipeError(
                f"features[{index}].hookpoint: {feature.sae} says that it reads {facts.hook_hint}, the recipe says "
                f"{feature.hookpoint}; mend it, or set self_check: false in this entry to go on regardless"
            )
        if feature.top_k != "all" and feature.top_k > facts.d_sae:
            raise RecipeError(f"features[{index}].top_k: {feature.top_k} is more than the SAE's {facts.d_sae} features")
    for identity in cache_identities(recipe):
        data_fingerprint(recipe.data.source, identity.split, recipe.data.subset, recipe.data.revision)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Puts the recipe's field in front of what is wrong with the files that it names."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from None


def reference_config(reference: Reference) -> PretrainedConfig:
    """The reference's configuration, resolved."""
    return model_config(model_folder(reference.model, reference.revision))


def tokenizer_source(recipe: Recipe) -> tuple[str, str | None]:
    """Name and revision of the tokenizer: the recipe's own, or the reference's."""
    if recipe.data.tokenizer is not None:
        return recipe.data.tokenizer, None
    return recipe.reference.model, recipe.reference.revision


def _adapter_identity(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    noise = (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "lora_dropout",
    )
    return {
        "weights": weights_digest(adapter_weight_files(folder)),
        "config": spelled({name: value for name, value in config.items() if name not in noise}),
    }


def _feature_identity(feature: Feature) -> dict[str, Any]:
    facts = sae_facts(feature.sae, feature.hookpoint)
    files = sae_weight_files(feature.sae, feature.hookpoint)
    is_npz = files[0].suffix == ".npz"
    return {
        "hookpoint": canonical_hookpoint(feature.hookpoint),
        "sae": {
            "weights": file_digest(files[0]) if is_npz else weights_digest(files),
            "config": sae_config(feature.sae, feature.hookpoint),
        },
        "d_sae": facts.d_sae,
        "top_k": feature.top_k,
        "pooling": "mean",
    }


def spelled(value: Any) -> Any:
    """The value with floats as their shortest decimal: a key holds no floats."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(name): spelled(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(item) for item in value]
    return value
