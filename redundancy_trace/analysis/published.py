"""Drop orders that others published of a model, beside those found here."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from redundancy_trace.analysis.ranks import chance_overlap, drop_places
from redundancy_trace.analysis.series import Series

_FILE = "published_orders.json"
_COMPONENTS = ("attn", "mlp", "block")


@dataclass(frozen=True)
class PublishedOrders:
    """The layers that others dropped of one model, most redundant first; empty where none are published.

    Attributes:
        repositories: The Hub repositories that hold the model.
        n_layers: Its number of layers.
        attn: First layers whose attention was dropped.
        mlp: First layers whose MLP was dropped.
        block: First layers that were dropped whole.
        source: Where the numbers stand.
    """

    repositories: tuple[str, ...]
    n_layers: int
    attn: tuple[int, ...]
    mlp: tuple[int, ...]
    block: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class BesidePublished:
    """A published drop order of one component, and that of a checkpoint.

    Attributes:
        component: `attn`, `mlp` or `block`.
        published: Layers, most redundant first; k of them.
        here: The k most redundant layers of the checkpoint, likewise.
        revision: The checkpoint.
        shared: How many are in both.
        overlap: Jaccard of the two sets, 0 … 1.
        chance: Expected overlap with k layers drawn at random.
        source: Where the published order stands.
    """

    component: str
    published: tuple[int, ...]
    here: tuple[int, ...]
    revision: str
    shared: int
    overlap: float
    chance: float
    source: str


def published_orders(model: str) -> PublishedOrders | None:
    """The drop orders that were published of a model; None of most.

    Args:
        model: Hub repository; the organisation may be left out, capitals do not matter.

    Example:
        >>> published_orders("mistralai/Mistral-7B-v0.1").attn[:4]
        (25, 26, 24, 22)
    """
    wanted = model.strip().lower().split("/")
    return next((orders for orders in _all() if any(_is_called(name, wanted) for name in orders.repositories)), None)


def beside_published(model: str | None, series: Series) -> tuple[BesidePublished, ...]:
    """The published orders of a model beside those of the last checkpoint of a series.

    Returns:
        One a component; none where nothing is published of a model of that name and number of layers.
    """
    orders = published_orders(model) if model else None
    if orders is None:
        return ()
    revision = series.checkpoints["revision"][-1]
    found = []
    for component in _COMPONENTS:
        published, grid = getattr(orders, component), series.grids.get(component)
        if not published or grid is None or grid.layers != tuple(range(orders.n_layers)):
            continue
        k = len(published)
        here = tuple(int(layer) for layer in drop_places(grid.values[-1]).argsort()[:k])
        shared = len({*here} & {*published})
        chance = float(chance_overlap(orders.n_layers)[0][k - 1])
        found.append(
            BesidePublished(
                component, published, here, revision, shared, shared / (2 * k - shared), chance, orders.source
            )
        )
    return tuple(found)


def _is_called(repository: str, wanted: list[str]) -> bool:
    return repository.lower().split("/")[-len(wanted) :] == wanted


@cache
def _all() -> tuple[PublishedOrders, ...]:
    held: list[dict[str, Any]] = json.loads(files(__package__).joinpath(_FILE).read_text(encoding="utf-8"))
    return tuple(
        PublishedOrders(
            repositories=tuple(model["repositories"]),
            n_layers=model["n_layers"],
            **{component: tuple(model.get(component, ())) for component in _COMPONENTS},
            source=source["source"],
        )
        for source in held
        for model in source["models"]
    )
