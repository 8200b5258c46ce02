"""Derivatives: first and second, reverse and forward, and autograd's habits around the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vjp
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normwise as nw

F64 = torch.float64
SMOOTH = ("none", "silu", "gelu", "sigmoid", "tanh")
KINKED = ("relu", "relu6", "leaky_relu", "leaky_relu(0.2)", "hardswish")


def tensors(
    shape: tuple[int, ...], activation: str = "none", residual: bool = False
) -> list[Tensor | None]:
    """x, weight, bias, residual in float64."""
    x, w, b, r = (
        torch.randn(shape),
        torch.randn(shape[1]),
        torch.randn(shape[1]),
        torch.randn(shape),
    )
    values = [x * 2 + 1, w, b, r if residual else None]
    return [None if v is None else v.to(F64).requires_grad_() for v in values]


def plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Batch norm out of elementary operations, which autograd differentiates to any order."""
    dims = [d for d in range(x.dim()) if d != 1]
    column = [1, -1] + [1] * (x.dim() - 2)
    mean, var = statistics or (x.mean(dims), x.var(dims, correction=0))
    y = (x - mean.reshape(column)) * (var.reshape(column) + 1e-5).rsqrt()
    y = y if weight is None else y * weight.reshape(column)
    y = y if bias is None else y + bias.reshape(column)
    return y if residual is None else y + residual


def norm(
    training: bool, activation: str = "none", mask: Tensor | None = None
) -> Callable[..., Any]:
    """batch_norm of (x, weight, bias, residual) and nothing else that moves."""

    def function(x: Tensor, *rest: Tensor | None) -> Tensor:
        weight, bias, residual = (*rest, None, None, None)[:3]
        mean = torch.linspace(-1, 1, x.shape[1], dtype=F64)
        return nw.functional.batch_norm(
            x,
            *((None, None) if training else (mean, mean**2 + 1)),
            weight,
            bias,
            training,
            activation=activation,
            residual=residual,
            mask=mask,
        )

    return function


