"""Small groups, columns, plans and caches for the tests of the store: everything made here, nothing read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fpo.canonical import checked_json, parse_checked_json
from fpo.store import CacheWriter, Store
from fpo.store.beside import column_recipe
from fpo.store.format.columns import KINDS, Column, Features, HiddenGram, Mismatched, Spec, TopLogits
from fpo.store.format.encoding import ColumnRows, Rows
from fpo.store.format.groups import Groups, scored_splits, summed_logps
from fpo.store.format.invariants import Bounds
from fpo.store.format.key import cache_key, completion_digests, groups_digest, shard_digest
from fpo.store.format.manifest import recipe_facts
from fpo.store.format.ragged import starts_of
from fpo.store.sealed import Sealed

VOCAB = 100
KEY = "ab" * 32

FEATURES: Spec = {
    "kind": "features",
    "hookpoint": "model.layers.0",
    "sae": {"weights": "5a" * 32, "config": {}},
    "d_sae": 50,
    "top_k": 4,
    "pooling": "mean",
}
EVERY_FEATURE: Spec = FEATURES | {"hookpoint": "model.layers.1", "d_sae": 9, "top_k": "all"}
PROMPT_FEATURES: Spec = FEATURES | {"kind": "prompt_features"}
TOP_LOGITS: Spec = {"kind": "top_logits", "m": 2, "vocab_size": VOCAB}
HIDDEN_GRAM: Spec = {"kind": "hidden_gram"}
MISMATCHED: Spec = {"kind": "mismatched", "vocab_size": TOP_LOGITS["vocab_size"]}
SPECS = (FEATURES, EVERY_FEATURE, PROMPT_FEATURES, TOP_LOGITS, HIDDEN_GRAM, MISMATCHED)

Sizes = Sequence[tuple[int, Sequence[int]]]
"""Tokens of each group's prompt and of its completions."""


def make_groups(sizes: Sizes, ids: Any = None, seed: int = 0, score_mask: bool = False) -> Groups:
    """Random groups of these token counts for which every invariant holds; some completions have no score."""
    rng = np.random.default_rng(seed)
    G = len(sizes)
    n_completions = np.array([len(completions) for _, completions in sizes], np.uint32)
    K = int(n_completions.sum())
    splits = starts_of(np.array([n for prompt, rest in sizes for n in (prompt, *rest)], np.int64)).astype(np.uint64)
    input_ids = rng.integers(0, VOCAB, int(splits[-1])).astype(np.uint32)
    scored = scored_splits(splits, n_completions)
    token_logps = -rng.gamma(1, 2, int(scored[-1])).astype(np.float32)
    mask = rng.integers(0, 2, len(token_logps)).astype(np.uint8) if score_mask else None
    return Groups(
        group_id=np.asarray(range(G) if ids is None else ids, dtype=np.uint64),
        n_completions=n_completions,
        completion_digest=completion_digests(input_ids, splits, n_completions, mask),
        input_ids=input_ids,
        splits=splits,
        score=np.where(rng.random(K) < 0.3, np.nan, rng.random(K)).astype(np.float32),
        weight=rng.integers(1, 4, G).astype(np.float32),
        ref_logps=summed_logps(token_logps, scored, mask),
        token_logps=token_logps,
        score_mask=mask,
    )


def make_column(spec: Spec, groups: Groups, seed: int = 0) -> Column:
    """A random column of this spec beside these groups."""
    rng = np.random.default_rng(seed)
    match spec["kind"]:
        case "top_logits":
            splits = groups.scored_splits.astype(np.uint64)
            logps = -np.sort(rng.random((int(splits[-1]), spec["m"]), dtype=np.float32), axis=1)
            return TopLogits(splits, rng.integers(0, spec["vocab_size"], logps.shape).astype(np.uint32), logps)
        case "hidden_gram":
            sums = [rng.standard_normal((n, 3)) for n in groups.n_completions]
            products = [np.empty(0), *((rows @ rows.T).ravel() for rows in sums)]
            lengths = groups.n_completions.astype(np.int64) ** 2
            return HiddenGram(starts_of(lengths).astype(np.uint64), np.concatenate(products).astype(np.float32))
        case "mismatched":
            lengths = rng.integers(0, 5, len(groups))
            return Mismatched(
                starts_of(lengths).astype(np.uint64),
                rng.integers(0, spec["vocab_size"], int(lengths.sum())).astype(np.uint32),
                rng.integers(0, 2, int(lengths.sum())).astype(np.uint8),
                -rng.random(len(groups), dtype=np.float32),
            )
        case kind:
            per_group = KINDS[kind].PER == "group"
            return _features(rng, len(groups) if per_group else len(groups.completion_digest), spec)


