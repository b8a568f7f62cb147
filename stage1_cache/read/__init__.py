"""
Rows of a dataset to groups.

    sources  files, folders and the hub, as rows
    columns  which columns are read, what they must hold, and that no text of a prompt is lost
    layouts  what a row looks like, and the group that it becomes
"""

from fpo.stage1_cache.read.layouts import PAIR, Group, Layout, as_conversation, extract_prompt, layout_of
from fpo.stage1_cache.read.sources import ReadGroups, data_fingerprint, read_column, read_groups, read_rows

__all__ = [
    "PAIR",
    "Group",
    "Layout",
    "ReadGroups",
    "as_conversation",
    "data_fingerprint",
    "extract_prompt",
    "layout_of",
    "read_column",
    "read_groups",
    "read_rows",
]
