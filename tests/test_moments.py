"""Moments obey the laws of counts, means and deviations, whatever way the data are split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import moments as exactly
from torch import Tensor

import normwise as nw
from normwise import Moments
from normwise.errors import DtypeError, InputError

ROUNDING = 2.0**-53


# Values with up to six digits: they may lie around 0 or 1e6, and their sums of squares are finite.
def values(min_size: int = 1, max_size: int = 40, width: int = 3) -> st.SearchStrategy[Any]:
    offsets = st.sampled_from([0.0, -2.5, 1e3, 1e6])
    shapes = st.tuples(st.integers(min_size, max_size), st.just(width))
    elements = st.floats(-100, 100, allow_nan=False, width=32)
    return st.builds(lambda a, o: a + o, arrays(np.float64, shapes, elements=elements), offsets)


def of(a: Any, **options: Any) -> Moments:
    return Moments.of(torch.as_tensor(a), 0, **options)


def assert_equal(a: Moments, b: Moments) -> None:
    """The same moments, to a few roundings of what a sum over their data can lose."""
    n = torch.maximum(a.count, torch.ones_like(a.count)).double()
    assert torch.equal(a.count.expand(a.mean.shape), b.count.expand(b.mean.shape))
    size = a.mean.abs() + (a.m2 / n).sqrt()
    mean_off = 16 * ROUNDING * size + 1e-300
    assert ((a.mean - b.mean).abs() <= mean_off).all(), (a.mean, b.mean)
    # A mean that is off by e moves m2 by at most 2 e sqrt(n m2) + n e^2.
    m2_off = 64 * ROUNDING * a.m2 + 2 * mean_off * (n * a.m2).sqrt() + n * mean_off**2
    assert ((a.m2 - b.m2).abs() <= m2_off).all(), (a.m2, b.m2)


def identical(a: Moments, b: Moments) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("count", "mean", "m2"))


# Laws


@given(values(), st.data())
def test_moments_of_the_parts_merge_to_those_of_the_whole(a: Any, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(a)), max_size=5)))
    parts = [of(p) for p in np.split(a, cuts)]
    assert_equal(Moments.sum(parts), of(a))


@given(values(), values())
def test_merge_does_not_depend_on_the_order(a: Any, b: Any) -> None:
    assert_equal(of(a).merge(of(b)), of(b).merge(of(a)))


@given(values(), values(), values())
def test_merge_is_associative(a: Any, b: Any, c: Any) -> None:
    x, y, z = of(a), of(b), of(c)
    assert_equal(x.merge(y).merge(z), x.merge(y.merge(z)))


@given(values(min_size=0))
def test_nothing_is_neutral_bit_for_bit(a: Any) -> None:
    m, nothing = of(a), Moments.empty((3,))
    assert identical(m.merge(nothing), m)
    assert identical(nothing.merge(m), m)


@given(st.integers(1, 5), st.integers(1, 5))
def test_channels_that_saw_nothing_are_neutral_each(n: int, k: int) -> None:
    """Counts that differ by channel: a 0 beside numbers, whatever placeholder its mean is."""
    zero = torch.zeros(2, dtype=torch.float64)
    a = Moments(torch.tensor([n, 0]), zero + torch.tensor([1.5, torch.nan]), zero)
    b = Moments(torch.tensor([0, k]), zero + torch.tensor([torch.inf, 2.5]), zero)
    merged = a.merge(b)
    assert merged.count.tolist() == [n, k]
    assert merged.mean.tolist() == [1.5, 2.5]
    assert merged.m2.tolist() == [0, 0]


@given(values(), st.integers(-1000, 1000))
def test_a_shift_moves_the_mean_and_nothing_else(a: Any, shift: int) -> None:
    moved, m = of(a + shift), of(a)
    size = np.abs(a).max() + abs(shift)
    assert ((moved.mean - m.mean - shift).abs() <= 8 * ROUNDING * size).all()
    # The shift itself rounds each value; m2 moves by no more than that does.
    off = 8 * ROUNDING * size
    bound = 2 * off * (len(a) * m.m2).sqrt() + len(a) * off**2 + 64 * ROUNDING * m.m2
    assert ((moved.m2 - m.m2).abs() <= bound).all()


@given(values(), st.integers(-30, 30))
def test_a_power_of_two_scales_exactly(a: Any, exponent: int) -> None:
    scaled, m = of(a * 2.0**exponent), of(a)
    assert torch.equal(scaled.mean, m.mean * 2.0**exponent)
    assert torch.equal(scaled.m2, m.m2 * 4.0**exponent)


@given(st.lists(values(min_size=0), min_size=1, max_size=6))
def test_the_builtin_sum_is_moments_sum_is_merge(parts: list[Any]) -> None:
    each = [of(p) for p in parts]
    merged = each[0]
    for m in each[1:]:
        merged = merged.merge(m)
    assert identical(Moments.sum(each), merged)
    assert identical(sum(each), merged)
    assert identical(Moments.sum(iter(each)), merged)


@given(st.lists(values(min_size=0), min_size=1, max_size=6), st.sampled_from([0, 1, -1, -2]))
def test_reduce_is_sum(parts: list[Any], dim: int) -> None:
    """Along the first axis, and along the last of the same moments transposed."""
    each = [of(p) for p in parts]
    columns = [
        torch.stack([m.count.expand(3) for m in each]),
        torch.stack([m.mean for m in each]),
        torch.stack([m.m2 for m in each]),
    ]
    if dim in (1, -1):
        columns = [c.T for c in columns]
    assert_equal(Moments(*columns).reduce(dim), Moments.sum(each))


@given(st.integers(0, 2**62), st.integers(0, 2**61))
def test_counts_are_exact(a: int, b: int) -> None:
    """Beyond 2^53 a float count would lose elements."""
    one, two = (Moments(n, torch.zeros(1).double(), torch.zeros(1).double()) for n in (a, b))
    assert one.merge(two).count.item() == a + b
    assert one.merge(two).count.dtype == torch.int64


@given(values())
def test_against_numpy(a: Any) -> None:
    m, e = of(a), exactly(a)
    assert_equal(m, Moments(torch.tensor(len(a)), torch.tensor(e.mean), torch.tensor(e.m2)))


@given(values(min_size=2), st.sampled_from([0, 1, 1.5]))
def test_variance_std_and_rstd(a: Any, correction: float) -> None:
    m = of(a)
    assume(len(a) > correction)
    variance = a.var(0, ddof=correction)
    tolerance = 1e-12 * (a**2).max() + 1e-300
    np.testing.assert_allclose(m.variance(correction), variance, rtol=1e-9, atol=tolerance)
    assert torch.equal(m.std(correction), m.variance(correction).sqrt())
    expected = 1 / (m.variance() + 0.25).sqrt()
    assert torch.allclose(m.rstd(0.25), expected, rtol=4 * ROUNDING, atol=0)


@given(values(min_size=2), st.data())
def test_mask_takes_the_elements_that_count(a: Any, data: st.DataObject) -> None:
    mask = data.draw(arrays(np.bool_, a.shape))
    padded = np.where(mask, a, np.nan)
    m = Moments.of(torch.tensor(padded), 0, mask=torch.tensor(mask))
    for c in range(a.shape[1]):
        counted = a[mask[:, c], c]
        assert m.count[c] == counted.size
        alone = Moments.of(torch.tensor(counted))
        own = Moments(m.count[c], m.mean[c], m.m2[c])
        assert_equal(own, alone)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_a_million_standard_deviation_one(dtype: torch.dtype) -> None:
    x = (torch.randn(10_000, dtype=torch.float64) + 1e6).to(torch.float32)
    exact = exactly(x.double().numpy()[:, None])
    merged = Moments.sum(Moments.of(part, dtype=dtype) for part in x.split(37))
    assert merged.mean.dtype == dtype
    # In float32 the mean itself has steps of 1/16.
    mean_off, variance_off = (0.1, 0.02) if dtype == torch.float32 else (1e-9, 1e-9)
    assert abs(merged.mean.item() - exact.mean.item()) <= mean_off
    assert abs(merged.variance().item() - exact.var.item()) <= variance_off


def test_float32_input_is_taken_in_float64_by_default() -> None:
    x = torch.randn(1000) + 1e6
    assert torch.equal(Moments.of(x).mean, Moments.of(x.double()).mean)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e18, 1e-30])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_a_constant_has_variance_0(value: float, n: int) -> None:
    m = Moments.of(torch.full((n,), value, dtype=torch.float32))
    assert m.variance() == 0
    assert m.mean == torch.tensor(value, dtype=torch.float32)


def test_merging_a_constant_a_thousand_times_keeps_variance_0() -> None:
    parts = [Moments.of(torch.full((k % 5 + 1,), 0.1)) for k in range(1000)]
    assert Moments.sum(parts).m2 == 0


def test_a_thousand_merges_in_float32_lose_few_bits() -> None:
    x = torch.randn(1000, 8)
    merged = Moments.sum(Moments.of(row, dtype=torch.float32) for row in x)
    assert torch.allclose(merged.variance().double(), x.double().var(correction=0), rtol=1e-4)


@pytest.mark.parametrize("first", [0, 5])
def test_reduce_centres_on_a_set_that_saw_something(first: int) -> None:
    """Ranks of 5 values around 1e6 in float32; the first rank may have had none."""
    counts = torch.tensor([first, *[5] * 63])
    means = torch.full((64,), 1e6) + torch.arange(64) % 2
    means[0] = means[0] if first else 0
    m = Moments(counts, means, torch.zeros(64)).reduce(0)
    kept = means[counts > 0].double()
    assert abs(m.mean.item() - kept.mean().item()) <= 0.0625
    assert abs(m.variance().item() - kept.var(correction=0).item()) <= 0.01


@pytest.mark.parametrize("placeholder", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_reduce_ignores_the_placeholder_of_an_empty_set(position: int, placeholder: float) -> None:
    counts, means = torch.tensor([2, 2]), torch.tensor([3.0, 3.0]).double()
    counts[position], means[position] = 0, placeholder
    m2 = torch.where(counts > 0, 1.0, placeholder).double()
    m = Moments(counts, means, m2).reduce(0)
    assert (m.count.item(), m.mean.item(), m.m2.item()) == (2, 3.0, 1.0)


# Shapes, dtypes, errors


@pytest.mark.parametrize(
    ("dim", "axes"),
    [(None, (0, 1, 2)), (0, (0,)), (-1, (2,)), ((0, 2), (0, 2)), ((1,), (1,)), ((), ())],
    ids=str,
)
def test_dim_names_the_axes_that_are_averaged_over(dim: Any, axes: tuple[int, ...]) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    m = Moments.of(x, dim)
    np.testing.assert_allclose(m.mean, x.numpy().mean(axes), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(m.variance(), x.numpy().var(axes), rtol=1e-12, atol=1e-15)
    assert m.count.item() == np.prod([x.shape[d] for d in axes])


@pytest.mark.parametrize("dim", [2, -3, (0, 5)])
def test_an_axis_that_is_not_there_is_an_error(dim: Any) -> None:
    with pytest.raises((IndexError, InputError)):
        Moments.of(torch.randn(4, 3), dim)


@pytest.mark.parametrize("dim", [1, -2])
def test_reduce_along_an_axis_that_is_not_there_is_an_error(dim: int) -> None:
    with pytest.raises((IndexError, InputError)):
        Moments.of(torch.randn(4, 3), 0).reduce(dim)


def test_nothing_has_no_variance() -> None:
    m = Moments.empty((2,))
    assert m.count == 0
    assert m.variance().isnan().all()
    assert Moments.of(torch.ones(1)).variance(correction=1).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_values_are_taken_in_double(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    assert identical(Moments.of(x), Moments.of(x.double()))


def test_to_another_dtype() -> None:
    m = Moments.of(torch.randn(10, 3), 0).to(dtype=torch.float32)
    assert (m.mean.dtype, m.m2.dtype, m.count.dtype) == (torch.float32, torch.float32, torch.int64)


def test_merging_two_dtypes_gives_the_wider() -> None:
    a, b = Moments.of(torch.randn(4), dtype=torch.float32), Moments.of(torch.randn(4))
    assert a.merge(b).mean.dtype == b.merge(a).m2.dtype == torch.float64


def test_representation() -> None:
    assert repr(Moments.of(torch.randn(10, 3), 0)) == (
        "Moments(count=10, shape=(3,), dtype=float64, device=cpu)"
    )


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Moments.of(torch.arange(3)), DtypeError, "int64.*Try: values.float"),
        (lambda: Moments(1, zeros(2).half(), zeros(2).half()), DtypeError, "float16.*mean.float"),
        (lambda: Moments(1, zeros(2), zeros(3)), InputError, r"\(2,\).*\(3,\)"),
        (lambda: Moments(1, zeros(2), zeros(2).float()), InputError, "one dtype.*float32"),
        (lambda: Moments(zeros(3).long(), zeros(2), zeros(2)), InputError, r"count \(3,\)"),
        (lambda: Moments(zeros(4, 2).long(), zeros(2), zeros(2)), InputError, "broadcasts"),
        (lambda: of(zeros(4, 2)).merge(of(zeros(4, 3))), InputError, r"\(2,\) and \(3,\)"),
        (lambda: Moments.sum([]), InputError, r"Moments.empty\(\(C,\)\)"),
        (lambda: Moments.of(zeros(3)).reduce(0), InputError, "rank 0"),
    ],
)
def test_errors(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_adding_anything_else_is_an_error() -> None:
    m = Moments.of(zeros(3))
    with pytest.raises(TypeError):
        1 + m


# batch_moments


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -2])
def test_batch_moments_keep_the_channel(channel_dim: int) -> None:
    x = torch.randn(4, 5, 6) * 3 + 100
    m, e = nw.functional.batch_moments(x, channel_dim), exactly(x.double().numpy(), channel_dim)
    assert m.count.item() == e.count[0]
    np.testing.assert_allclose(m.mean, e.mean, rtol=1e-7)
    np.testing.assert_allclose(m.m2, e.m2, rtol=1e-5)


def test_batch_moments_with_a_mask() -> None:
    x, mask = torch.randn(4, 5, 6), torch.rand(4, 1, 6) < 0.5
    m = nw.functional.batch_moments(x, mask=mask)
    e = exactly(x.double().numpy(), 1, mask.numpy())
    assert m.count.item() == e.count[0]
    np.testing.assert_allclose(m.mean, e.mean, rtol=1e-12)
    np.testing.assert_allclose(m.m2, e.m2, rtol=1e-12)


@given(values(min_size=2, max_size=30), st.integers(1, 29))
def test_batch_moments_of_two_batches_merge(a: Any, cut: int) -> None:
    cut = min(cut, len(a) - 1)
    x = torch.tensor(a)
    f = nw.functional.batch_moments
    assert_equal(f(x[:cut]).merge(f(x[cut:])), f(x))