def _features(rng: np.random.Generator, R: int, spec: Spec) -> Features:
    d_sae, top_k = spec["d_sae"], spec["top_k"]
    kept = rng.integers(0, (d_sae if top_k == "all" else int(top_k)) + 1, R)
    indices = [np.sort(rng.choice(d_sae, n, replace=False)) for n in kept]
    kind: Any = KINDS[spec["kind"]]
    features: Features = kind(
        splits=starts_of(kept).astype(np.uint64),
        indices=np.concatenate([*indices, np.empty(0, np.int64)]).astype(np.uint32),
        acts=rng.random(int(kept.sum()), dtype=np.float32),
        active=kept.astype(np.uint32),
        tail_sq=np.zeros(R, np.float32),
    )
    return features


def column_rows(spec: Spec, groups: Groups, seed: int = 0) -> ColumnRows:
    """A shard of a random column of this spec beside these groups."""
    return ColumnRows(groups.group_id, len(groups.completion_digest), make_column(spec, groups, seed))


def column_bounds(spec: Spec) -> Bounds:
    """As a column's recipe promises them."""
    return recipe_facts(column_recipe(KEY, spec, [])).bounds


def make_recipe(groups: Groups, plan: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of a base that holds the groups with these ids, shard by shard."""
    return {
        "format": 1,
        "scorer": {"vocab_size": VOCAB, "weights": "7e" * 32},
        "groups": {
            "digest": groups_digest(digest_of(groups.take(rows_of(groups, ids))) for ids in plan),
            "n_groups": len(groups),
            "n_completions": len(groups.completion_digest),
            "score_mask": groups.score_mask is not None,
            "seed": 7,
            "shard_groups": [len(ids) for ids in plan],
        },
    }


def digest_of(groups: Groups) -> str:
    """Of a shard of these groups."""
    return shard_digest(groups.group_id, groups.n_completions, groups.completion_digest, groups.score, groups.weight)


def rows_of(groups: Groups, ids: np.ndarray) -> np.ndarray:
    """Where the groups with these ids stand."""
    return np.argsort(groups.group_id)[np.searchsorted(np.sort(groups.group_id), ids)]


# One, two and three completions; an empty prompt; a completion of no scored token.
SIZES: Sizes = [(2, (3, 1)), (0, (1, 2)), (4, (2, 2, 5)), (1, (1,)), (3, (5, 4))]
PLAN = [np.array([3, 0]), np.array([4, 1]), np.array([2])]


class World:
    """Five groups in three shards, two columns beside them, and a store to put them in."""

    def __init__(
        self, root: Path, specs: Sequence[Spec] = (FEATURES, TOP_LOGITS), sizes: Sizes = SIZES, score_mask: bool = False
    ) -> None:
        self.store = Store(root)
        self.specs = tuple(specs)
        groups = make_groups(sizes, score_mask=score_mask)
        self.groups = groups.with_columns([make_column(spec, groups, seed) for seed, spec in enumerate(specs)])
        self.plan = PLAN
        self.recipe = make_recipe(groups, self.plan)
        self.bounds = recipe_facts(self.recipe).bounds

    @property
    def key(self) -> str:
        """Of the cache, as its recipe is now."""
        return cache_key(self.recipe)

    @property
    def path(self) -> Path:
        """Of the cache."""
        return self.store.path(self.key)

    def shard(self, sid: int) -> Groups:
        """The groups of a shard, without columns."""
        return dataclasses.replace(self.beside(sid), columns=())

    def beside(self, sid: int) -> Groups:
        """The same with all columns, as `open_cache(columns=world.specs)` reads them."""
        return self.groups.take(self.plan[sid])

    def column_plan(self, n: int) -> list[np.ndarray]:
        """The group ids of every shard of column n: the first is cut finer than the base."""
        return [ids[i : i + 1] for ids in self.plan for i in range(len(ids))] if n == 0 else self.plan

    def column_recipe(self, n: int) -> dict[str, Any]:
        return column_recipe(self.key, self.specs[n], [len(ids) for ids in self.column_plan(n)])

    def column_key(self, n: int) -> str:
        return cache_key(self.column_recipe(n))

    def column_path(self, n: int) -> Path:
        return self.path / "columns" / self.column_key(n)

    def column_shard(self, n: int, sid: int) -> ColumnRows:
        """The rows of a shard of column n."""
        groups = self.groups.take(self.column_plan(n)[sid])
        return ColumnRows(groups.group_id, len(groups.completion_digest), groups.columns[n])

    def writer(self) -> CacheWriter:
        return CacheWriter(self.store, self.recipe, self.plan)

    def column_writer(self, n: int) -> CacheWriter:
        return CacheWriter(self.store, self.column_recipe(n), self.column_plan(n))

    def fill(self) -> CacheWriter:
        """Write what is missing of the base and of its columns, in order, and seal them; the base's writer."""
        writer = self.fill_base()
        for n in range(len(self.specs)):
            self.fill_column(n)
        return writer

    def fill_base(self) -> CacheWriter:
        writer = self.writer()
        for sid in writer.missing():
            writer.write(sid, self.shard(sid), {"device": "cpu", "seconds": 0.5})
        writer.seal({"self_check": {"fvu": "0.12"}})
        return writer

    def fill_column(self, n: int) -> CacheWriter:
        writer = self.column_writer(n)
        for sid in writer.missing():
            writer.write(sid, self.column_shard(n, sid), {"device": "cpu", "seconds": 0.5})
        writer.seal({})
        return writer


@dataclass(frozen=True)
class Part:
    """The base of a world's cache, or its column of this number: each a folder with a recipe, shards and a seal."""

    world: World
    column: int | None = None

    @property
    def path(self) -> Path:
        return self.world.path if self.column is None else self.world.column_path(self.column)

    @property
    def recipe(self) -> dict[str, Any]:
        return self.world.recipe if self.column is None else self.world.column_recipe(self.column)

    @property
    def plan(self) -> list[np.ndarray]:
        return self.world.plan if self.column is None else self.world.column_plan(self.column)

    def rows(self, sid: int) -> Rows:
        return self.world.shard(sid) if self.column is None else self.world.column_shard(self.column, sid)

    def sealed(self) -> Sealed:
        """Opened for reading."""
        base = self.world.store.folder(self.world.key)
        folder = base if self.column is None else base.inside(f"columns/{self.path.name}")
        return Sealed(folder, self.path.name)

    def writer(self) -> CacheWriter:
        return self.world.writer() if self.column is None else self.world.column_writer(self.column)

    def fill(self) -> CacheWriter:
        """Write what is missing, in order, and seal."""
        return self.world.fill_base() if self.column is None else self.world.fill_column(self.column)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a reader may see, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unmarked(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the marks in the records, which only their own store can make."""

    def without_mark(data: bytes) -> bytes:
        body = parse_checked_json(data)
        body["provenance"].pop("mark", None)
        return checked_json(body)

    return {name: without_mark(data) if "records/" in name else data for name, data in files.items()}


def arrays_in(found: Rows | Column) -> dict[str, np.ndarray]:
    """Every array of groups and of the columns beside them, of a column's shard or of a column, by name."""
    named: dict[str, Any] = {}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if isinstance(value, np.ndarray):
            named[field.name] = value
        for n, column in enumerate(value if isinstance(value, tuple) else ()):
            named |= {f"columns/{n}/{name}": array for name, array in arrays_in(column).items()}
        if isinstance(value, Column):
            named |= arrays_in(value)
    return named


def same(a: Rows | Column, b: Rows | Column) -> bool:
    """Equal arrays, bit by bit, dtypes and shapes; columns of the same kinds."""
    left, right = arrays_in(a), arrays_in(b)
    return (type(a), _kinds(a), sorted(left)) == (type(b), _kinds(b), sorted(right)) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((left[name], right[name]) for name in left)
    )


def _kinds(found: Rows | Column) -> list[Any]:
    columns = found.columns if isinstance(found, Groups) else ()
    return [found.n_completions, type(found.column)] if isinstance(found, ColumnRows) else [*map(type, columns)]


# Empty prompts, groups of one, completions of no token and no groups at all are inside.
ragged_sizes = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)), max_size=6
)
