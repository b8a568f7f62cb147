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

from store.cache import Cache, open_cache
from store.claims import Claim
from store.collect import Collection, Garbage, gc
from store.describe import counted
from store.difference import Difference, DiffReport, Nearest, diff, differences, nearest
from store.export import ExportReport, export_trl
from store.files import printable
from store.key import FORMAT_VERSION, cache_key, canonical_json, pair_digests, pairs_digest, shard_digest
from store.local import Store, Summary, default_store
from store.manage import Removed, Tagged, removable, rm, tag, untag
from store.manifest import Manifest, ShardEntry
from store.pairs import Features, Pairs, TopLogits, scored_lengths
from store.plan import permutation, plan_shards
from store.rebuild import Rebuild, check_changed
from store.remote import RemoteStore, is_url, open_store
from store.reuse import ReusableRows, Reused
from store.streaming import Shelf
from store.transfer import TransferReport, pull, push
from store.usage import ArrayUsage, disk_usage
from store.verify import Report, verify
from store.weights import file_digest, file_facts, forget, remember, weights_digest
from store.writer import CacheWriter, own_share_first

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
    "canonical_json",
    "check_changed",
    "counted",
    "default_store",
    "diff",
    "differences",
    "disk_usage",
    "export_trl",
    "file_digest",
    "file_facts",
    "forget",
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
    "remember",
    "removable",
    "rm",
    "scored_lengths",
    "shard_digest",
    "tag",
    "untag",
    "verify",
    "weights_digest",
]
