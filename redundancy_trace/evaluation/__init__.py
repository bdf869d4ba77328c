"""What a model can do, how fast and in how much memory, whole and with components dropped.

`windows` cuts the text, `loss` measures it, `speed` and `memory` time and weigh a generation, `tasks` asks lm-eval;
`dropping` carries plans out one after the other; `measuring` makes rows of all of it.
"""

from redundancy_trace.evaluation.loss import text_errors
from redundancy_trace.evaluation.measuring import (
    along_rows,
    curve_plans,
    curve_rows,
    loss_rows,
    speed_rows,
    task_rows,
)
from redundancy_trace.evaluation.speed import Load, positions_in
from redundancy_trace.evaluation.windows import Windows, counted_sequences, cut_windows, tokens_needed

__all__ = [
    "Load",
    "Windows",
    "along_rows",
    "counted_sequences",
    "curve_plans",
    "curve_rows",
    "cut_windows",
    "loss_rows",
    "positions_in",
    "speed_rows",
    "task_rows",
    "text_errors",
    "tokens_needed",
]
