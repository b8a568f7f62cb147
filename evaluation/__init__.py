"""
What a cache or a run says when it is asked.

    pairs, gaps, significance    what chosen completions have of each feature that rejected ones lack, how sure that is
    prediction                   how well the preference is told from features, from length, from both
    breakdown, top_pairs         gaps in parts of the data; the pairs that say most about a feature
    labels, examples, steering   names of features, pairs token by token, rows for lm-eval
    feature_report               all of it, for `fpo features CACHE`
"""

from fpo.evaluation.feature_report import FeatureReport, Question, feature_columns, feature_report
from fpo.evaluation.gaps import Estimate, Gaps, feature_gaps
from fpo.evaluation.pairs import Pairs, read_pairs

__all__ = [
    "Estimate",
    "FeatureReport",
    "Gaps",
    "Pairs",
    "Question",
    "feature_columns",
    "feature_gaps",
    "feature_report",
    "read_pairs",
]
