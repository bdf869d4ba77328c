"""The metrics as functions of vectors: what must hold for any of them, and how exact they are near identity."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from redundancy_trace.similarity import (
    COMPARED,
    angular_distance,
    compare,
    compare_lengths,
    cosine_similarity,
    pairwise_similarity,
    relative_norm,
    unit,
    unit_similarity,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 6
# Full float32 range but for the largest numbers, whose sum with another would be infinite.
any_float = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
modest = st.floats(-100, 100, width=32, allow_subnormal=False)


def rows(elements):
    return arrays(np.float32, (3, WIDTH), elements=elements).map(torch.from_numpy)


def is_zero(x):
    return (x == 0).all(dim=-1)


def exact_cosine(x, y):
    """In rational arithmetic up to the one square root at the end."""
    x, y = ([Fraction(float(v)) for v in row] for row in (x, y))
    dot, xx, yy = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, y), (x, x), (y, y)))
    return float(dot / abs(dot)) * float(dot * dot / (xx * yy)) ** 0.5 if dot else 0.0


@given(rows(any_float), rows(any_float))
def test_ranges_and_which_tokens_are_left_out(x, update):
    y = x + update
    compared = compare(x, update)
    assert compared.shape == (4, 3)
    assert compared.dtype == torch.float64
    cosine, angle, norm, direction = compared
    left_out = is_zero(x) | is_zero(y)
    for metric in (cosine, angle, norm):
        assert torch.equal(metric.isnan(), left_out)
    assert torch.equal(direction.isnan(), is_zero(x) | is_zero(update))
    assert ((cosine[~left_out] >= -1) & (cosine[~left_out] <= 1)).all()
    assert ((angle[~left_out] >= 0) & (angle[~left_out] <= 1)).all()
    assert (norm[~left_out] >= 0).all()
    assert torch.isfinite(norm[~left_out]).all()


@given(rows(any_float), st.floats(0.001, 1000))
def test_same_direction_is_redundant_and_opposite_is_the_far_end(x, scale):
    x = x[~is_zero(x) & (x.abs().amax(dim=-1) < 1e30) & (x.abs().amax(dim=-1) > 1e-30)]
    for y in (x, x * scale):
        torch.testing.assert_close(cosine_similarity(x, y), torch.ones(len(x), dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(angular_distance(x, y), torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=1e-6)
    assert (cosine_similarity(x, x) == 1).all()
    assert (angular_distance(x, x) == 0).all()
    assert (cosine_similarity(x, -x) == -1).all()
    assert (angular_distance(x, -x) == 1).all()


@given(rows(modest), rows(modest))
def test_symmetric_and_blind_to_scale(x, y):
    x, y = (torch.where(is_zero(t)[:, None], 1.0, t) for t in (x, y))
    for metric in (cosine_similarity, angular_distance):
        assert torch.equal(metric(x, y), metric(y, x))
        torch.testing.assert_close(metric(x * 8, y / 4), metric(x, y), rtol=0, atol=1e-6)
    torch.testing.assert_close(relative_norm(y * 2, x), relative_norm(y, x) * 2)


@given(st.integers(0, 2**32))
def test_blind_to_rotation(seed):
    generator = torch.Generator().manual_seed(seed)
    x, update = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    turned = compare(x @ rotation, update @ rotation)
    torch.testing.assert_close(turned, compare(x, update), rtol=1e-5, atol=1e-6)


@given(rows(modest), rows(modest))
def test_cosine_is_that_of_exact_arithmetic(x, y):
    for row_x, row_y, found in zip(x, y, cosine_similarity(x, y).tolist(), strict=True):
        if not (is_zero(row_x) or is_zero(row_y)):
            assert found == pytest.approx(exact_cosine(row_x, row_y), abs=1e-6)


@given(st.integers(0, 2**32), st.sampled_from([1e-2, 1e-3, 1e-4]))
@settings(max_examples=30)
def test_leading_digits_of_importance_survive_near_identity(seed, size):
    """1 − cos down to 5e-9, below the 6e-8 to which a float32 cosine is rounded."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, generator=generator)
    y = x + size * torch.randn(256, generator=generator)
    x64, y64 = x.double(), y.double()
    x64, y64 = x64 / x64.norm(), y64 / y64.norm()
    exact = float((x64 - y64).square().sum() / 2)
    # What is left is the rounding of the unit rows, 6e-8 against their distance `size`.
    assert 1 - float(cosine_similarity(x, y)) == pytest.approx(exact, rel=1e-6 / size)
    assert float(angular_distance(x, y)) == pytest.approx((2 * exact) ** 0.5 / np.pi, rel=1e-6 / size + 1e-4)
    assert exact < size**2


