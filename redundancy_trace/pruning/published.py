"""Drop orders that the paper published, to be shown beside those found here."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

_FILE = "published_orders.json"


@dataclass(frozen=True)
class PublishedOrders:
    """The layers that the paper dropped of one model, most redundant first.

    Attributes:
        repositories: The Hub repositories that hold the model.
        n_layers: Its number of layers.
        attn: First eight layers whose attention was dropped.
        mlp: First eight layers whose MLP was dropped.
        block: First eight layers that were dropped whole.
        source: Where the numbers stand.
    """

    repositories: tuple[str, ...]
    n_layers: int
    attn: tuple[int, ...]
    mlp: tuple[int, ...]
    block: tuple[int, ...]
    source: str


def published_orders(model: str) -> PublishedOrders | None:
    """The drop orders that the paper published of a model; None of most.

    Args:
        model: Hub repository; the organisation may be left out, capitals do not matter.

    Example:
        >>> published_orders("mistralai/Mistral-7B-v0.1").attn[:4]
        (25, 26, 24, 22)
    """
    wanted = model.strip().lower().split("/")
    return next((orders for orders in _all() if any(_is_called(name, wanted) for name in orders.repositories)), None)


def _is_called(repository: str, wanted: list[str]) -> bool:
    return repository.lower().split("/")[-len(wanted) :] == wanted


@cache
def _all() -> tuple[PublishedOrders, ...]:
    held: dict[str, Any] = json.loads(files(__package__).joinpath(_FILE).read_text(encoding="utf-8"))
    return tuple(
        PublishedOrders(
            repositories=tuple(model["repositories"]),
            n_layers=model["n_layers"],
            attn=tuple(model["attn"]),
            mlp=tuple(model["mlp"]),
            block=tuple(model["block"]),
            source=held["source"],
        )
        for model in held["models"]
    )
