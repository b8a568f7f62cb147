"""
Cache to policy. Nothing here loads a reference model.

    order    the pairs of each step         stream      shards to packed batches    measure  scores to losses
    trainer  transformers.Trainer on a cache            parity      is the policy the reference?
    align    fpo align                      evaluation  fpo evaluate                run      the run folder
"""

from fpo.stage2_align.align import AlignReport, align
from fpo.stage2_align.evaluation import evaluate_run, evaluated_recipe, evaluated_store

__all__ = ["AlignReport", "align", "evaluate_run", "evaluated_recipe", "evaluated_store"]
