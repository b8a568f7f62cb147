"""
Pairs to cache.

    pairs, columns  read and check the data      identity  the cache key, without loading a model
    texts, tokenise TRL's rules                  score     one shard through the reference
    drops           what was left out, and why   build     fpo cache
"""

from stage1_cache.build import CacheReport, build_caches, find_cache

__all__ = ["CacheReport", "build_caches", "find_cache"]