SHAPES = [(4, 3), (2, 3, 5), (2, 2, 3, 2)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_derivatives(shape: tuple[int, ...], training: bool, residual: bool) -> None:
    assert gradcheck(norm(training), tensors(shape, residual=residual), fast_mode=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [*SMOOTH, *KINKED])
def test_first_derivatives_through_activations(activation: str, training: bool) -> None:
    inputs = tensors((3, 2, 4), residual=True)
    assert gradcheck(norm(training, activation), inputs)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_first_derivatives_with_a_mask(training: bool, activation: str) -> None:
    mask = torch.rand(3, 1, 4) < 0.6
    inputs = tensors((3, 2, 4), residual=True)
    assert gradcheck(norm(training, activation, mask), inputs)
    assert gradgradcheck(norm(training, activation, mask), inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_derivatives(shape: tuple[int, ...], training: bool) -> None:
    assert gradgradcheck(norm(training), tensors(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [*SMOOTH, *KINKED])
def test_second_derivatives_through_activations(activation: str, training: bool) -> None:
    assert gradgradcheck(norm(training, activation), tensors((3, 2, 2), residual=True))


@pytest.mark.parametrize("present", ["w", "b", ""])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_without_weight_or_bias(training: bool, present: str) -> None:
    x, weight, bias, _ = tensors((3, 2, 4))
    inputs = [x, weight if "w" in present else None, bias if "b" in present else None]
    assert gradcheck(norm(training, "silu"), inputs)
    assert gradgradcheck(norm(training, "silu"), inputs)


def test_derivatives_in_the_running_statistics() -> None:
    """In eval mode mean and variance may be learned (as in a fold, or in batch renorm)."""
    x, weight, bias, _ = tensors((3, 2, 4))
    mean = torch.randn(2, dtype=F64, requires_grad=True)
    var = (torch.rand(2, dtype=F64) + 0.5).requires_grad_()

    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return nw.functional.batch_norm(x, mean, var, weight, bias, activation="tanh")

    for inputs in ((x, mean, var), (x.detach(), mean, var), (x, mean.detach(), var)):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


# Forward mode


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(training: bool, activation: str) -> None:
    inputs = tensors((3, 2, 4), residual=True)
    assert gradcheck(
        norm(training, activation), inputs, check_forward_ad=True, check_batched_grad=True
    )


@pytest.mark.parametrize("training", [True, False])
def test_forward_over_reverse_by_gradcheck(training: bool) -> None:
    assert gradgradcheck(norm(training, "silu"), tensors((3, 2, 2)), check_fwd_over_rev=True)


def scalar_of(function: Callable[..., Tensor], cotangent: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs: (function(*inputs) * cotangent).sum()


@pytest.mark.parametrize("argnum", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_every_order_of_second_derivatives_agrees(training: bool, argnum: int) -> None:
    """Forward over reverse, which torch.nn gets wrong (pytorch issue 196699), and the others."""
    inputs = [t.detach() for t in tensors((3, 2, 2))[:3]]
    # A function of y that is not linear, so that every term of the second derivative counts.

    def ours(*i: Tensor) -> Tensor:
        return (norm(training)(*i).sin() * cotangent).sum()

    mean = torch.linspace(-1, 1, 2, dtype=F64)
    statistics = None if training else (mean, mean**2 + 1)

    def theirs(*i: Tensor) -> Tensor:
        return (plain(*i, statistics=statistics).sin() * cotangent).sum()

    cotangent = torch.randn(3, 2, 2, dtype=F64)
    expected = jacrev(jacrev(theirs, argnum), 0)(*inputs)
    assert expected.abs().max() > 1e-3
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(ours, argnum), 0)(*inputs), expected, rtol=1e-9, atol=1e-10)


def test_hessian_of_a_network() -> None:
    """The Hessian-vector products that curvature methods take, through the layer itself."""
    x, cotangent = torch.randn(6, 3, dtype=F64), torch.randn(6, 4, dtype=F64)
    weight = torch.randn(4, 3, dtype=F64)
    layers = nw.nn.BatchNorm1d(4, track_running_stats=False, dtype=F64), None

    def loss(weight: Tensor, layer: nn.Module | None) -> Tensor:
        z = x @ weight.T
        y = plain(z, None, None) if layer is None else layer(z)
        return (y.tanh() * cotangent).sum()

    ours, expected = (hessian(lambda w, layer=layer: loss(w, layer))(weight) for layer in layers)
    assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_forward_mode_through_dual_tensors() -> None:
    x, tangent = torch.randn(2, 4, 3, dtype=F64)
    layer = nw.nn.BatchNorm1d(3, dtype=F64)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    expected = jvp(lambda x: plain(x, None, None), (x,), (tangent,))
    assert_close(
        (result.primal.detach(), result.tangent.detach()), expected, rtol=1e-10, atol=1e-10
    )
    assert layer.num_batches_tracked == 1


def test_vjp_is_backward() -> None:
    x, cotangent = torch.randn(2, 4, 3, dtype=F64)
    layer = nw.nn.BatchNorm1d(3, dtype=F64)
    _, pull = vjp(norm(True), x)
    inner = x.clone().requires_grad_()
    layer(inner).backward(cotangent)
    assert_close(pull(cotangent)[0], inner.grad, rtol=1e-10, atol=1e-12)


def test_a_gradient_penalty_trains() -> None:
    """The double backward of WGAN-GP through the module, in float32."""
    layer = nw.nn.BatchNorm1d(3, activation="leaky_relu(0.2)")
    x, cotangent = torch.randn(2, 8, 3)
    gradients = []
    for function in (
        layer,
        lambda x: nn.functional.leaky_relu(plain(x, layer.weight, layer.bias), 0.2),
    ):
        inner = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(inner), inner, cotangent, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        gradients.append(torch.autograd.grad(penalty, (inner, layer.weight)))
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


# Autograd's habits


def layer_and_input(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nw.nn.BatchNorm2d(3, dtype=F64, **options)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x, cotangent = torch.randn(2, 4, 3, 5, 5, dtype=F64)
    return layer, x.requires_grad_(), cotangent


def test_backward_twice_with_retain_graph() -> None:
    layer, x, cotangent = layer_and_input(activation="silu")
    y = layer(x)
    first = torch.autograd.grad(y, (x, layer.weight, layer.bias), cotangent, retain_graph=True)
    second = torch.autograd.grad(y, (x, layer.weight, layer.bias), cotangent)
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retain_graph_is_an_error() -> None:
    layer, x, cotangent = layer_and_input()
    y = layer(x)
    y.backward(cotangent)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(cotangent)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["torch.nn", "no residual", "residual"])
def test_in_place_activation_after_the_layer(training: bool, mode: str) -> None:
    """nn.ReLU(inplace=True) overwrites y; the backward does not need it."""
    layer, x, cotangent = layer_and_input()
    layer.train(training)
    residual = torch.randn_like(x) if mode == "residual" else None
    gradients = []
    for inplace in (True, False):
        twin = copy.deepcopy(layer)
        y = nn.ReLU(inplace=inplace)(twin(x, residual=residual))
        gradients.append(torch.autograd.grad(y, (x, *twin.parameters()), cotangent))
    assert all(map(torch.equal, *gradients))


def test_in_place_change_of_a_saved_output_is_an_error() -> None:
    """With a residual under relu the output is what the backward reads: autograd must know."""
    layer, x, cotangent = layer_and_input(activation="relu")
    y = layer(x, residual=torch.randn_like(x))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(cotangent)


def test_in_place_change_of_the_input_is_an_error() -> None:
    layer, leaf, cotangent = layer_and_input()
    x = leaf * 1
    y = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(cotangent)


def test_training_step_between_eval_forward_and_backward() -> None:
    """Runs as in torch.nn, and as there the backward reads the statistics as they are by then."""
    gradients = []
    layer, x, cotangent = layer_and_input()
    peer = nn.BatchNorm2d(3, dtype=F64)
    peer.load_state_dict(layer.state_dict())
    for module in (layer, peer):
        y = module.eval()(x)
        module.train()(x + 1)
        gradients.append(torch.autograd.grad(y, (x, module.weight, module.bias), cotangent))
    assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_two_training_forwards_before_the_backward() -> None:
    """The backward of a training step needs no running statistics (as in a GAN's discriminator)."""
    layer, x, cotangent = layer_and_input()
    expected = torch.autograd.grad(layer(x), x, cotangent)
    y = layer(x)
    layer(x + 1)
    assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], expected[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [{"x"}, {"weight"}, {"bias"}, {"residual"}, {"weight", "bias"}])
def test_only_some_inputs_require_a_gradient(wanted: set[str], training: bool) -> None:
    layer, x, cotangent = layer_and_input(activation="gelu")
    layer.train(training)
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias, "residual": torch.randn_like(x)}
    inputs["residual"].requires_grad_()
    expected = dict(
        zip(
            inputs,
            torch.autograd.grad(layer(x, residual=inputs["residual"]), inputs.values(), cotangent),
            strict=True,
        )
    )
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    layer(x, residual=inputs["residual"]).backward(cotangent)
    for name, tensor in inputs.items():
        if name in wanted:
            assert_close(tensor.grad, expected[name], rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_nothing_requires_a_gradient(training: bool) -> None:
    layer, x, _ = layer_and_input()
    layer.train(training).requires_grad_(False)
    y = layer(x.detach())
    assert not y.requires_grad
    assert y.grad_fn is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_the_values_are_the_same(training: bool, context: Any) -> None:
    layer, x, _ = layer_and_input(activation="relu")
    layer.train(training)
    twin = copy.deepcopy(layer)
    with context():
        y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, twin(x))
    assert torch.equal(layer.running_var, twin.running_var)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """The recomputed forward gives the same gradients (and counts a second time, as torch.nn's)."""
    layer, x, cotangent = layer_and_input(activation="silu")
    twin = copy.deepcopy(layer)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(cotangent)
    expected = torch.autograd.grad(twin(x), (x, *twin.parameters()), cotangent)
    assert all(map(torch.equal, (x.grad, layer.weight.grad, layer.bias.grad), expected))
    assert layer.num_batches_tracked == 2


def test_checkpointing_with_a_residual() -> None:
    layer, x, cotangent = layer_and_input(activation="relu")
    residual = torch.randn_like(x).requires_grad_()
    expected = torch.autograd.grad(layer(x, residual=residual), (x, residual), cotangent)
    y = checkpoint(lambda a, r: layer(a, residual=r), x, residual, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y, (x, residual), cotangent), expected))


