"""
The keys of what a recipe asks for, a cache and its columns: what decides the numbers, and nothing else. Paths, names,
batch size, device and library versions are not in them, nor anything of policy, objective or training.

No model is loaded here. Digests of big files and of the tokenised groups are remembered, so a second call costs
seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from fpo.errors import DataError, ModelError, RecipeError
from fpo.memo import forget, remember
from fpo.recipe import Feature, Recipe, Reference, Source
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
from fpo.scoring.hookpoints import canonical_hookpoint, hookpoint_width, same_hookpoint
from fpo.scoring.sae import sae_config, sae_facts, sae_weights_digest
from fpo.scoring.weights import weights_digest
from fpo.stage1_cache.places import with_module_paths
from fpo.stage1_cache.read import data_fingerprint, read_column, read_groups, side_of_prompts
from fpo.stage1_cache.shared import SharedTokens
from fpo.stage1_cache.tokenise import TOKENISE_RULES, Part, TokenisedGroups, tokenise, tokenizer_identity
from fpo.stage1_cache.transforms import Transforms
from fpo.store import (
    FORMAT_VERSION,
    Groups,
    Spec,
    Store,
    TokenLogps,
    Wanting,
    cache_key,
    column_name,
    column_recipe,
    completion_digests,
    cut_shards,
    groups_digest,
    plan_shards,
    shard_digest,
)
from fpo.store.format.arrays import MAX_RAW_BYTES
from fpo.store.format.groups import group_sizes, scored_splits, segment_lengths, segments_of, summed_logps
from fpo.store.format.ragged import I64, gather, lengths_of, starts_of

# Completions of `top_k: all` are counted at this many features per token where a shard is closed by its size.
_FEATURES_PER_TOKEN = 100


@dataclass(frozen=True)
class CacheIdentity:
    """One cache that a recipe asks for: the groups of one split, and columns beside them."""

    recipe: Recipe
    held_out: bool = False
    """Whether it is the held-out groups' cache."""
    store: Store | None = None
    """Whose processes share the token ids; None shares them with nobody."""

    @property
    def split(self) -> str:
        """What its groups are called. Of held-out ones there must be some."""
        data = self.recipe.data
        if not self.held_out:
            return ", ".join(dict.fromkeys(str(one.split) for one in data.sources))
        assert data.held_out_split is not None
        return data.held_out_split

    @property
    def named_data(self) -> str:
        """For messages."""
        return f"{', '.join(source.source for source, _ in self.sources)}, split {self.split!r}"

    @property
    def sources(self) -> list[tuple[Source, str]]:
        """What is read, and of each its split: one, or of several those that have one of this side."""
        data = self.recipe.data
        if self.held_out and data.held_out is None:
            return [(one, one.eval_split) for one in data.sources if one.eval_split is not None]
        return [(one, str(one.split)) for one in data.sources]

    def column(self, name: str) -> list[str]:
        """
        What a column of the data says of every row, as text, by the number that its groups have; `origin` is what the
        source is called, where no column is. Raises DataError where there is no such column.
        """
        copies, found = Transforms(self.recipe.data.transform).copies, list[str]()
        for source, split in self.sources:
            said = read_column(source.source, split, name, source.subset, source.revision, origin=source.name)
            found += said * copies
        return found

    @cached_property
    def scorer(self) -> dict[str, Any]:
        """The part of the key that says how groups are scored."""
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
                **({} if reference.scored_by is None else {"scored_by": reference.scored_by}),
            },
            "vocab_size": self.vocab_size,
        }

    @cached_property
    def vocab_size(self) -> int:
        """Tokens that the reference knows."""
        return int(reference_config(self.recipe.reference).get_text_config().vocab_size)

    @cached_property
    def specs(self) -> list[Spec]:
        """The columns that the recipe asks for beside the base, its features first and in their order."""
        options = self.recipe.cache
        features = [feature_spec(feature) for feature in self.recipe.features]
        specs = [{"kind": "features", **feature} for feature in features]
        if options.prompt_features:
            specs += [{"kind": "prompt_features", **feature} for feature in features]
        if options.top_logits:
            specs.append({"kind": "top_logits", "m": options.top_logits, "vocab_size": self.vocab_size})
        if options.hidden_gram:
            specs.append({"kind": "hidden_gram"})
        if options.mismatched:
            specs.append({"kind": "mismatched", "vocab_size": self.vocab_size})
        return specs

    @cached_property
    def remembered(self) -> dict[str, Any]:
        """`groups` (the other part of the key) and `drops`, from memory where files and rules are unchanged."""
        return remember(self._asked(), self._groups_and_drops, self._asked)

    def _asked(self) -> dict[str, Any]:
        """What decides tokens and shards, without reading the data: the question that the memo answers."""
        options = self.recipe.cache
        return {
            **self._asked_of_tokens(),
            "what": "tokenised groups, digest by shard, with how lengths and scores are spread",
            "format": FORMAT_VERSION,
            "shard_pairs": options.shard_pairs,
            "seed": options.seed,
        }

    def _asked_of_tokens(self) -> dict[str, Any]:
        """What decides the tokens, without reading the data."""
        data = self.recipe.data
        name, revision = tokenizer_source(self.recipe)
        return {
            "what": "token ids of groups",
            "data": [
                {
                    **data_fingerprint(source.source, split, source.subset, source.revision),
                    "columns": source.columns,
                    "weight": repr(source.weight),
                }
                for source, split in self.sources
            ],
            "held_out": data.held_out and [repr(data.held_out), self.held_out],
            "tokenizer": tokenizer_identity(name, revision=revision, chat_template=data.chat_template),
            "on_bad_row": data.on_bad_row,
            "rules": TOKENISE_RULES,
            "today": data.today,
            "score": [data.score, data.turns, data.as_messages],
            "transform": data.transform and data.transform.model_dump(),
            "max_length": data.max_length,
        }

    @property
    def key_recipe(self) -> dict[str, Any]:
        """What recipe.json holds and the key is the digest of."""
        return {"format": FORMAT_VERSION, "scorer": self.scorer, "groups": self.remembered["groups"]}

    def column_recipe(self, spec: Spec) -> dict[str, Any]:
        """The same of a column; reads the data, since what it takes decides how its shards are cut."""
        shards = [int(n) for n in self.remembered["groups"]["shard_groups"]]
        n_bytes = self._column_bytes(spec)[self.order]
        if spec.get("top_k") != "all" and n_bytes.max(initial=0) > MAX_RAW_BYTES:
            raise RecipeError(
                f"{column_name(spec)}: the largest group would take {n_bytes.max() / 2**20:,.0f} MiB of it, a shard "
                f"holds {MAX_RAW_BYTES // 2**20}; ask for less of it (cache.top_logits), or lower data.max_length"
            )
        return column_recipe(cache_key(self.key_recipe), spec, cut_shards(shards, n_bytes))

    @cached_property
    def tokens(self) -> TokenisedGroups:
        """The groups as token ids; reads the data, unless a process of the store has done so."""
        return self._tokenised(None, None) if self._shared is None else self._shared.get(self._tokenised)

    @cached_property
    def _shared(self) -> SharedTokens | None:
        return None if self.store is None else SharedTokens(self.store, self._asked_of_tokens)

    def _tokenised(self, folder: Path | None, sign_of_life: Callable[[], None] | None) -> TokenisedGroups:
        data = self.recipe.data
        name, revision = tokenizer_source(self.recipe)
        drop_bad = data.on_bad_row == "drop"
        keep = None if data.held_out is None else side_of_prompts(data.held_out, self.held_out)
        read = [
            read_groups(one.source, split, one.subset, one.revision, one.columns, drop_bad=drop_bad)
            for one, split in self.sources
        ]
        tokens = tokenise(
            [
                Part(
                    rows.dataset,
                    bad=rows.bad if drop_bad else None,
                    name=source.source if len(read) > 1 else "",
                    weight=source.weight,
                    keep=keep,
                )
                for rows, (source, _) in zip(read, self.sources, strict=True)
            ],
            load_tokenizer(name, revision),
            data.max_length,
            chat_template=data.chat_template,
            today=data.today,
            score=data.score,
            turns=data.turns,
            as_messages=data.as_messages,
            transform=data.transform,
            folder=folder,
            sign_of_life=sign_of_life,
        )
        prompts = dict.fromkeys(rows.columns.prompt for rows in read if rows.columns.prompt)
        unused = dict.fromkeys(name for rows in read for name in rows.columns.unused)
        tokens.drops.of_columns(", ".join(prompts) or None, unused)
        return tokens

    @cached_property
    def digests(self) -> np.ndarray:
        """
        (K, 16) digest of every completion, in dataset order; the report of the drops then counts groups that repeat.
        """
        tokens = self.tokens
        digests = completion_digests(tokens.input_ids, tokens.splits, tokens.n_completions, tokens.score_mask)
        for repeat in _repeats(_by_group(digests, tokens.n_completions)):
            tokens.drops.note("repeated", int(tokens.group_id[repeat]))
        return digests

    @cached_property
    def completion_starts(self) -> np.ndarray:
        """(G+1,) where the completions of each group start."""
        return starts_of(self.tokens.n_completions)

    @cached_property
    def lengths(self) -> tuple[I64, I64]:
        """Tokens of every prompt (G,) and of every completion (K,)."""
        return segment_lengths(self.tokens.splits, self.tokens.n_completions)

    @cached_property
    def sizes(self) -> I64:
        """(K,) tokens of every completion with its prompt."""
        prompts, completions = self.lengths
        return np.asarray(np.repeat(prompts, self.tokens.n_completions) + completions, dtype=np.int64)

    def wanting(self, rows: np.ndarray) -> Wanting:
        """What a shard of these groups needs."""
        completions, _ = gather(self.completion_starts, rows)
        return Wanting(self.digests[completions], self.tokens.n_completions[rows])

    def check_tokens(self) -> None:
        """
        RecipeError for a sequence longer than the reference has positions, or a token that it does not know;
        DataError where the tokens are not those that the key names.
        """
        named, made = self.remembered["groups"]["digest"], self._groups_digest()
        if made != named:
            forget(self._asked())
            if self._shared is not None:
                self._shared.forget()
            raise DataError(
                f"{self.named_data}: the same data, tokenizer and chat template gave "
                f"other tokens than before (digest {named[:12]}, now {made[:12]}), so the key would name what is not "
                "scored\n  run the same command again: what was remembered is dropped\n  if this comes back, chat "
                "template or tokenizer give other tokens every time; set data.chat_template or data.tokenizer"
            )
        config, vocabulary = reference_config(self.recipe.reference), self.vocab_size
        if len(self.tokens) and int(self.tokens.input_ids.max()) >= vocabulary:
            raise RecipeError(
                f"data.tokenizer: it gives token {self.tokens.input_ids.max()}, {self.recipe.reference.model} knows "
                f"{vocabulary} tokens"
            )
        limit = positions(config)
        sizes = self.sizes
        if limit is not None and len(sizes) and sizes.max() > limit:
            row = int(np.repeat(self.tokens.group_id, self.tokens.n_completions)[sizes.argmax()])
            raise RecipeError(
                f"data.max_length: null cuts nothing, and row {row} has {sizes.max()} "
                f"tokens, more than the {limit} positions of {self.recipe.reference.model}; set it to {limit} or less"
            )

    @cached_property
    def plan(self) -> list[np.ndarray]:
        """Which groups (positions in `tokens`) each shard holds; columns decide nothing of it."""
        tokens, options = self.tokens, self.recipe.cache
        n_tokens = group_sizes(tokens.splits, tokens.n_completions)
        return plan_shards(n_tokens, tokens.n_completions, seed=options.seed, max_groups=options.shard_pairs)

    @property
    def order(self) -> np.ndarray:
        """(G,) the groups (positions in `tokens`) in the order of the cache."""
        return np.concatenate([np.empty(0, np.int64), *self.plan])

    def labels(self, rows: np.ndarray) -> Labelled:
        """What the base says of these groups beside log-probs."""
        tokens = self.tokens
        completions, _ = gather(self.completion_starts, rows)
        at, splits = gather(tokens.splits, segments_of(tokens.n_completions, rows))
        scored = gather(self.scored_splits, completions)[0]
        return Labelled(
            group_id=tokens.group_id[rows],
            n_completions=tokens.n_completions[rows],
            completion_digest=self.digests[completions],
            input_ids=tokens.input_ids[at],
            splits=splits,
            score=tokens.score[completions],
            weight=tokens.weight[rows],
            score_mask=None if tokens.score_mask is None else tokens.score_mask[scored],
        )

    @cached_property
    def scored_splits(self) -> np.ndarray:
        """(K+1,) where the scored tokens of each completion start."""
        return scored_splits(self.tokens.splits, self.tokens.n_completions)

    @cached_property
    def scored_tokens(self) -> np.ndarray:
        """(G,) scored tokens of every group."""
        return _summed(lengths_of(self.scored_splits), self.completion_starts)

    @cached_property
    def answered_before(self) -> I64:
        """
        (G,) the nearest group before each in the dataset that has another prompt; before the first stands the last.
        Raises DataError where all prompts are one.
        """
        tokens = self.tokens
        starts = tokens.splits[starts_of(tokens.n_completions.astype(np.int64) + 1)[:-1]].astype(np.int64)
        ends = starts + self.lengths[0]
        known: dict[bytes, int] = {}
        prompts = [
            known.setdefault(tokens.input_ids[start:end].tobytes(), len(known))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        changed = np.flatnonzero(np.array(prompts) != np.roll(prompts, 1))
        if len(changed) == 0:
            raise DataError(
                f"cache.mismatched: {self.named_data} has one prompt alone, so no "
                "completion stands behind a prompt that it does not answer; leave it out, or name other data"
            )
        # Rows with one prompt that stand together have the same group before them.
        run = np.searchsorted(changed, np.arange(len(prompts)), side="right") - 1
        return np.asarray((changed[run] - 1) % len(prompts), dtype=np.int64)

    def _column_bytes(self, spec: Spec) -> I64:
        """(G,) what a column takes of every group at most, or about: pooled features have no known end."""
        n: I64 = self.tokens.n_completions.astype(np.int64)
        if spec["kind"] == "top_logits":
            return np.asarray(8 * spec["m"] * self.scored_tokens)
        if spec["kind"] == "hidden_gram":
            return np.asarray(4 * n * n)
        if spec["kind"] == "mismatched":
            lengths = self.lengths[1]
            return np.asarray(5 * lengths[self.completion_starts[self.answered_before]])
        rows, tokens = n, self.scored_tokens
        if spec["kind"] == "prompt_features":
            rows, tokens = np.ones_like(n), self.lengths[0]
        if spec["top_k"] == "all":
            return np.asarray(8 * np.minimum(rows * spec["d_sae"], _FEATURES_PER_TOKEN * tokens))
        return np.asarray(8 * rows * min(spec["top_k"], spec["d_sae"]))

    def _groups_digest(self) -> str:
        return groups_digest(map(self._shard_digest, self.plan))

    def _shard_digest(self, rows: np.ndarray) -> str:
        tokens = self.tokens
        completions, _ = gather(self.completion_starts, rows)
        return shard_digest(
            tokens.group_id[rows],
            tokens.n_completions[rows],
            self.digests[completions],
            tokens.score[completions],
            tokens.weight[rows],
        )

    def _groups_and_drops(self) -> dict[str, Any]:
        return {
            "groups": {
                "digest": self._groups_digest(),
                "n_groups": len(self.tokens),
                "n_completions": len(self.digests),
                "score_mask": self.tokens.score_mask is not None,
                "seed": self.recipe.cache.seed,
                "shard_groups": [len(rows) for rows in self.plan],
            },
            "drops": replace(self.tokens.drops, spreads=self.tokens.spreads()).as_dict(),
        }


@dataclass(frozen=True)
class Labelled:
    """Groups as the data has them: the base without what the reference says."""

    group_id: np.ndarray
    n_completions: np.ndarray
    completion_digest: np.ndarray
    input_ids: np.ndarray
    splits: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    score_mask: np.ndarray | None

    def scored(self, logps: TokenLogps) -> Groups:
        """With what the reference says of every completion."""
        starts = logps.splits.astype(np.int64)
        ref_logps = summed_logps(logps.logps, starts, self.score_mask)
        return Groups(**vars(self), ref_logps=ref_logps, token_logps=logps.logps)


def _summed(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of the completions of each group."""
    running = starts_of(values)
    return np.asarray(running[starts[1:]] - running[starts[:-1]], dtype=np.int64)


def _by_group(digests: np.ndarray, n_completions: np.ndarray) -> np.ndarray:
    """(K, 16) of completions -> (G, 16) of groups: of the completions together, in their order."""
    parts = np.split(digests, starts_of(n_completions)[1:-1])
    found = b"".join(hashlib.sha256(part.tobytes()).digest()[:16] for part in parts if len(part))
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, 16)


def _repeats(digests: np.ndarray) -> np.ndarray:
    """Positions of the groups whose digest an earlier one has, ascending."""
    _, firsts = np.unique(digests, axis=0, return_index=True)
    return np.setdiff1d(np.arange(len(digests)), firsts)


def shared_groups(one: CacheIdentity, other: CacheIdentity) -> int:
    """How many groups of `one` have a completion that stands in `other` too, token for token; remembered."""

    def count() -> dict[str, Any]:
        theirs = set(map(bytes, other.digests))
        held = np.array([bytes(digest) in theirs for digest in one.digests], dtype=np.int64)
        return {"shared": int((_summed(held, one.completion_starts) > 0).sum())}

    digests = [identity.remembered["groups"]["digest"] for identity in (one, other)]
    return int(remember({"what": "shared groups", "digests": digests}, count)["shared"])


def cache_identities(recipe: Recipe, store: Store | None = None) -> list[CacheIdentity]:
    """
    The caches that a recipe asks for: the training split's, then the held-out split's if there is one.

    store  whose processes share the token ids; None shares them with nobody
    """
    sides = [False, True] if recipe.data.held_out_split is not None else [False]
    return [CacheIdentity(recipe, held_out, store) for held_out in sides]


def checked(recipe: Recipe) -> Recipe:
    """
    The recipe with its hookpoints as module paths, once everything is refused that can be from headers and config files
    alone, before anything heavy loads: model folder, length, hookpoints, SAE files and widths, data files and columns.

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
    recipe = with_module_paths(recipe)
    for index, feature in enumerate(recipe.features):
        facts = sae_facts(feature.sae, feature.hookpoint)
        width = hookpoint_width(config.to_dict(), feature.hookpoint)
        if width not in (None, facts.d_in):
            raise RecipeError(
                f"features[{index}].sae: {feature.sae} reads {facts.d_in} numbers per token, "
                f"{feature.hookpoint} of {recipe.reference.model} gives {width}"
            )
        # A hint that is no module's path fits no hookpoint: the SAE reads what no module gives or reads.
        if feature.self_check and facts.hook_hint and not same_hookpoint(facts.hook_hint, feature.hookpoint):
            raise RecipeError(
                f"features[{index}].hookpoint: {feature.sae} says that it reads {facts.hook_hint}, the recipe says "
                f"{feature.hookpoint}; mend it, or set self_check: false in this entry to go on regardless"
            )
        if feature.top_k != "all" and feature.top_k > facts.d_sae:
            raise RecipeError(f"features[{index}].top_k: {feature.top_k} is more than the SAE's {facts.d_sae} features")
    for identity in cache_identities(recipe):
        for source, split in identity.sources:
            data_fingerprint(source.source, split, source.subset, source.revision)
    return recipe


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


def feature_spec(feature: Feature) -> Spec:
    """What decides the pooled features of a hookpoint."""
    facts = sae_facts(feature.sae, feature.hookpoint)
    return {
        "hookpoint": canonical_hookpoint(feature.hookpoint),
        "sae": {
            "weights": sae_weights_digest(feature.sae, feature.hookpoint),
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
