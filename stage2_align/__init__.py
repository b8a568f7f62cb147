"""
Cache to policy. Nothing here loads a reference model.

    order    the pairs of each step        measure     scores to losses      trainer  transformers.Trainer on a cache
    stream   shards to packed batches      held_out    metrics of a policy   parity   is the policy the reference?
    align    fpo align                     evaluation  fpo evaluate          best     what evaluations decide
    samples  what the policy writes        sums        metrics added up      run      the run folder
    merge    fpo merge                     sweep       several runs          cost     what it took
    policy   the model that is trained     adapters    LoRA, soft prompts    saved    what a run saves, read back
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
