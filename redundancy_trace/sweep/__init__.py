"""The sweep over a model's checkpoints. The only part that knows the order of the work.

`running` goes from list to figures; `planning` tells what it takes, `calibrating` finds the run's token ids, `tasks`
what is left to do, `pipeline` fetches and scores it; `calls` are the same from Python.
"""

from redundancy_trace.sweep.calls import score_model, settings_from, trace
from redundancy_trace.sweep.running import SweepResult, failure_summary, run_sweep

__all__ = ["SweepResult", "failure_summary", "run_sweep", "score_model", "settings_from", "trace"]
