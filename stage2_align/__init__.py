"""
Cache to policy. Nothing here loads a reference model.

    order    the pairs of each step        measure     scores to losses    trainer  transformers.Trainer on a cache
    stream   shards to packed batches      evaluation  fpo evaluate        parity   is the policy the reference?
    align    fpo align                     run         the run folder          sweep    several runs in a process
    merge    fpo merge                     cost        what a run cost, what a reference would add
"""

from fpo.stage2_align.align import AlignReport, align
from fpo.stage2_align.cost import Cost
from fpo.stage2_align.evaluation import evaluate_run, evaluated_recipe, evaluated_store
from fpo.stage2_align.merge import MergeReport, merge_run
from fpo.stage2_align.sweep import align_in_turn, check_sweep

__all__ = [
    "AlignReport",
    "Cost",
    "MergeReport",
    "align",
    "align_in_turn",
    "check_sweep",
    "evaluate_run",
    "evaluated_recipe",
    "evaluated_store",
    "merge_run",
]
