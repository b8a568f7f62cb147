"""
Rows of a dataset to groups.

    sources  files, folders and the hub     columns  which columns are read, and that none is lost
"""

from fpo.stage1_cache.read.columns import is_conversational
from fpo.stage1_cache.read.sources import data_fingerprint, read_pairs

__all__ = ["data_fingerprint", "is_conversational", "read_pairs"]
