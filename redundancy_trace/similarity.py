"""How far a component moves the residual stream: pure functions of tensors, float32 inside.

Shape letters of the package: B sequences of a batch, T tokens, D width, L layers, N all sequences of the calibration.
"""

import torch
from torch import Tensor

# The order in which `compare` stacks its results; names and ranges are in `redundancy_trace.metrics`.
COMPARED = ("cosine_similarity", "angular_distance", "relative_norm", "update_cosine")


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU if its device has none (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _scaled(x_D: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float32 divided by their largest number, so that no square over- or underflows, and that number."""
    x_D = x_D.float()
    largest = torch.linalg.vector_norm(x_D, ord=torch.inf, dim=-1, keepdim=True)
    # The bound keeps a row of zeros a row of zeros.
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    return x_D / largest, largest.squeeze(-1)


def _norm(x_D: Tensor) -> Tensor:
    scaled_D, largest = _scaled(x_D)
    return to_float64(largest) * to_float64(torch.linalg.vector_norm(scaled_D, dim=-1))


def unit(x_D: Tensor) -> Tensor:
    """Rows of length 1 in float32, shape as `x_D` (..., D); NaN for a row that is all zero.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    scaled_D, _ = _scaled(x_D)
    return torch.div(scaled_D, torch.linalg.vector_norm(scaled_D, dim=-1, keepdim=True))


def unit_similarity(x_unit_D: Tensor, y_unit_D: Tensor) -> Tensor:
    """Cosine and angular distance of matching unit rows.

    Both come from the chords |x̂ − ŷ| and |x̂ + ŷ|, so that 1 − cosine keeps its leading digits where a sublayer
    changes almost nothing; a float32 dot product would round it to multiples of 6e-8.

    Args:
        x_unit_D: Rows from `unit`, shape (..., D), float32.
        y_unit_D: The same shape.

    Returns:
        Shape (2, ...), float64: cosine in [-1, 1] and angle as a share of half a turn in [0, 1]; NaN where a row is.
    """
    apart = to_float64(torch.linalg.vector_norm(x_unit_D - y_unit_D, dim=-1))
    together = to_float64(torch.linalg.vector_norm(x_unit_D + y_unit_D, dim=-1))
    apart2, together2 = apart.square(), together.square()
    cosine = 1 - 2 * apart2 / (apart2 + together2)
    angle = 2 * torch.atan2(apart, together) / torch.pi
    return torch.stack((cosine, angle))


def cosine_similarity(x_D: Tensor, y_D: Tensor) -> Tensor:
    """cos(x, y) of matching rows (arXiv 2406.15786, eq. 1): 1 = same direction = redundant.

    Args:
        x_D: Residual stream before the component, shape (..., D), any float dtype.
        y_D: Residual stream behind it, the same shape.

    Returns:
        Shape (...), float64, in [-1, 1]; NaN where a row is all zero.

    Example:
        >>> cosine_similarity(torch.eye(2), torch.eye(2)).tolist()
        [1.0, 1.0]
    """
    return unit_similarity(unit(x_D), unit(y_D))[0]


def angular_distance(x_D: Tensor, y_D: Tensor) -> Tensor:
    """Angle between matching rows as a share of half a turn, 2·atan2(|x̂−ŷ|, |x̂+ŷ|)/π: 0 = redundant.

    The quantity of arXiv 2403.17887, in a form that is exact at 0 where arccos is not.

    Args:
        x_D: Shape (..., D), any float dtype.
        y_D: The same shape.

    Returns:
        Shape (...), float64, in [0, 1]; NaN where a row is all zero.

    Example:
        >>> angular_distance(torch.eye(2), -torch.eye(2)).tolist()
        [1.0, 1.0]
    """
    return unit_similarity(unit(x_D), unit(y_D))[1]


def relative_norm(update_D: Tensor, x_D: Tensor) -> Tensor:
    """|update| / |x| of matching rows, shape (...), float64, at least 0: 0 = nothing is added; not finite at x = 0."""
    return torch.div(_norm(update_D), _norm(x_D))


def compare(x_D: Tensor, y_D: Tensor, update_D: Tensor) -> Tensor:
    """All four metrics of one component, token by token.

    Args:
        x_D: Residual stream where the component branches off, shape (..., D), any float dtype.
        y_D: Residual stream with the component's update, the same shape.
        update_D: What the component adds, the same shape.

    Returns:
        Shape (4, ...), float64, in the order of `COMPARED`. NaN marks a token that is left out of that metric's mean
        because a vector it needs is zero; finite input gives no other NaN.
    """
    x_unit = unit(x_D)
    similarity = unit_similarity(x_unit, unit(y_D))
    # A token is left out of the norm's mean as of the cosine's: where x or y is zero.
    norm = torch.where(similarity[0].isnan(), torch.nan, relative_norm(update_D, x_D))
    direction = unit_similarity(unit(update_D), x_unit)[0]
    return torch.cat((similarity, norm[None], direction[None]))
