"""
Rows of a dataset to groups.

    sources  files, folders and the hub, as rows
    sides    which prompts are held out
    columns  which columns are read, what they must hold, and that no text of a prompt is lost
    layouts  what a row looks like, and the group that it becomes; foreign has those of other tools
"""

from fpo.stage1_cache.read.columns import layout_of
from fpo.stage1_cache.read.foreign import TRANSCRIPTS, is_transcript
from fpo.stage1_cache.read.layouts import PAIR, Group, Layout, WrongValue, as_conversation, extract_prompt, said_digest
from fpo.stage1_cache.read.sides import side_of_prompts
from fpo.stage1_cache.read.sources import ReadGroups, data_fingerprint, read_column, read_groups, read_rows

__all__ = [
    "PAIR",
    "TRANSCRIPTS",
    "Group",
    "Layout",
    "ReadGroups",
    "WrongValue",
    "as_conversation",
    "data_fingerprint",
    "extract_prompt",
    "is_transcript",
    "layout_of",
    "read_column",
    "read_groups",
    "read_rows",
    "said_digest",
    "side_of_prompts",
]
