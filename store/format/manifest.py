"""
The three JSON files of a cache, and of each of its columns: recipe.json names it, records commit shards, the manifest
seals it.

recipe.json is canonical JSON whose sha256 is the name of the cache or column. Records and manifest are JSON in one
fixed spelling with a checksum of themselves inside, so that a changed byte shows without a second source.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fpo.canonical import canonical_json, checked_json, parse_checked_json, parse_json, sha256_hex
from fpo.errors import CacheDamaged, CacheError
from fpo.store.files import printable
from fpo.store.format.columns import Spec
from fpo.store.format.encoding import MAX_FILE_BYTES
from fpo.store.format.invariants import MAX_SHARD_GROUPS, BaseBounds, Bounds, ColumnBounds, Invalid, check_counts
from fpo.store.format.key import FORMAT_VERSION, groups_digest

RECIPE = "recipe.json"
MANIFEST = "manifest.json"
SHARDS = "shards"
RECORDS = "records"
COLUMNS = "columns"
"""Holds a folder per column, named by its key."""

MAX_RECIPE_BYTES = 2**20
MAX_RECORD_BYTES = 2**16
MAX_MANIFEST_BYTES = 2**24
"""Largest files that are written or read: a manifest takes about 310 bytes per shard."""

MAX_SHARDS = 2**15
"""Of one cache or column: 67 million groups, or 2 TiB uncompressed."""

_MANIFEST_VALUES, _SHARD_VALUES = 2**14, 9
"""Most values in the JSON of a manifest, and more for each of its shards: hostile JSON takes 30 times its size."""

REPAIR = "restore it from a copy, or delete the whole cache and run fpo cache again"
REPAIR_SHARD = "put it back with: fpo cache RECIPE --rebuild, or fpo store pull KEY URL --repair"
REPAIR_RECORD = "delete it and run fpo cache again, with --rebuild where the cache is complete"

Parsed = TypeVar("Parsed")
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]


def shard_name(sid: int) -> str:
    """Names come from the number alone, never from a file's contents."""
    return f"{SHARDS}/{sid:06d}.zarr.zip"


def record_name(sid: int) -> str:
    return f"{RECORDS}/{sid:06d}.json"


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ShardEntry(_Closed):
    """What the manifest and a record say about one shard."""

    shard: Count
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    """Bytes of the shard file."""
    sha256: Sha256
    n_groups: Count
    n_completions: Count
    n_tokens: Count
    """0 in a column: the tokens stand in the base."""
    rows_digest: Sha256
    """Whose rows it holds, see `shard_digest`: those of all shards together are the recipe's `groups.digest`. In a
    column, the sha256 of its group_id (uint64, little-endian)."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Groups, completions and tokens."""
        return self.n_groups, self.n_completions, self.n_tokens

    @model_validator(mode="after")
    def _within_limits(self) -> ShardEntry:
        try:
            check_counts(*self.counts)
        except Invalid as error:
            raise ValueError(f"shard {self.shard}: {error}") from None
        return self


class Record(ShardEntry):
    """The commit of one shard: a shard without a record does not exist."""

    key: Sha256
    provenance: dict[str, Any]
    """How it came to be (versions, device, time): for people, never compared."""


class Manifest(_Closed):
    """What a complete cache or column contains. The sha256 of its file is the output address."""

    format: Literal[1]
    key: Sha256
    n_groups: Count
    n_completions: Count
    n_tokens: Count
    shards: tuple[ShardEntry, ...] = Field(strict=False, max_length=MAX_SHARDS)
    facts: dict[str, Any]
    """What its maker adds: the self-check's result, the drop report."""

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        if [entry.shard for entry in self.shards] != list(range(len(self.shards))):
            raise ValueError("shards are not numbered 0, 1, 2, ...")
        for name in ("n_groups", "n_completions", "n_tokens"):
            total = sum(getattr(entry, name) for entry in self.shards)
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, its shards add up to {total}")
        return self

    @property
    def n_bytes(self) -> int:
        """Of all shard files."""
        return sum(entry.size for entry in self.shards)


