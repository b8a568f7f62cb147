"""
Offline preference optimisation with sparse features: run the reference once, cache it, train from the cache.

This folder, the repository's root, is the package `fpo`: `from fpo.store import open_cache`, `python -m fpo`.
"""
