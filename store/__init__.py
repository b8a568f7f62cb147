"""
Caches on disk: format, key, write, read, verify. numpy and Zarr's format; never torch.

    format    what a cache is: groups and columns <-> arrays <-> the bytes of a shard; keys, plan, manifest, invariants
    remote    caches behind a URL: places, push and pull, reading with less disk than the cache
    upkeep    keeping a store: names, last use and locks, labels, rm, gc, diff, bytes by array

    files, objects, shards, sealed          a folder written once, places; a shard, base or column with all checks
    local, summaries                        the caches in a folder, and what is known of them without reading a shard
    cache, beside, writer                   read and fill a cache and its columns
    verify, rebuild, export                 doubt one, put shards back, hand it to other trainers
    claims, origin                          who computes which shard, and which were computed here
"""

from fpo.store.beside import HeldColumn, OpenColumn, column_recipe, held_columns, lacks, serving
from fpo.store.cache import Cache, Kept, open_cache
from fpo.store.choose import AllOrKeys
from fpo.store.claims import Claim, Claims
from fpo.store.export import ExportReport, export_trl
from fpo.store.files import printable
from fpo.store.format.columns import (
    Column,
    Features,
    HiddenGram,
    Mismatched,
    PromptFeatures,
    Spec,
    TopLogits,
    column_name,
    covers,
)
from fpo.store.format.encoding import ColumnRows, Rows
from fpo.store.format.groups import Groups, summed_logps
from fpo.store.format.key import FORMAT_VERSION, cache_key, completion_digests, groups_digest, shard_digest
from fpo.store.format.manifest import Manifest, ShardEntry, recipe_facts
from fpo.store.format.plan import cut_shards, permutation, plan_shards, shards_within
from fpo.store.local import Store, default_store
from fpo.store.rebuild import Rebuild, check_changed
from fpo.store.remote.places import RemoteStore, is_url, open_store
from fpo.store.remote.streaming import Shelf
from fpo.store.remote.transfer import Moved, TransferReport, pull, push
from fpo.store.reuse import Copied, Reusable, TokenLogps, Want, Wanting, is_mismatched, rows_per
from fpo.store.rows import export_rows
from fpo.store.summaries import ColumnSummary, Summary, look_at_columns
from fpo.store.upkeep.collect import Collection, Garbage, gc
from fpo.store.upkeep.describe import counted
from fpo.store.upkeep.difference import Difference, DiffReport, Nearest, diff, differences, nearest
from fpo.store.upkeep.manage import Removed, Tagged, removable, removable_column, rm, tag, untag
from fpo.store.upkeep.usage import ArrayUsage, disk_usage
from fpo.store.verify import Report, verify
from fpo.store.writer import CacheWriter, own_share_first

__all__ = [
    "FORMAT_VERSION",
    "AllOrKeys",
    "ArrayUsage",
    "Cache",
    "CacheWriter",
    "Claim",
    "Claims",
    "Collection",
    "Column",
    "ColumnRows",
    "ColumnSummary",
    "Copied",
    "DiffReport",
    "Difference",
    "ExportReport",
    "Features",
    "Garbage",
    "Groups",
    "HeldColumn",
    "HiddenGram",
    "Kept",
    "Manifest",
    "Mismatched",
    "Moved",
    "Nearest",
    "OpenColumn",
    "PromptFeatures",
    "Rebuild",
    "RemoteStore",
    "Removed",
    "Report",
    "Reusable",
    "Rows",
    "ShardEntry",
    "Shelf",
    "Spec",
    "Store",
    "Summary",
    "Tagged",
    "TokenLogps",
    "TopLogits",
    "TransferReport",
    "Want",
    "Wanting",
    "cache_key",
    "check_changed",
    "column_name",
    "column_recipe",
    "completion_digests",
    "counted",
    "covers",
    "cut_shards",
    "default_store",
    "diff",
    "differences",
    "disk_usage",
    "export_rows",
    "export_trl",
    "gc",
    "groups_digest",
    "held_columns",
    "is_mismatched",
    "is_url",
    "lacks",
    "look_at_columns",
    "nearest",
    "open_cache",
    "open_store",
    "own_share_first",
    "permutation",
    "plan_shards",
    "printable",
    "pull",
    "push",
    "recipe_facts",
    "removable",
    "removable_column",
    "rm",
    "rows_per",
    "serving",
    "shard_digest",
    "shards_within",
    "summed_logps",
    "tag",
    "untag",
    "verify",
]
