"""What the stored scores say: values, agreement, trends. Polars in and out, no torch.

`frames` checks and orders the rows; `axis` places the checkpoints in training; `duplicates` leaves out what repeats
others; `summary` gives a row a checkpoint.
"""

from redundancy_trace.analysis.axis import Axis, is_log_spaced, training_axis
from redundancy_trace.analysis.duplicates import blank_duplicates, leave_out_duplicates, mark_repeats
from redundancy_trace.analysis.frames import CHECKPOINT_COLUMNS, checkpoint_order, metric_values, one_calibration
from redundancy_trace.analysis.summary import training_summary

__all__ = [
    "CHECKPOINT_COLUMNS",
    "Axis",
    "blank_duplicates",
    "checkpoint_order",
    "is_log_spaced",
    "leave_out_duplicates",
    "mark_repeats",
    "metric_values",
    "one_calibration",
    "training_axis",
    "training_summary",
]