@given(st.integers(0, 2**32), st.floats(0.01, 10))
def test_identity_of_size_and_direction(seed, size):
    """cos(X, X + A) = (1 + r c) / √(1 + 2 r c + r²) with r = |A| / |X| and c = cos(A, X)."""
    generator = torch.Generator().manual_seed(seed)
    x, update = torch.randn(2, 4, 32, generator=generator)
    cosine, angle, r, c = compare(x, size * update)
    torch.testing.assert_close(cosine, (1 + r * c) / (1 + 2 * r * c + r**2).sqrt(), rtol=0, atol=1e-6)
    torch.testing.assert_close(angle, cosine.acos() / torch.pi, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1.0, 1e20, 3e38])
def test_no_row_is_too_small_or_too_large(size):
    """Squares of 1e-30 and 1e20 have no place in float32; such rows are not zero and not infinite."""
    x = torch.tensor([[size, 0.0], [0.0, size]])
    update = x.flip(-1)
    similarity = compare(x, update)
    expected = torch.tensor([0.5**0.5, 0.25, 1.0, 0.0], dtype=torch.float64)[:, None].expand(4, 2)
    torch.testing.assert_close(similarity, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_compared_in_float32():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = (x.float() * 1.01 + 0.1).bfloat16()
    assert torch.equal(compare(x, y), compare(x.float(), y.float()))
    assert unit(x).dtype == torch.float32


def test_order_is_that_of_the_names():
    x, update = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = dict(zip(COMPARED, compare(x, update)[:, 0].tolist(), strict=True))
    assert found == pytest.approx(
        {"cosine_similarity": 0.5**0.5, "angular_distance": 0.25, "relative_norm": 1.0, "update_cosine": 0.0}, abs=1e-7
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-2, 1e-4, 1e-6, 0.0]))
def test_all_pairs_at_once_are_as_each_by_itself(seed, apart):
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, 5, 1, 48, generator=generator)
    rows_ND = first + apart * noise * torch.arange(4)[:, None]
    rows_ND[0, 1] = 0
    wide = rows_ND.double()
    units = wide / wide.norm(dim=-1, keepdim=True)
    found = pairwise_similarity(rows_ND * 2.0 ** torch.tensor([-100, 0, 80, 1])[:, None])  # lengths do not matter
    expected = unit_similarity(*torch.broadcast_tensors(units.unsqueeze(-2), units.unsqueeze(-3)))
    expected[:, :, *torch.tril_indices(4, 4)] = torch.nan
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(1 - found[0], 1 - expected[0], rtol=1e-5, atol=5e-12, equal_nan=True)


@given(rows(any_float), rows(any_float))
def test_lengths_tell_what_the_rows_tell(x, update):
    """Where |X|, |update| and X·update are said to be enough, they give what the rows give."""
    lengths = torch.stack((x.norm(dim=-1), update.norm(dim=-1), (x * update).sum(dim=-1)))
    found, enough = compare_lengths(lengths)
    expected = compare(x, update)
    torch.testing.assert_close(found[:, enough], expected[:, enough], rtol=0, atol=1e-6)
    torch.testing.assert_close(1 - found[0, enough], 1 - expected[0, enough], rtol=1e-5, atol=1e-15)
    assert not enough[is_zero(x) | is_zero(update) | ~torch.isfinite(x + update).all(dim=-1)].any()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_lengths_are_enough_for_ordinary_rows(seed, size):
    x, update = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(seed))
    found, enough = compare_lengths(
        torch.stack((x.norm(dim=-1), (size * update).norm(dim=-1), (x * update * size).sum(dim=-1)))
    )
    assert enough.all()
    torch.testing.assert_close(1 - found[0], 1 - compare(x, size * update)[0], rtol=1e-5, atol=1e-15)
