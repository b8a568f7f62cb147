"""
Caches on disk: format, key, write, read, verify. numpy and Zarr's format; never torch.

    pairs    the containers                   key      names: of caches, of pairs
    plan     which pairs share a shard        weights  digests of weights, remembered
    format, archive, invariants, shards       pairs <-> the bytes of a shard, checked
    files    a folder written once, durably   manifest recipe, records and manifest
    local    the caches in a folder           writer, cache, verify  fill, read, doubt one
    tags, use, describe, manage, collect      names, last use and locks, labels; tag, rm; gc
    difference, usage                         why two caches are not one; bytes by array
    claims   who computes which shard         origin   which shards were computed here
    rebuild  one shard put back               reuse    rows that other caches hold
    export   for other trainers
    objects, bucket, hub, remote              caches behind a URL
    transfer, streaming                       push and pull; reading with less disk than the cache
"""

from fpo.store.cache import Cache, open_cache
from fpo.store.claims import Claim
from fpo.store.export import ExportReport, export_trl
from fpo.store.files import printable
from fpo.store.format.key import FORMAT_VERSION, cache_key, pair_digests, pairs_digest, shard_digest
from fpo.store.format.manifest import Manifest, ShardEntry
from fpo.store.format.pairs import Features, Pairs, TopLogits, scored_lengths
from fpo.store.format.plan import permutation, plan_shards
from fpo.store.local import Store, Summary, default_store
from fpo.store.rebuild import Rebuild, check_changed
from fpo.store.remote.places import RemoteStore, is_url, open_store
from fpo.store.remote.streaming import Shelf
from fpo.store.remote.transfer import TransferReport, pull, push
from fpo.store.reuse import ReusableRows, Reused
from fpo.store.upkeep.collect import Collection, Garbage, gc
from fpo.store.upkeep.describe import counted
from fpo.store.upkeep.difference import Difference, DiffReport, Nearest, diff, differences, nearest
from fpo.store.upkeep.manage import Removed, Tagged, removable, rm, tag, untag
from fpo.store.upkeep.usage import ArrayUsage, disk_usage
from fpo.store.verify import Report, verify
from fpo.store.writer import CacheWriter, own_share_first

__all__ = [
    "FORMAT_VERSION",
    "ArrayUsage",
    "Cache",
    "CacheWriter",
    "Claim",
    "Collection",
    "DiffReport",
    "Difference",
    "ExportReport",
    "Features",
    "Garbage",
    "Manifest",
    "Nearest",
    "Pairs",
    "Rebuild",
    "RemoteStore",
    "Removed",
    "Report",
    "ReusableRows",
    "Reused",
    "ShardEntry",
    "Shelf",
    "Store",
    "Summary",
    "Tagged",
    "TopLogits",
    "TransferReport",
    "cache_key",
    "check_changed",
    "counted",
    "default_store",
    "diff",
    "differences",
    "disk_usage",
    "export_trl",
    "gc",
    "is_url",
    "nearest",
    "open_cache",
    "open_store",
    "own_share_first",
    "pair_digests",
    "pairs_digest",
    "permutation",
    "plan_shards",
    "printable",
    "pull",
    "push",
    "removable",
    "rm",
    "scored_lengths",
    "shard_digest",
    "tag",
    "untag",
    "verify",
]