class _Open(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


Width = Annotated[int, Field(gt=0, lt=2**32 - 1)]
ShardGroups = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_SHARD_GROUPS)], ...], Field(strict=False, max_length=MAX_SHARDS)
]


class _ScorerFacts(_Open):
    vocab_size: Width


class _GroupsFacts(_Open):
    digest: Sha256
    n_groups: Count
    n_completions: Count
    score_mask: bool
    seed: int
    shard_groups: ShardGroups


class _ColumnFacts(_Open):
    kind: Literal["features", "prompt_features", "top_logits", "hidden_gram", "mismatched"]
    d_sae: Width | None = None
    top_k: Width | Literal["all"] | None = None
    m: Width | None = None
    vocab_size: Width | None = None

    @model_validator(mode="after")
    def _says_its_sizes(self) -> _ColumnFacts:
        sizes = {"top_logits": ("m", "vocab_size"), "hidden_gram": (), "mismatched": ("vocab_size",)}
        needed = sizes.get(self.kind, ("d_sae", "top_k"))
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a column of {self.kind} needs {missing[0]}")
        return self


Checked = TypeVar("Checked", Record, Manifest)


class BaseFacts(_Open):
    """The part of a cache's recipe.json that the store itself reads."""

    format: Literal[1]
    scorer: _ScorerFacts
    groups: _GroupsFacts

    @model_validator(mode="after")
    def _adds_up(self) -> BaseFacts:
        if sum(self.groups.shard_groups) != self.groups.n_groups:
            raise ValueError(
                f"groups.shard_groups adds up to {sum(self.groups.shard_groups)}, not {self.groups.n_groups}"
            )
        return self

    @property
    def shard_groups(self) -> tuple[int, ...]:
        """Groups of every shard."""
        return self.groups.shard_groups

    @property
    def bounds(self) -> Bounds:
        return BaseBounds(self.scorer.vocab_size, self.groups.score_mask)


class ColumnFacts(_Closed):
    """What a column's recipe.json says."""

    format: Literal[1]
    base: Sha256
    """Key of its cache."""
    column: dict[str, Any]
    """Its spec, see `columns`."""
    shard_groups: ShardGroups
    """Groups of every shard: the base's, cut further where the column takes more."""

    @model_validator(mode="after")
    def _known(self) -> ColumnFacts:
        _ColumnFacts.model_validate(self.column)
        return self

    @property
    def spec(self) -> Spec:
        return self.column

    @property
    def bounds(self) -> Bounds:
        facts = _ColumnFacts.model_validate(self.column)
        return ColumnBounds(
            facts.kind,
            facts.d_sae or 0,
            facts.top_k if isinstance(facts.top_k, int) else None,
            facts.m or 0,
            facts.vocab_size or 0,
        )


RecipeFacts = BaseFacts | ColumnFacts


def recipe_facts(recipe: dict[str, Any]) -> RecipeFacts:
    """Raises ValueError naming the field that does not fit."""
    try:
        return (ColumnFacts if "base" in recipe else BaseFacts).model_validate(recipe)
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def recipe_bytes(recipe: dict[str, Any]) -> bytes:
    """Raises ValueError for what nobody could read again, as those of record and manifest do."""
    return _bounded(RECIPE, canonical_json(recipe), MAX_RECIPE_BYTES)


def parse_recipe(data: bytes, key: str, where: str) -> dict[str, Any]:
    """recipe.json of cache `key`. Raises CacheDamaged, or CacheError for another format version."""
    if sha256_hex(data) != key:
        raise CacheDamaged(
            f"{where} has the sha256 {sha256_hex(data)[:12]}..., its folder is named {key[:12]}...; {REPAIR}"
        )
    return _parsed(where, lambda: _recipe(data, where))


def record_bytes(record: Record) -> bytes:
    return _bounded("a record", checked_json(record.model_dump()), MAX_RECORD_BYTES)


