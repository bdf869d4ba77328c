"""Drop the components of a plan from a model in memory, for good or for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redundancy_trace.blocks import find_layers
from redundancy_trace.blocks.dropping import drop_layers_
from redundancy_trace.errors import InputError
from redundancy_trace.pruning.plans import DropPlan


def drop_(model: Any, plan: DropPlan) -> Any:
    """Drop the components of a plan from a model, in place.

    What is dropped is neither computed nor kept: its modules, and norms that served it alone, are replaced by stand-ins
    without weights. Where an attention was, a cache of keys and values holds two numbers a token, from which it knows
    its length; `forward` with and without a cache, and `generate`, agree. What a plan drops, and that the layer then
    computes x + what is left, is proven by trying, for any architecture that can be scored.

    Args:
        model: A causal language model of transformers, such as `load_model` gives.
        plan: From `plan_drop` or `read_plan`.

    Returns:
        The model.

    Raises:
        InputError: The plan is of a model with another number of layers.
        CheckpointError: What is to be dropped cannot be proven; the model is left as it is.

    Example:
        >>> model = drop_(load_model("EleutherAI/pythia-160m", "step143000"), plan)  # doctest: +SKIP
    """
    _dropped(model, plan)
    return model


@contextmanager
def dropped(model: Any, plan: DropPlan) -> Iterator[Any]:
    """The model without the components of a plan, as long as this is open; as before afterwards.

    Args:
        model: As for `drop_`.
        plan: As for `drop_`.

    Raises:
        InputError: As `drop_`.
        CheckpointError: As `drop_`.

    Example:
        >>> with dropped(model, plan):  # doctest: +SKIP
        ...     model.generate(ids)
    """
    undo = _dropped(model, plan)
    try:
        yield model
    finally:
        undo()


def check_layers(plan: DropPlan, n_layers: int) -> None:
    """Refuse a plan of a model with another number of layers.

    Raises:
        InputError: It is.
    """
    if n_layers != plan.n_layers:
        raise InputError(
            f"The plan is of {plan.model or 'a model'} with {plan.n_layers} layers; this model has {n_layers}. Make a "
            "plan from scores of this model."
        )


def _dropped(model: Any, plan: DropPlan) -> Callable[[], None]:
    check_layers(plan, len(find_layers(model)[1]))
    return drop_layers_(model, plan.by_layer())
