"""How far orders agree: pure functions of importances, shape (checkpoints, layers), for all checkpoints at once.

The most redundant layer, the one of the smallest importance, comes first. One call of scipy for every pair would take
minutes on a long run; the tests hold every function here against scipy's own.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


def spearman(one: Array, other: Array) -> Array:
    """Spearman's rank correlation of every row of one with every row of the other, ties sharing their mean rank.

    Args:
        one: Shape (A, L).
        other: Shape (B, L).

    Returns:
        Shape (A, B), −1 … 1; NaN where a row holds one value only.
    """
    return _correlation(_centred_ranks(one), _centred_ranks(other))


def spearman_of_rows(one: Array, other: Array) -> Array:
    """As `spearman`, of row k with row k along the last axis; other axes are broadcast."""
    a, b = _centred_ranks(one), _centred_ranks(other)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.clip(found, -1.0, 1.0)


def kendall(one: Array, other: Array) -> Array:
    """Kendall's tau-b of every row of one with every row of the other; shapes and NaN as for `spearman`."""
    return _correlation(_signs(one), _signs(other))


def weighted_tau(one: Array, other: Array) -> Array:
    """Weighted tau (Vigna 2015) of every row with every row, the most redundant layers weighing most.

    It is `scipy.stats.weightedtau` of the negative importances as scipy has it by default: an exchange of the layers at
    places r and s weighs 1 / (r + 1) + 1 / (s + 1), and the mean of the taus by both rows' places is taken. Shapes
    and NaN as for `spearman`.
    """
    found: Array = (_tau_by_places(one, other) + _tau_by_places(other, one).T) / 2
    return found


def drop_places(importance: Array) -> Counts:
    """Place of every layer along the last axis in the order of dropping, 0 = the first; of equals the lower layer."""
    order = np.argsort(importance, axis=-1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
    return places


def shared_layers(places: Counts, last: Counts) -> Counts:
    """How many of the k layers that go first are among the k of another order, for every k.

    Args:
        places: From `drop_places`, shape (…, L).
        last: Those of the order to compare with; broadcast.

    Returns:
        Shape (…, L), entry k − 1 for k layers.
    """
    worse = np.maximum(places, last)  # a layer is shared from this k on
    n_layers = worse.shape[-1]
    rows = worse.reshape(-1, n_layers)
    cells = rows + n_layers * np.arange(len(rows))[:, None]
    counts = np.bincount(cells.reshape(-1), minlength=rows.size).reshape(rows.shape)
    return counts.cumsum(axis=1).reshape(worse.shape)


def jaccard(shared: Counts) -> Array:
    """Overlap of two sets of k layers, shared ÷ together, 0 … 1; shapes as `shared_layers` gives them."""
    k = np.arange(1, shared.shape[-1] + 1)
    return np.asarray(shared / (2 * k - shared))


def chance_overlap(n_layers: int, quantile: float = 0.95) -> tuple[Array, Array]:
    """Overlap (Jaccard) of two sets of k out of L layers drawn at random, for k = 1 … L.

    Args:
        n_layers: L.
        quantile: Share of draws that the second number is not exceeded in.

    Returns:
        The expected overlap and that quantile of it, shape (L,) each.
    """
    expected, high = np.empty(n_layers), np.empty(n_layers)
    for k in range(1, n_layers + 1):
        # Of the hypergeometric distribution, in whole numbers; `scipy.stats` takes longer to import than all of this.
        sets = np.array([math.comb(k, shared) * math.comb(n_layers - k, k - shared) for shared in range(k + 1)])
        chance = (sets / math.comb(n_layers, k)).astype(np.float64)
        overlap = np.arange(k + 1) / (2 * k - np.arange(k + 1))
        expected[k - 1] = chance @ overlap
        high[k - 1] = overlap[np.searchsorted(chance.cumsum(), quantile)]
    return expected, high


def settled_from(shared: Counts) -> Counts:
    """The first checkpoint from which the k layers that go first are those of the last one until the end.

    Args:
        shared: From `shared_layers` with the last checkpoint's order, shape (…, checkpoints, L).

    Returns:
        Shape (…, L), an index of a checkpoint for every k.
    """
    same = shared == np.arange(1, shared.shape[-1] + 1)
    held = np.logical_and.accumulate(same[..., ::-1, :], axis=-2)
    return np.asarray(shared.shape[-2] - held.sum(axis=-2))


def _centred_ranks(values: Array) -> Array:
    middle = (values.shape[-1] - 1) / 2
    ordered = np.sort(values, axis=-1)
    if (ordered[..., 1:] > ordered[..., :-1]).all():  # no ties, as of most scores: scipy need not be imported
        return np.asarray(drop_places(values) - middle)
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1) - 1 - middle)


def _signs(values: Array) -> Array:
    """Sign of the difference of every two layers, shape (A, L (L − 1) / 2)."""
    first, second = np.triu_indices(values.shape[1], 1)
    return np.asarray(np.sign(values[:, first] - values[:, second]))


def _correlation(one: Array, other: Array) -> Array:
    norms = np.sqrt((one**2).sum(1))[:, None] * np.sqrt((other**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = one @ other.T / norms
    return found.clip(-1.0, 1.0)


def _tau_by_places(one: Array, other: Array) -> Array:
    """Weighted tau, the places being those of the rows of `one`; where values tie, those of `other` decide."""
    signs, others = _signs(one), _signs(other)
    first, second = np.triu_indices(one.shape[1], 1)
    weight = 1.0 / (1.0 + drop_places(one))
    found = _weighted(signs, weight[:, first] + weight[:, second], others)
    for k in np.flatnonzero((signs == 0).any(axis=1)):
        order = np.lexsort((other, np.broadcast_to(one[k], other.shape)))
        weight = 1.0 / (1.0 + np.argsort(order, axis=1))
        pairs = weight[:, first] + weight[:, second]
        row, square = signs[k] * pairs, np.abs(signs[k]) * pairs
        with np.errstate(invalid="ignore", divide="ignore"):
            found[k] = (row * others).sum(1) / np.sqrt(square.sum(1) * (pairs * others**2).sum(1))
    return np.clip(found, -1.0, 1.0)


def _weighted(signs: Array, weights: Array, others: Array) -> Array:
    squares = np.sqrt((signs**2 * weights).sum(1))[:, None] * np.sqrt(weights @ (others**2).T)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (signs * weights) @ others.T / squares
    return found