def parse_record(data: bytes, key: str, sid: int, where: str) -> Record:
    """Raises CacheDamaged naming `where`."""
    record = _parsed(where, lambda: _spelled_so(Record, data, MAX_RECORD_BYTES), REPAIR_RECORD)
    if (record.key, record.shard) != (key, sid):
        raise CacheDamaged(
            f"{where} is the record of shard {record.shard} of cache {record.key[:12]}..., "
            f"not of shard {sid} of {key[:12]}...; {REPAIR_RECORD}"
        )
    return record


def manifest_bytes(manifest: Manifest) -> bytes:
    return _bounded(MANIFEST, checked_json(manifest.model_dump()), MAX_MANIFEST_BYTES)


def parse_manifest(data: bytes, key: str, facts: RecipeFacts, where: str) -> Manifest:
    """Raises CacheDamaged naming `where`, also where the manifest does not fit the recipe."""
    most = _MANIFEST_VALUES + _SHARD_VALUES * len(facts.shard_groups)
    manifest = _parsed(where, lambda: _spelled_so(Manifest, data, most))
    if manifest.key != key:
        raise CacheDamaged(f"{where} is the manifest of cache {manifest.key[:12]}..., not of {key[:12]}...; {REPAIR}")
    if tuple(entry.n_groups for entry in manifest.shards) != facts.shard_groups:
        raise CacheDamaged(f"{where} lists other shards than {RECIPE}'s shard_groups; {REPAIR}")
    if isinstance(facts, ColumnFacts):
        return manifest
    found = groups_digest(entry.rows_digest for entry in manifest.shards)
    if (found, manifest.n_completions) != (facts.groups.digest, facts.groups.n_completions):
        raise CacheDamaged(
            f"{where} lists other groups than the key stands for: they have the digest {found[:12]}..., "
            f"{RECIPE} says {facts.groups.digest[:12]}...; {REPAIR}"
        )
    return manifest


def _recipe(data: bytes, where: str) -> dict[str, Any]:
    recipe = parse_json(data, MAX_RECIPE_BYTES)
    if not isinstance(recipe, dict) or canonical_json(recipe) != data:
        raise ValueError("it is not canonical JSON")
    if type(recipe.get("format")) is not int or recipe["format"] != FORMAT_VERSION:
        raise CacheError(
            f"{where} has format {printable(str(recipe.get('format')))}, this version of fpo reads "
            f"{FORMAT_VERSION}; use the version that wrote it, or build the cache again with fpo cache"
        )
    if "pairs" in recipe:
        raise CacheError(
            f"{where} was written before format 1 was final: it holds pairs, not groups; "
            "build the cache again with fpo cache"
        )
    recipe_facts(recipe)
    return recipe


def _spelled_so(model: type[Checked], data: bytes, most_values: int) -> Checked:
    body = parse_checked_json(data, most_values)
    parsed = model.model_validate(body)
    # pydantic takes true and 1.0 for the format 1; another reader may not.
    if _text(parsed.model_dump()) != _text(body):
        raise ValueError("it is not spelled as this format writes it")
    return parsed


def _text(body: dict[str, Any]) -> str:
    """Equal for what is spelled equally, and quick: without an indent, Python spells in C."""
    return json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _bounded(what: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise ValueError(f"{what} would have {len(data)} bytes, at most {limit} are read")
    return data


def _parsed(where: str, parse: Callable[[], Parsed], repair: str = REPAIR) -> Parsed:
    try:
        return parse()
    except ValidationError as error:
        raise CacheDamaged(f"{where} is damaged: {_first(error)}; {repair}") from None
    except (ValueError, TypeError) as error:
        raise CacheDamaged(f"{where} is damaged: {printable(str(error), 300)}; {repair}") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = printable(".".join(str(part) for part in problem["loc"]))
    return f"{field}: {problem['msg']}" if field else problem["msg"]
