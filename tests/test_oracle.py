"""The oracle is itself right: its gradients are those of its values, its statistics NumPy's."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from oracle import ACTIVATIONS, Array, BatchNorm, moments, update_running


def example(activation: str, training: bool, masked: bool) -> tuple[BatchNorm, Array]:
    rng = np.random.default_rng(zlib.crc32(f"{activation} {training} {masked}".encode()))
    shape, axis = (4, 3, 5), 1
    call = BatchNorm(
        x=rng.normal(2, 3, shape),
        weight=rng.normal(1, 0.5, 3),
        bias=rng.normal(0, 1, 3),
        residual=rng.normal(0, 1, shape),
        mask=rng.random((4, 1, 5)) < 0.7 if masked else None,
        axis=axis,
        eps=1e-3,
        activation=activation,
        statistics=None if training else (rng.normal(2, 1, 3), rng.uniform(4, 9, 3)),
    )
    # A finite difference across a jump of the slope means nothing.
    dy = np.where(call.near_kink(1e-3), 0, rng.normal(size=shape))
    return call, dy


def differences(f: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central differences of f in every entry of ``at``."""
    slope = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        slope[i] = (f(up) - f(down)) / (2 * step)
    return slope


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("what", ["x", "weight", "bias", "residual"])
def test_gradients_are_the_differences_of_the_values(
    what: str, activation: str, training: bool, masked: bool
) -> None:
    call, dy = example(activation, training, masked)
    gradient = getattr(call.gradients(dy), "d" + what)

    def loss(value: Array) -> float:
        return float((replace(call, **{what: value}).forward() * dy).sum())

    numeric = differences(loss, getattr(call, what))
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=2e-8)


def test_normalized_data_has_mean_bias_and_standard_deviation_weight() -> None:
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(7, 3, (64, 5)), rng.normal(size=5), rng.normal(size=5)
    y = BatchNorm(x, weight, bias, eps=0).forward()
    np.testing.assert_allclose(y.mean(0), bias, atol=1e-13)
    np.testing.assert_allclose(y.std(0), np.abs(weight), rtol=1e-13)


def test_sums_are_the_gradients_of_bias_and_unscaled_weight() -> None:
    call, dy = example("silu", True, True)
    s, q = call.sums(dy)
    gradients = call.gradients(dy)
    np.testing.assert_allclose(s, gradients.dbias, rtol=1e-13)
    np.testing.assert_allclose(q / np.sqrt(call.mean_var[1] + call.eps), gradients.dweight)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_moments_are_numpys(axis: int) -> None:
    x = np.random.default_rng(2).normal(1e6, 1, (4, 5, 6))
    others = tuple(d for d in range(3) if d != axis % 3)
    m = moments(x, axis)
    np.testing.assert_array_equal(m.count, 120 / x.shape[axis])
    np.testing.assert_allclose(m.mean, x.mean(others), rtol=1e-15)
    np.testing.assert_allclose(m.var, x.var(others), rtol=1e-9)


def test_masked_moments_are_those_of_the_elements_that_count() -> None:
    rng = np.random.default_rng(3)
    x, mask = rng.normal(size=(8, 3, 4)), rng.random((8, 1, 4)) < 0.5
    x[~np.broadcast_to(mask, x.shape)] = np.nan
    m = moments(x, mask=mask)
    for c in range(3):
        counted = x[:, c][mask[:, 0]]
        assert m.count[c] == counted.size
        np.testing.assert_allclose([m.mean[c], m.var[c]], [counted.mean(), counted.var()])


def test_cumulative_running_statistics_are_the_average_of_the_batches() -> None:
    rng = np.random.default_rng(4)
    batches = [rng.normal(size=(n, 2)) for n in (3, 8, 5)]
    mean, var, tracked = np.zeros(2), np.ones(2), 0
    for batch in batches:
        mean, var, tracked = update_running(mean, var, tracked, moments(batch), None)
    assert tracked == 3
    np.testing.assert_allclose(mean, np.mean([b.mean(0) for b in batches], axis=0))
    np.testing.assert_allclose(var, np.mean([b.var(0, ddof=1) for b in batches], axis=0))


def test_exponential_running_statistics_weigh_the_new_batch_by_momentum() -> None:
    batch = np.random.default_rng(5).normal(size=(6, 2))
    mean, var, tracked = update_running(np.ones(2), np.ones(2), 7, moments(batch), 0.25)
    assert tracked == 8
    np.testing.assert_allclose(mean, 0.75 + 0.25 * batch.mean(0))
    np.testing.assert_allclose(var, 0.75 + 0.25 * batch.var(0, ddof=1))
