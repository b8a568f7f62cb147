"""
One process of several that fill a cache, as torchrun or an array of jobs starts it (RANK, WORLD_SIZE):
python store_one_writer.py STORE WRITER AT_MOST

Its scores are those of another GPU: WRITER decides their last bits. It stops after AT_MOST shards, or seals the cache
and prints the output address.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
from store_cases import make_groups, make_recipe

from fpo.store import CacheWriter, open_cache, own_share_first, plan_shards
from fpo.store.format.groups import Groups, summed_logps

N = 24
GROUPS = make_groups([(n % 3, (1 + n % 4, 2 + n % 2)) for n in range(N)], seed=3)
PLAN = plan_shards(np.full(N, 6), GROUPS.n_completions, seed=1, max_groups=2)
RECIPE = make_recipe(GROUPS, PLAN)


def scored_by(writer: int, sid: int) -> Groups:
    """A shard as this writer computes it: every log-prob differs from the others' by a little."""
    groups = GROUPS.take(PLAN[sid])
    logps = groups.token_logps - np.float32(1e-4) * writer
    return dataclasses.replace(groups, token_logps=logps, ref_logps=summed_logps(logps, groups.scored_splits))


def main(store: Path, name: int, at_most: int) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    writer = CacheWriter(store, RECIPE, PLAN)
    written = 0
    while missing := writer.missing():
        if written == at_most:
            return
        sid = own_share_first(missing, rank, world)[0]
        shard = scored_by(name, sid)
        time.sleep(0.002)  # the forward passes, during which others write
        writer.write(sid, shard, {"writer": name})
        written += 1
    writer.seal({})
    print(open_cache(store, writer.key).digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
