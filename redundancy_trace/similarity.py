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
    # `vector_norm` of order infinity is many times slower.
    largest = x_D.abs().amax(dim=-1, keepdim=True)
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


# Nearer to 1 than this, a cosine is computed from the difference of its two rows: 1 − cosine has lost digits.
_NEAR = 1e-9


def pairwise_similarity(rows_TND: Tensor) -> Tensor:
    """Cosine and angular distance of a token's N rows, each with each that follows, from their products in float64.

    Args:
        rows_TND: Rows of any length, shape (T, N, D), any float dtype.

    Returns:
        Shape (2, T, N, N), float64: as `unit_similarity` where i < j, NaN elsewhere and where a row is all zero.
    """
    # Squares of float32 neither over- nor underflow in float64.
    wide_TND = to_float64(rows_TND)
    gram = wide_TND @ wide_TND.mT
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], offset=1, device=gram.device)
    cosine = (gram[:, i, j] / (lengths[:, i] * lengths[:, j])).clamp(-1, 1)
    angle = 2 * torch.atan2((1 - cosine).sqrt(), (1 + cosine).sqrt()) / torch.pi
    pairs = torch.stack((cosine, angle))
    token, pair = torch.where(cosine > 1 - _NEAR)
    near = [unit(rows_TND[token.to(rows_TND.device), of[pair].to(rows_TND.device)]) for of in (i, j)]
    pairs[:, token, pair] = unit_similarity(*near).to(pairs.device)
    both = pairs.new_full((2, *gram.shape), torch.nan)
    both[:, :, i, j] = pairs
    return both


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


def compare(x_D: Tensor, update_D: Tensor) -> Tensor:
    """All four metrics of one component, token by token; Y is X + update.

    The update is split into t·x along X and v across it. Then |Y| has the parts (1 + t)·|x| and |v|, from which cosine
    and angle follow without a difference of large numbers, and X and the update are each read a few times, Y never.

    Args:
        x_D: Residual stream where the component branches off, shape (..., D), any float dtype.
        update_D: What the component adds, the same shape.

    Returns:
        Shape (4, ...), float64, in the order of `COMPARED`. NaN marks a token that is left out of that metric's mean
        because a vector it needs is zero; infinity, in all four, one whose X, Y or update is not finite.
    """
    x_D, update_D = x_D.float(), update_D.float()
    x, update, dot = _length(x_D), _length(update_D), to_float64(torch.linalg.vecdot(x_D, update_D))
    # The coefficient that both parts are computed with: what float32 rounds off it is in v and (1 + t) alike.
    t = (dot / x.square()).to(x_D.device, torch.float32)
    across = _length(torch.addcmul(update_D, x_D, t.unsqueeze(-1), value=-1))
    along = (1 + to_float64(t)) * x
    y = torch.hypot(along, across)
    compared = torch.stack(
        (along / y, torch.atan2(across, along) / torch.pi, update / x, (dot / (x * update)).clamp(-1, 1))
    )
    # What these squares over- or underflow, what is zero, not finite, or cancelled by its update.
    plain = (x > _SHORT) & (x < _LONG) & (update > _SHORT) & (update < _LONG) & (y > _CANCELLED * x)
    if not bool(plain.all()):
        rare = (~plain).to(x_D.device)
        compared[:, ~plain] = _compare_rare(x_D[rare], update_D[rare])
    return compared


# Between these lengths squares and products of rows lose nothing in float32 that shows.
_SHORT, _LONG = 1e-12, 1e15
# Y as a share of X below which Y is known better from its own sum.
_CANCELLED = 1e-2
# Share of the update's square across X below which the difference of two squares has lost digits that show.
_ALONG = 0.25


def compare_lengths(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`compare` from |X|, |update| and X·update alone, where these tell enough.

    Args:
        lengths: The three of every token, shape (3, ...), float32.

    Returns:
        Shape (4, ...), float64, as of `compare`; and which tokens it holds for, shape (...), bool: `compare` must be
        asked for the others, whose rows are extreme, zero, not finite, or cancelled by or nearly along their update.
    """
    x, update, dot = to_float64(lengths)
    along2 = (dot / x).square()
    across2 = update.square() - along2
    along, across = x + dot / x, across2.clamp_min(0).sqrt()
    y = torch.hypot(along, across)
    compared = torch.stack((along / y, torch.atan2(across, along) / torch.pi, update / x, dot / (x * update)))
    enough = (x > _SHORT) & (x < _LONG) & (update > _SHORT) & (update < _LONG)
    return compared, enough & (y > _CANCELLED * x) & (across2 > _ALONG * update.square())


def _length(x_D: Tensor) -> Tensor:
    return to_float64(torch.linalg.vector_norm(x_D, dim=-1))


def _compare_rare(x_D: Tensor, update_D: Tensor) -> Tensor:
    """As `compare` for rows of any size, rows of zeros and such that are not finite, in a few passes more."""
    y_D = x_D + update_D
    x_unit = unit(x_D)
    similarity = unit_similarity(x_unit, unit(y_D))
    # A token is left out of the norm's mean as of the cosine's: where x or y is zero.
    norm = torch.where(similarity[0].isnan(), torch.nan, relative_norm(update_D, x_D))
    direction = unit_similarity(unit(update_D), x_unit)[0]
    compared = torch.cat((similarity, norm[None], direction[None]))
    finite = torch.isfinite(y_D).all(dim=-1) & torch.isfinite(x_D).all(dim=-1)
    return torch.where(finite.to(compared.device), compared, torch.inf)