def test_hooks_see_input_output_and_gradient() -> None:
    layer, x, cotangent = layer_and_input()
    seen: dict[str, Any] = {}
    layer.register_forward_pre_hook(lambda m, args: seen.update(input=args[0]))
    layer.register_forward_hook(lambda m, args, y: seen.update(output=y))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    y = layer(x)
    y.backward(cotangent)
    assert_close(seen["output"], y)
    assert torch.equal(seen["dy"], cotangent)
    assert torch.equal(seen["dx"], x.grad)
    assert seen["input"].shape == x.shape


def test_saved_tensor_hooks_may_pack_what_is_kept() -> None:
    """Offloading of activations: everything saved goes through pack and unpack."""
    layer, x, cotangent = layer_and_input(activation="relu")
    expected = torch.autograd.grad(layer(x), x, cotangent)[0]
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = layer(x)
    assert packed
    assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], expected)


def test_without_residual_no_activation_is_kept_beside_the_input() -> None:
    """The mask of the activation is recomputed from x: the fused layer keeps x and vectors."""
    layer, x, _ = layer_and_input(activation="relu")
    large: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= x.numel():
            large.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


def test_gradients_accumulate() -> None:
    layer, x, cotangent = layer_and_input()
    for _ in range(2):
        layer(x).backward(cotangent)
    once = torch.autograd.grad(layer(x), (x, *layer.parameters()), cotangent)
    sums = (x.grad, layer.weight.grad, layer.bias.grad)
    assert_close(sums, tuple(2 * g for g in once), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_sum_is_0_in_training() -> None:
    """y of a channel sums to N * beta whatever x is, so this cotangent tests nothing else."""
    layer, x, _ = layer_and_input()
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert dx.abs().max() < 1e-12


def test_an_expanded_cotangent() -> None:
    layer, x, _ = layer_and_input()
    scale = torch.randn(3, 1, 1, dtype=F64)
    ours, theirs = (
        torch.autograd.grad((f * scale).sum() if f.requires_grad else f, x)[0]
        for f in (layer(x).square(), plain(x, layer.weight, layer.bias).square())
    )
    assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_layer_used_twice_in_one_graph() -> None:
    layer, x, cotangent = layer_and_input()
    ours = torch.autograd.grad(layer(layer(x).tanh()), (x, layer.weight), cotangent)
    w, b = layer.weight, layer.bias
    theirs = torch.autograd.grad(plain(plain(x, w, b).tanh(), w, b), (x, w), cotangent)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert layer.num_batches_tracked == 2


def test_anomaly_mode_names_nothing_in_a_good_graph() -> None:
    layer, x, cotangent = layer_and_input()
    with torch.autograd.set_detect_anomaly(True):
        layer(x).backward(cotangent)
    assert x.grad.isfinite().all()


def test_gradcheck_finds_a_wrong_gradient() -> None:
    """The checks above can fail: the same call with a gradient off by 1e-4 does."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 1.01

    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradcheck(lambda x: norm(True)(Off.apply(x)), tensors((4, 3))[:1])
