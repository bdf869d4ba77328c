"""See how redundancy arises in language models while they train.

Attention, MLP and block of every layer are scored at every checkpoint. Importing this package imports neither torch
nor transformers nor matplotlib; its functions do when they need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redundancy_trace.analysis import (
        calibration_agreement,
        checkpoint_statistics,
        drop_onset,
        importance_trends,
        leave_out_duplicates,
        rank_agreement,
        topk_overlap,
        training_stats,
    )
    from redundancy_trace.checkpoints import list_checkpoints
    from redundancy_trace.errors import CheckpointError, InputError, TraceError
    from redundancy_trace.figures import (
        draw_evaluations,
        draw_figures,
        draw_models,
        plot_agreement,
        plot_agreements,
        plot_calibration,
        plot_calibrations,
        plot_decomposition,
        plot_decompositions,
        plot_depth,
        plot_depths,
        plot_distances,
        plot_distances_over_training,
        plot_drop_along,
        plot_drop_order,
        plot_drop_orders,
        plot_drop_orders_over_training,
        plot_drops_along,
        plot_heatmap,
        plot_joint,
        plot_loss,
        plot_models,
        plot_models_side_by_side,
        plot_overlap,
        plot_overlaps,
        plot_qualities,
        plot_quality,
        plot_tradeoff,
        plot_tradeoffs,
        plot_training_heatmaps,
        plot_trends,
    )
    from redundancy_trace.loading import load_model, load_tokenizer
    from redundancy_trace.pruning import DropPlan, plan_drop, read_plan
    from redundancy_trace.pruning.exporting import prune
    from redundancy_trace.pruning.inplace import drop_, dropped
    from redundancy_trace.report import write_report
    from redundancy_trace.store import read_distances, read_duplicates, read_evaluations, read_scores
    from redundancy_trace.sweep import evaluate, evaluate_along, score_model, trace

# Public name → the module that has it.
_HOMES = {
    "CheckpointError": "errors",
    "DropPlan": "pruning",
    "InputError": "errors",
    "TraceError": "errors",
    "draw_evaluations": "figures",
    "calibration_agreement": "analysis",
    "checkpoint_statistics": "analysis",
    "draw_figures": "figures",
    "drop_onset": "analysis",
    "importance_trends": "analysis",
    "drop_": "pruning.inplace",
    "dropped": "pruning.inplace",
    "evaluate": "sweep",
    "evaluate_along": "sweep",
    "leave_out_duplicates": "analysis",
    "list_checkpoints": "checkpoints",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "plan_drop": "pruning",
    "plot_depth": "figures",
    "plot_depths": "figures",
    "plot_drop_along": "figures",
    "plot_heatmap": "figures",
    "plot_joint": "figures",
    "plot_loss": "figures",
    "plot_quality": "figures",
    "plot_tradeoff": "figures",
    "plot_tradeoffs": "figures",
    "plot_training_heatmaps": "figures",
    "rank_agreement": "analysis",
    "prune": "pruning.exporting",
    "published_orders": "analysis",
    "read_distances": "store",
    "read_duplicates": "store",
    "read_evaluations": "store",
    "read_plan": "pruning",
    "read_scores": "store",
    "score_model": "sweep",
    "topk_overlap": "analysis",
    "trace": "sweep",
    "training_stats": "analysis",
    "write_report": "report",
    "draw_models": "figures",
    "plot_agreement": "figures",
    "plot_agreements": "figures",
    "plot_calibration": "figures",
    "plot_calibrations": "figures",
    "plot_decomposition": "figures",
    "plot_decompositions": "figures",
    "plot_distances": "figures",
    "plot_distances_over_training": "figures",
    "plot_drop_order": "figures",
    "plot_drop_orders": "figures",
    "plot_drop_orders_over_training": "figures",
    "plot_drops_along": "figures",
    "plot_models": "figures",
    "plot_models_side_by_side": "figures",
    "plot_overlap": "figures",
    "plot_overlaps": "figures",
    "plot_qualities": "figures",
    "plot_trends": "figures",
}

__all__ = [
    "CheckpointError",
    "DropPlan",
    "InputError",
    "TraceError",
    "calibration_agreement",
    "checkpoint_statistics",
    "draw_evaluations",
    "draw_figures",
    "draw_models",
    "drop_",
    "drop_onset",
    "dropped",
    "evaluate",
    "evaluate_along",
    "importance_trends",
    "leave_out_duplicates",
    "list_checkpoints",
    "load_model",
    "load_tokenizer",
    "plan_drop",
    "plot_agreement",
    "plot_agreements",
    "plot_calibration",
    "plot_calibrations",
    "plot_decomposition",
    "plot_decompositions",
    "plot_depth",
    "plot_depths",
    "plot_distances",
    "plot_distances_over_training",
    "plot_drop_along",
    "plot_drop_order",
    "plot_drop_orders",
    "plot_drop_orders_over_training",
    "plot_drops_along",
    "plot_heatmap",
    "plot_joint",
    "plot_loss",
    "plot_models",
    "plot_models_side_by_side",
    "plot_overlap",
    "plot_overlaps",
    "plot_qualities",
    "plot_quality",
    "plot_tradeoff",
    "plot_tradeoffs",
    "plot_training_heatmaps",
    "plot_trends",
    "prune",
    "published_orders",
    "rank_agreement",
    "read_distances",
    "read_duplicates",
    "read_evaluations",
    "read_plan",
    "read_scores",
    "score_model",
    "topk_overlap",
    "trace",
    "training_stats",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
