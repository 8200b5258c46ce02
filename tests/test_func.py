"""torch.func: functional calls, gradients, ensembles, and the pure form that returns statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.testing import assert_close

import normwise as nw

F64 = torch.float64
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 5, dtype=F64),
        nw.nn.BatchNorm1d(5, dtype=F64, **options),
        nn.Linear(5, 2, dtype=F64),
    )


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(model.named_parameters()), dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_uses_the_state_it_is_given(training: bool) -> None:
    model, other, x = network(), network().train(training), torch.randn(6, 4, dtype=F64)
    before = copy.deepcopy(model.state_dict())
    model.train(training)
    y = functional_call(model, other.state_dict(), (x,))
    assert_close(y, copy.deepcopy(other)(x), **EXACT)
    # The buffers given are those that move; the model's own stay.
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_functional_call_moves_the_buffers_it_is_given() -> None:
    model, x = network(momentum=None), torch.randn(6, 4, dtype=F64)
    twin = copy.deepcopy(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for step in range(3):
        functional_call(model, (dict(model.named_parameters()), buffers), (x + step,))
        twin(x + step)
    assert buffers["1.num_batches_tracked"] == 3
    assert_close(buffers, dict(twin.named_buffers()), **EXACT)


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"bias": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_grad_is_backward(training: bool, options: dict[str, Any]) -> None:
    model = network(**options).train(training)
    x, cotangent = torch.randn(6, 4, dtype=F64), torch.randn(6, 2, dtype=F64)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Any]:
        buffers = {name: b.clone() for name, b in buffers.items()}
        y = functional_call(model, (parameters, buffers), (x,))
        return (y * cotangent).sum(), buffers

    slopes, (_, buffers) = grad_and_value(loss, has_aux=True)(*state(model))
    model(x).backward(cotangent)
    assert_close(slopes, {n: p.grad for n, p in model.named_parameters()}, **EXACT)
    assert_close(buffers, dict(model.named_buffers()), **EXACT)


def test_grad_in_eval_needs_no_copies() -> None:
    model, x = network().eval(), torch.randn(6, 4, dtype=F64)
    cotangent = torch.randn(6, 2, dtype=F64)
    slope = grad(lambda x: (model(x) * cotangent).sum())(x)
    x.requires_grad_()
    assert_close(slope, torch.autograd.grad(model(x), x, cotangent)[0], **EXACT)


def test_per_sample_gradients_in_eval() -> None:
    """What differential privacy takes: a gradient for each sample of the batch."""
    model, x = network().eval(), torch.randn(6, 4, dtype=F64)
    cotangent = torch.randn(6, 2, dtype=F64)
    parameters, buffers = state(model)

    def loss(parameters: dict[str, Tensor], sample: Tensor, weight: Tensor) -> Tensor:
        return (functional_call(model, (parameters, buffers), (sample[None],)) * weight).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, cotangent)
    for i in range(6):
        model.zero_grad()
        model(x[i : i + 1]).backward(cotangent[i : i + 1])
        for name, parameter in model.named_parameters():
            assert_close(each[name][i], parameter.grad, **EXACT)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_under_vmap(training: bool, options: dict[str, Any]) -> None:
    """Each member normalizes by its own statistics and moves its own."""
    models = [network(**options).train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(3, 6, 4, dtype=F64)
    skeleton = copy.deepcopy(models[0])

    def member(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (p, b), (x,))

    for step in range(2):
        y = vmap(member)(parameters, buffers, x + step)
        assert_close(y, torch.stack([m(v + step) for m, v in zip(models, x, strict=True)]), **EXACT)
    for name, stacked in buffers.items():
        expected = torch.stack([dict(m.named_buffers())[name] for m in models])
        assert_close(stacked, expected, **EXACT)


def test_gradients_of_an_ensemble() -> None:
    models = [network() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x, cotangent = torch.randn(6, 4, dtype=F64), torch.randn(6, 2, dtype=F64)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        b = {name: t.clone() for name, t in b.items()}
        return (functional_call(models[0], (p, b), (x,)) * cotangent).sum()

    slopes = vmap(grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        model(x).backward(cotangent)
        for name, parameter in model.named_parameters():
            assert_close(slopes[name][i], parameter.grad, **EXACT)


def test_unbatched_buffers_under_vmap_are_an_error() -> None:
    """One set of running statistics cannot take the batches of three members."""
    layer = nw.nn.BatchNorm1d(5)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(layer)(torch.randn(3, 6, 5))
    assert torch.equal(layer.running_mean, torch.zeros(5))


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_vmap_over_the_statistics_of_a_batch(channel_dim: int) -> None:
    layer = nw.nn.BatchNorm(5, channel_dim=channel_dim, track_running_stats=False, dtype=F64)
    x = torch.randn(3, 6, 5, 5, dtype=F64)
    assert_close(vmap(layer)(x), torch.stack([layer(v) for v in x]), **EXACT)
    assert_close(
        vmap(layer, in_dims=1, out_dims=1)(x.movedim(0, 1)), layer_of_each(layer, x), **EXACT
    )


def layer_of_each(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([layer(v) for v in x], dim=1)


@pytest.mark.parametrize("training", [True, False])
def test_jvp_is_the_jacobian_times_the_tangent(training: bool) -> None:
    layer = nw.nn.BatchNorm1d(3, activation="tanh", track_running_stats=not training, dtype=F64)
    layer.train(training)
    x, tangent = torch.randn(2, 4, 3, dtype=F64)
    _, out = jvp(layer, (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(layer, x)
    assert_close(out, torch.einsum("abcd,cd->ab", jacobian, tangent), **EXACT)
    assert_close(jacfwd(layer)(x), jacobian, **EXACT)
    assert_close(jacrev(layer)(x), jacobian, **EXACT)


# The pure form


def test_update_returns_what_the_layer_would_keep() -> None:
    layer = nw.nn.BatchNorm1d(5, momentum=0.3, activation="relu", dtype=F64)
    x, residual = torch.randn(2, 6, 5, dtype=F64)
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    y, mean, var = nw.functional.batch_norm_update(
        *(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, 0.3),
        residual=residual,
        activation="relu",
    )
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert_close(y, layer(x, residual=residual), **EXACT)
    assert_close((mean, var), (layer.running_mean, layer.running_var), **EXACT)


def test_update_under_vmap_and_grad() -> None:
    x, cotangent = torch.randn(2, 3, 6, 5, dtype=F64)
    mean, var = torch.zeros(3, 5, dtype=F64), torch.ones(3, 5, dtype=F64)
    weight = torch.randn(3, 5, dtype=F64)

    def loss(weight: Tensor, x: Tensor, mean: Tensor, var: Tensor, c: Tensor) -> Any:
        y, *new = nw.functional.batch_norm_update(x, mean, var, weight)
        return (y * c).sum(), tuple(new)

    slopes, (new_mean, new_var) = vmap(grad(loss, has_aux=True))(weight, x, mean, var, cotangent)
    for i in range(3):
        layer = nw.nn.BatchNorm1d(5, bias=False, dtype=F64)
        layer.weight.data = weight[i].clone()
        layer(x[i]).backward(cotangent[i])
        assert_close(slopes[i], layer.weight.grad, **EXACT)
        assert_close(new_mean[i], layer.running_mean, **EXACT)
        assert_close(new_var[i], layer.running_var, **EXACT)


def test_update_skips_a_batch_that_is_not_finite() -> None:
    x = torch.randn(6, 5).index_fill(0, torch.tensor(2), torch.nan)
    old = torch.randn(5), torch.rand(5)
    _, *new = nw.functional.batch_norm_update(x, *old, nonfinite="skip")
    assert all(map(torch.equal, new, old))


def test_moments_of_a_batch_are_differentiable() -> None:
    x = torch.randn(6, 5, 3, dtype=F64)

    def spread(x: Tensor) -> Tensor:
        return nw.functional.batch_moments(x).std().log().sum()

    expected = torch.func.grad(lambda x: x.var((0, 2), correction=0).log().sum() / 2)(x)
    assert_close(torch.func.grad(spread)(x), expected, **EXACT)
    x.requires_grad_()
    assert_close(torch.autograd.grad(spread(x), x)[0], expected, **EXACT)
