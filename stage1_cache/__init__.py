"""
Pairs to cache.

    read            rows to groups, checked        identity  the cache key, without loading a model
    texts, tokenise TRL's rules                    score     one shard through the reference
    masks           which tokens count             build     fpo cache; fill writes the shards
    drops           what was left out, and why     recompute random pairs, scored again
    places          where SAEs read                imported  another engine's log-probs
"""

from fpo.stage1_cache.build import (
    CacheReport,
    SplitReport,
    build_caches,
    find_cache,
    import_caches,
    look_at_data,
    read_beside,
)
from fpo.stage1_cache.places import with_module_paths
from fpo.stage1_cache.recompute import RecomputeReport, recompute

__all__ = [
    "CacheReport",
    "RecomputeReport",
    "SplitReport",
    "build_caches",
    "find_cache",
    "import_caches",
    "look_at_data",
    "read_beside",
    "recompute",
    "with_module_paths",
]
