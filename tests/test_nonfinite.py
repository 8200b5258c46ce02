"""A batch with inf or NaN: what it does to the running statistics under each policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.errors import NonFiniteError, NormwiseError

BAD = {
    "nan": torch.nan,
    "inf": torch.inf,
    "-inf": -torch.inf,
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "1d": nw.nn.BatchNorm1d,
    "2d": nw.nn.BatchNorm2d,
    "3d": nw.nn.BatchNorm3d,
    "channel last": lambda c, **o: nw.nn.BatchNorm(c, channel_dim=-1, **o),
}
SHAPES = {"1d": (6, 5), "2d": (4, 5, 3, 3), "3d": (2, 5, 3, 3, 2), "channel last": (6, 4, 5)}


def poisoned(shape: tuple[int, ...], value: float, channels: Any = (3,), axis: int = 1) -> Tensor:
    """Random data with one bad value in each of the channels given."""
    x = torch.randn(shape)
    for c in channels:
        x.select(axis, c)[(0,) * (len(shape) - 1)] = value
    return x


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", LAYERS)
def test_propagate_poisons_the_channel_as_torch_nn_does(
    backend: str, name: str, value: float
) -> None:
    layer = LAYERS[name](5)
    axis = -1 if name == "channel last" else 1
    peer = nn.BatchNorm1d(5)
    x = poisoned(SHAPES[name], value, axis=axis)
    layer(x)
    peer(x.movedim(axis, -1).reshape(-1, 5))
    for buffer in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, buffer).isfinite(), getattr(peer, buffer).isfinite()), (
            buffer
        )
    assert layer.running_mean.isfinite().tolist() == [True, True, True, False, True]
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", LAYERS)
def test_skip_leaves_the_buffers_and_counts_the_batch(
    backend: str, name: str, value: float, momentum: float | None
) -> None:
    layer = LAYERS[name](5, nonfinite="skip", momentum=momentum)
    layer(torch.randn(SHAPES[name]))
    before = state(layer)
    assert before["num_nonfinite_batches"] == 0
    layer(poisoned(SHAPES[name], value, axis=-1 if name == "channel last" else 1))
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layer, buffer), before[buffer])
    assert layer.num_nonfinite_batches == 1


def test_skip_goes_on_as_if_the_batch_had_not_been(backend: str) -> None:
    layer = nw.nn.BatchNorm1d(5, momentum=None, nonfinite="skip")
    peer = nn.BatchNorm1d(5, momentum=None)
    for step in range(4):
        x = torch.randn(6, 5)
        layer(x)
        peer(x)
        layer(poisoned((6, 5), torch.nan, [step]))
    for name, expected in peer.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], expected)
    assert layer.num_nonfinite_batches == 4


def test_skip_gives_the_output_of_propagate(backend: str) -> None:
    """Only the running statistics are guarded: the NaN is seen in the output."""
    x = poisoned((6, 5), torch.nan)
    skip, propagate = nw.nn.BatchNorm1d(5, nonfinite="skip"), nw.nn.BatchNorm1d(5)
    assert torch.equal(skip(x).nan_to_num(7), propagate(x).nan_to_num(7))
    assert skip(x).isnan().any(0).tolist() == [False, False, False, True, False]


def test_skip_counter_is_reset_with_the_statistics(backend: str) -> None:
    layer = nw.nn.BatchNorm1d(5, nonfinite="skip")
    layer(poisoned((6, 5), torch.nan))
    layer.reset_running_stats()
    assert layer.num_nonfinite_batches == 0


def test_an_overflow_of_the_variance_is_not_finite(backend: str) -> None:
    """Finite data whose variance is none: in float64 squares of 1e200 overflow."""
    layer = nw.nn.BatchNorm1d(5, nonfinite="skip", dtype=torch.float64)
    layer(torch.randn(6, 5, dtype=torch.float64) * 1e200)
    assert layer.num_nonfinite_batches == 1
    assert torch.equal(layer.running_var, torch.ones(5, dtype=torch.float64))


def test_large_finite_values_are_no_reason_to_skip(backend: str) -> None:
    """Float32 up to 1e18: the squares fit float64, in which the moments are taken."""
    layer = nw.nn.BatchNorm1d(5, nonfinite="skip")
    layer(torch.randn(6, 5) * 1e18)
    assert (layer.num_nonfinite_batches, layer.num_batches_tracked) == (0, 1)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", LAYERS)
def test_raise_leaves_the_buffers(backend: str, name: str, value: float) -> None:
    layer = LAYERS[name](5, nonfinite="raise")
    layer(torch.randn(SHAPES[name]))
    before = state(layer)
    with pytest.raises(NonFiniteError):
        layer(poisoned(SHAPES[name], value, axis=-1 if name == "channel last" else 1))
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())


def test_raise_names_layer_and_channels(backend: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 5)
            self.layer1 = nn.Sequential(nn.Identity(), nw.nn.BatchNorm1d(5, nonfinite="raise"))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer1(x)

    model = nn.Sequential(Net())
    with pytest.raises(NonFiniteError) as caught:
        model(poisoned((6, 5), torch.inf, [1, 4]))
    text = str(caught.value)
    assert text.startswith("layer '0.layer1.1', BatchNorm1d(5, ")
    assert "inf or NaN in 2 of 5 channels: 1, 4" in text
    assert "Try: " in text


def test_raise_shortens_a_long_list_of_channels(backend: str) -> None:
    layer = nw.nn.BatchNorm1d(20, nonfinite="raise")
    with pytest.raises(NonFiniteError, match="in 20 of 20 channels: 0, 1, 2, 3, 4, 5, 6, 7, …"):
        layer(torch.full((4, 20), torch.nan))


def test_raise_in_a_layer_of_no_model_shows_the_layer(backend: str) -> None:
    with pytest.raises(NonFiniteError, match=r"^BatchNorm1d\(5, .*nonfinite='raise'\): "):
        nw.nn.BatchNorm1d(5, nonfinite="raise")(poisoned((6, 5), torch.nan))


@pytest.mark.parametrize("kind", [NormwiseError, ArithmeticError, RuntimeError])
def test_raise_is_caught_as(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        nw.nn.BatchNorm1d(5, nonfinite="raise")(poisoned((6, 5), torch.nan))


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_eval_mode_has_no_statistics_to_guard(backend: str, policy: str) -> None:
    layer = nw.nn.BatchNorm1d(5, nonfinite=policy).eval()
    before = state(layer)
    assert layer(poisoned((6, 5), torch.nan)).isnan().sum() == 1
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_good_batches_are_treated_alike(backend: str, policy: str) -> None:
    layer, peer = nw.nn.BatchNorm1d(5, nonfinite=policy), nn.BatchNorm1d(5)
    x = torch.randn(6, 5)
    torch.testing.assert_close(layer(x), peer(x))
    torch.testing.assert_close(layer.state_dict(), peer.state_dict())


def test_raise_without_running_statistics(backend: str) -> None:
    layer = nw.nn.BatchNorm1d(5, nonfinite="raise", track_running_stats=False)
    with pytest.raises(NonFiniteError, match="channels: 3"):
        layer(poisoned((6, 5), torch.nan))


def test_padding_that_is_masked_out_may_hold_anything(backend: str) -> None:
    layer = nw.nn.BatchNorm1d(5, nonfinite="raise")
    x = torch.randn(2, 5, 7)
    x[..., 4:] = torch.nan
    y = layer(x, mask=torch.arange(7).expand(2, 1, 7) < 4)
    assert y.isfinite().all()
    assert layer.running_mean.isfinite().all()


def test_the_function_counts_and_skips(backend: str) -> None:
    mean, var, rejected, tracked = torch.zeros(5), torch.ones(5), torch.tensor(0), torch.tensor(0)
    options = {"num_batches_tracked": tracked, "nonfinite_batches": rejected, "nonfinite": "skip"}
    for x in (poisoned((6, 5), torch.inf), torch.randn(6, 5)):
        nw.functional.batch_norm(x, mean, var, training=True, **options)
    assert (rejected.item(), tracked.item()) == (1, 1)
    assert mean.isfinite().all()


def test_propagate_counts_too_where_a_counter_is_given(backend: str) -> None:
    mean, var, rejected = torch.zeros(5), torch.ones(5), torch.tensor(0)
    nw.functional.batch_norm(
        poisoned((6, 5), torch.nan), mean, var, training=True, nonfinite_batches=rejected
    )
    assert rejected == 1
    assert mean.isnan().tolist() == [False, False, False, True, False]
