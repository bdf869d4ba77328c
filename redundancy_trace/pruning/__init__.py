"""Drop components of a model: plans of what goes, the drop in memory, and exports that others can run.

`plans` is what a plan is, `selecting` makes one from scores, `iterating` by scoring again and again; `inplace` drops in
memory. Plans need no torch.
"""

from redundancy_trace.pruning.plans import DroppedComponent, DropPlan, read_plan
from redundancy_trace.pruning.selecting import parse_spec, plan_drop

__all__ = [
    "DropPlan",
    "DroppedComponent",
    "parse_spec",
    "plan_drop",
    "read_plan",
]
