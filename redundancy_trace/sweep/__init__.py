"""The sweep over a model's checkpoints, and evaluations of them. The only part that knows the order of the work.

`running` goes from list to figures; `planning` tells what it takes, `calibrating` finds the run's token ids, `tasks`
what is left to do, `pipeline` fetches and scores it; `evaluating` measures one checkpoint (`subjects`: on disk or in
memory; `folders`: what cannot be), `along` those of a run; `calls` are the same from Python.
"""

from redundancy_trace.sweep.calls import (
    evaluate,
    evaluate_along,
    evaluation_failures,
    score_model,
    settings_from,
    trace,
)
from redundancy_trace.sweep.running import SweepResult, failure_summary, run_sweep

__all__ = [
    "SweepResult",
    "evaluate",
    "evaluate_along",
    "evaluation_failures",
    "failure_summary",
    "run_sweep",
    "score_model",
    "settings_from",
    "trace",
]
