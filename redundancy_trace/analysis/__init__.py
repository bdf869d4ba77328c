"""What the stored scores say: values, agreement, trends. Polars in and out, no torch.

`frames` checks and orders the rows; `axis` places the checkpoints in training; `duplicates` leaves out what repeats
others; `summary` gives a row a checkpoint. `series` puts the importances of one stretch of training into matrices;
`ranks` compares orders (arrays alone); `agreement` and `trends` say what they tell of training; `costs` says what
dropping cost where it was measured; `checks` asks what others found; `published` holds the drop orders of others;
`stats` is all of it.
"""

from redundancy_trace.analysis.agreement import calibration_agreement, drop_onset, rank_agreement, topk_overlap
from redundancy_trace.analysis.axis import Axis, is_log_spaced, training_axis
from redundancy_trace.analysis.checks import Check
from redundancy_trace.analysis.costs import along_values
from redundancy_trace.analysis.duplicates import blank_duplicates, leave_out_duplicates, mark_repeats
from redundancy_trace.analysis.frames import (
    CHECKPOINT_COLUMNS,
    calibration_first,
    checkpoint_order,
    metric_values,
    one_calibration,
)
from redundancy_trace.analysis.published import BesidePublished, PublishedOrders, published_orders
from redundancy_trace.analysis.series import LeftOut, Series, main_series
from redundancy_trace.analysis.stats import TrainingStats, training_stats
from redundancy_trace.analysis.summary import training_summary
from redundancy_trace.analysis.trends import checkpoint_statistics, importance_trends

__all__ = [
    "CHECKPOINT_COLUMNS",
    "Axis",
    "BesidePublished",
    "Check",
    "LeftOut",
    "PublishedOrders",
    "Series",
    "TrainingStats",
    "along_values",
    "blank_duplicates",
    "calibration_agreement",
    "calibration_first",
    "checkpoint_order",
    "checkpoint_statistics",
    "drop_onset",
    "importance_trends",
    "is_log_spaced",
    "leave_out_duplicates",
    "main_series",
    "mark_repeats",
    "metric_values",
    "one_calibration",
    "published_orders",
    "rank_agreement",
    "topk_overlap",
    "training_axis",
    "training_stats",
    "training_summary",
]
