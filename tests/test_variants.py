"""Ghost, renorm and frozen batch norm, and masks by lengths, in all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import array
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, stack_module_state, vmap
from torch.testing import assert_close

import normwise as nw
from normwise.errors import DtypeError, InputError

F64 = torch.float64
EXACT = {"rtol": 1e-11, "atol": 1e-11}

LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch": (nw.nn.BatchNorm, {}),
    "sync": (nw.nn.SyncBatchNorm, {}),
    "ghost": (nw.nn.GhostBatchNorm, {"ghost_size": 3}),
    "renorm": (nw.nn.BatchRenorm, {"schedule": None, "rmax": 1.5, "dmax": 0.5}),
}


def layer_of(name: str, channels: int = 3, **options: Any) -> Any:
    cls, own = LAYERS[name]
    layer = cls(channels, **(own | options), dtype=F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def results(layer: nn.Module, x: Tensor, dy: Tensor, **call: Any) -> dict[str, Tensor]:
    """Output, all gradients, and the buffers after."""
    leaves = {"x": x.clone().requires_grad_()}
    if "residual" in call:
        leaves["residual"] = call["residual"] = call["residual"].clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaves["x"], **call)
    y.backward(dy)
    found = {"y": y.detach()} | {f"d{n}": t.grad for n, t in leaves.items()}
    found |= {f"d{n}": p.grad for n, p in layer.named_parameters()}
    return found | {n: b.clone() for n, b in layer.named_buffers()}


# Masks and lengths


LENGTHS = torch.tensor([5, 2, 0, 4, 1])


@pytest.mark.parametrize("name", ["batch", "sync", "renorm"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_masked_equals_packed(name: str, channel_dim: int) -> None:
    """Outputs, gradients and running statistics are those of the valid elements alone."""
    padded, packed = (layer_of(name, channel_dim=c, activation="silu") for c in (channel_dim, 1))
    packed.load_state_dict(padded.state_dict())
    x, residual, dy = torch.randn(3, 5, 5, 3, dtype=F64) * 2 + 100
    kept = torch.arange(5) < LENGTHS[:, None]
    expected = results(packed, x[kept], dy[kept], residual=residual[kept])
    x = torch.where(kept[..., None], x, torch.nan)  # padding may hold anything
    if channel_dim == 1:
        x, residual, dy = (t.transpose(1, 2) for t in (x, residual, dy))
    found = results(padded, x, dy, residual=residual, lengths=LENGTHS)
    for key in ("y", "dx", "dresidual"):
        value = found[key] if channel_dim == -1 else found[key].transpose(1, 2)
        assert_close(value[kept], expected[key], **EXACT)
        assert (value[~kept] == 0).all()
    for key in expected.keys() - {"y", "dx", "dresidual"}:
        assert_close(found[key], expected[key], **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_all_masked_leaves_everything_alone(name: str) -> None:
    layer = layer_of(name)
    before = {n: b.clone() for n, b in layer.named_buffers()}
    x, residual, dy = torch.randn(3, 5, 3, 4, dtype=F64)
    found = results(layer, x, dy, residual=residual, lengths=torch.zeros(5, dtype=torch.int64))
    for key, value in found.items():
        assert torch.equal(value, before.get(key, torch.zeros_like(value))), key


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_a_mask(name: str) -> None:
    x, dy = torch.randn(2, 5, 3, 5, dtype=F64)
    by_lengths, by_mask = layer_of(name), layer_of(name)
    by_mask.load_state_dict(by_lengths.state_dict())
    mask = (torch.arange(5) < LENGTHS[:, None]).unsqueeze(1)
    found = results(by_lengths, x, dy, lengths=LENGTHS.tolist())
    assert_close(found, results(by_mask, x, dy, mask=mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"lengths": torch.tensor([6, 1, 1, 1, 1])}, InputError, "from 0 to 5.*from 1 to 6"),
        ({"lengths": torch.tensor([-1, 1, 1, 1, 1])}, InputError, "from -1 to 1"),
        ({"lengths": torch.tensor([1, 1])}, InputError, r"one length for each.*shape \(2,\)"),
        ({"lengths": torch.ones(5, 1).long()}, InputError, r"shape \(5, 1\)"),
        ({"lengths": torch.ones(5)}, DtypeError, "integers.*float32"),
        ({"lengths": torch.ones(5).bool()}, DtypeError, "integers.*bool"),
        (
            {"lengths": torch.ones(5).long(), "mask": torch.ones(5, 1, 5).bool()},
            InputError,
            "both of them",
        ),
        ({"mask": torch.ones(5, 3, 5).bool()}, InputError, "where it has size 1"),
        ({"mask": torch.ones(5, 1, 5)}, DtypeError, "mask is boolean"),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_masks_and_lengths(name: str, call: Any, error: Any, text: str) -> None:
    layer = layer_of(name)
    with pytest.raises(error, match=text):
        layer(torch.randn(5, 3, 5, dtype=F64), **call)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4)])
def test_lengths_of_what_is_no_sequence(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(N, C, L\) or \(N, L, C\)"):
        nw.nn.BatchNorm(3)(torch.randn(shape), lengths=torch.ones(5).long())


# Ghost


SHAPES = [
    ((9, 3, 5), 1, 4, "contiguous"),
    ((8, 3, 2, 4), 1, 4, "channels_last"),
    ((10, 6, 3), -1, 4, "contiguous"),
    ((7, 1, 5), 1, 3, "contiguous"),
    ((3, 10, 4), 0, 4, "contiguous"),
    ((9, 3), 1, 3, "contiguous"),
    ((6, 3, 5), 1, 2, "transposed"),
    ((4, 3, 5), 1, 9, "contiguous"),
]


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis", "size", "layout"), SHAPES, ids=str)
def test_ghosts_are_batches_of_their_own(
    shape: tuple[int, ...],
    axis: int,
    size: int,
    layout: str,
    masked: bool,
    activation: str | None,
    backend: str,
) -> None:
    options: dict[str, Any] = {"channel_dim": axis, "activation": activation}
    ghost = layer_of("ghost", shape[axis], ghost_size=size, **options)
    plain = layer_of("batch", shape[axis], **options)
    plain.load_state_dict(ghost.state_dict())
    x, residual, dy = torch.randn(3, *shape, dtype=F64) * 2 + 1
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    batch = 1 if axis == 0 else 0
    mask = torch.rand([1 if d == axis % len(shape) else n for d, n in enumerate(shape)]) < 0.6
    call = {"residual": residual} | ({"mask": mask} if masked else {})
    found = results(ghost, x, dy, **call)
    parts = [
        results(plain, *(t.split(size, batch)[i] for t in (x, dy)),
                **{k: v.split(size, batch)[i] for k, v in call.items()})
        for i in range(-(-shape[batch] // size))
    ]  # fmt: skip
    for key in ("y", "dx", "dresidual"):
        assert_close(found[key], torch.cat([p[key] for p in parts], batch), **EXACT)
    assert found["y"].stride() == x.stride()
    for key in ("dweight", "dbias"):
        assert_close(found[key], torch.stack([p[key] for p in parts]).sum(0), **EXACT)
    # The running statistics are those of the whole batch.
    moments = oracle.moments(array(x), axis % len(shape), mask.numpy() if masked else None)
    mean, var, tracked = oracle.update_running(
        np.zeros(shape[axis]), np.ones(shape[axis]), 0, moments, 0.1
    )
    assert_close(found["running_mean"], torch.from_numpy(mean), **EXACT)
    assert_close(found["running_var"], torch.from_numpy(var), **EXACT)
    assert found["num_batches_tracked"] == tracked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ghosts_far_from_zero_and_in_half(dtype: torch.dtype) -> None:
    x = (torch.randn(12, 3, 40) + (1e6 if dtype == torch.float32 else 3)).to(dtype)
    y = nw.nn.GhostBatchNorm(3, ghost_size=5)(x)
    exact = torch.cat([nn.BatchNorm1d(3, dtype=F64)(part) for part in x.double().split(5)])
    assert y.dtype == dtype
    assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_derivatives_of_ghosts(activation: str | None) -> None:
    x, residual = torch.randn(2, 5, 2, 3, dtype=F64, requires_grad=True)
    layer = layer_of("ghost", 2, ghost_size=2, update_stats=False, activation=activation)
    inputs = (x, residual, layer.weight, layer.bias)

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_ghost_size_that_is_none(size: Any) -> None:
    with pytest.raises(InputError, match="ghost_size is how many samples"):
        nw.nn.GhostBatchNorm(3, ghost_size=size)


def test_a_remainder_of_one_value_is_an_error() -> None:
    with pytest.raises(InputError, match="more than 1 value per channel"):
        nw.nn.GhostBatchNorm(3, ghost_size=4)(torch.randn(9, 3))


# Renorm


def corrected(
    x: Tensor, mean: Tensor, var: Tensor, rmax: float, dmax: float, eps: float = 1e-5
) -> Tensor:
    """Ioffe 2017, algorithm 1, for (N, C) input, out of elementary operations."""
    mu, sigma_b = x.mean(0), (x.var(0, correction=0) + eps).sqrt()
    sigma = (var + eps).sqrt()
    r = (sigma_b.detach() / sigma).clamp(1 / rmax, rmax)
    d = ((mu.detach() - mean) / sigma).clamp(-dmax, dmax)
    return (x - mu) / sigma_b * r + d


@pytest.mark.parametrize(("rmax", "dmax"), [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (1e9, 1e9)])
def test_renorm_is_the_papers(rmax: float, dmax: float, backend: str) -> None:
    layer = layer_of("renorm", rmax=rmax, dmax=dmax)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.2, 4)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x, dy = torch.randn(2, 8, 3, dtype=F64) * 2 + 1
    found = results(layer, x, dy)
    x.requires_grad_()
    y = corrected(x, mean, var, rmax, dmax) * layer.weight + layer.bias
    expected = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    assert_close(found["y"], y.detach(), **EXACT)
    assert_close((found["dx"], found["dweight"], found["dbias"]), expected, **EXACT)
    assert_close(found["running_mean"], 0.9 * mean + 0.1 * x.detach().mean(0), **EXACT)
    assert_close(found["running_var"], 0.9 * var + 0.1 * x.detach().var(0), **EXACT)
    if rmax == 1e9:  # nothing clipped: what eval mode does
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        assert_close(layer.eval()(x), y, **EXACT)


def test_the_limits_follow_the_schedule() -> None:
    layer = nw.nn.BatchRenorm(3)
    at = {}
    for step in (0, 5000, 15000, 25000, 40000, 99999):
        layer.num_batches_tracked.fill_(step)
        at[step] = tuple(float(v) for v in layer.limits())
    assert at[0] == at[5000] == (1.0, 0.0)
    assert at[15000] == pytest.approx((1 + 2 * 10 / 35, 2.5))
    assert at[25000] == pytest.approx((1 + 2 * 20 / 35, 5.0))
    assert at[40000] == at[99999] == (3.0, 5.0)


def test_renorm_before_its_schedule_is_batch_norm() -> None:
    renorm, plain = nw.nn.BatchRenorm(3, dtype=F64), nw.nn.BatchNorm(3, dtype=F64)
    x, dy = torch.randn(2, 6, 3, 4, dtype=F64) + 2
    assert_close(results(renorm, x, dy), results(plain, x, dy), **EXACT)


def test_derivatives_of_renorm() -> None:
    """Between the limits, and with statistics that do not move; r and d are constants."""
    layer = layer_of("renorm", 2, update_stats=False, activation="tanh", rmax=1.0, dmax=0.0)
    x, residual = torch.randn(2, 5, 2, 3, dtype=F64, requires_grad=True)
    assert gradcheck(layer, (x, residual))
    assert gradgradcheck(layer, (x, residual))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rmax": 0.5}, "rmax=0.5"),
        ({"dmax": -1.0}, "dmax=-1.0"),
        ({"schedule": (10, 5, 20)}, "start first"),
        ({"track_running_stats": False}, "track_running_stats=False"),
    ],
)
def test_wrong_options_of_renorm(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        nw.nn.BatchRenorm(3, **options)


# Frozen


def pretrained() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3, dtype=F64)
    for t in layer.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 2)
    return layer.eval()


def test_frozen_is_eval_in_every_mode_and_loads_torch_nns() -> None:
    source, x = pretrained(), torch.randn(2, 3, 4, 4, dtype=F64)
    frozen = nw.nn.FrozenBatchNorm(3, dtype=F64)
    frozen.load_state_dict(source.state_dict())
    assert_close(frozen.train()(x), source(x), **EXACT)
    assert_close(frozen.eval()(x), source(x), **EXACT)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert not list(frozen.parameters())


def test_frozen_loads_a_nested_checkpoint_of_torchvision() -> None:
    """Its FrozenBatchNorm2d: four buffers, version 1; and older ones with a counter."""
    source = pretrained()
    state = nn.Sequential(nn.Sequential(source)).state_dict()
    del state["0.0.num_batches_tracked"]
    state._metadata["0.0"]["version"] = 1
    model = nn.Sequential(nn.Sequential(nw.nn.FrozenBatchNorm(3, dtype=F64)))
    model.load_state_dict(state)
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    assert_close(model(x), source(x), **EXACT)


def test_frozen_loads_detectron2s_versions() -> None:
    weight, bias = torch.randn(2, 3, dtype=F64)
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    column = (1, 3, 1, 1)
    affine = x * weight.reshape(column) / (1 + 1e-5) ** 0.5 + bias.reshape(column)
    frozen = nw.nn.FrozenBatchNorm(3, dtype=F64)
    frozen.running_var.fill_(7)
    frozen.load_state_dict({"weight": weight, "bias": bias})  # Caffe2's: no metadata
    assert_close(frozen(x), affine, **EXACT)
    full = frozen.state_dict()
    assert full._metadata[""]["version"] == 3
    del full["running_mean"]
    with pytest.raises(RuntimeError, match="running_mean"):  # version 3 has all four
        frozen.load_state_dict(full)


def test_derivatives_of_frozen() -> None:
    frozen = nw.nn.FrozenBatchNorm(2, dtype=F64, activation="silu", channel_dim=-1)
    x, residual = torch.randn(2, 3, 4, 2, dtype=F64, requires_grad=True)
    assert gradcheck(frozen, (x, residual))
    assert gradgradcheck(frozen, (x, residual))
    y = frozen(x, residual, lengths=torch.tensor([4, 1, 0]))
    assert (y[2] == 0).all()


# In common


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_are_torch_nns(name: str) -> None:
    layer, theirs = layer_of(name), nn.BatchNorm1d(3, dtype=F64)
    layer(torch.randn(6, 3, 2, dtype=F64))
    theirs.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert layer.state_dict()._metadata == theirs.state_dict()._metadata
    x = torch.randn(6, 3, dtype=F64)
    assert_close(layer.eval()(x), theirs.eval()(x), **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_under_vmap(name: str) -> None:
    """Each member moves running statistics of its own (pytorch issue 85533)."""
    models = [layer_of(name) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(3, 7, 3, 4, dtype=F64)

    def member(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], (p, b), (x,))

    for step in range(2):
        y = vmap(member)(parameters, buffers, x + step)
        twins = [m(v + step) for m, v in zip(models, x, strict=True)]
        assert_close(y, torch.stack(twins), **EXACT)
    for key, stacked in buffers.items():
        assert_close(stacked, torch.stack([m.state_dict()[key] for m in models]), **EXACT)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_in_one_graph(name: str) -> None:
    layer, twin = layer_of(name), layer_of(name)
    twin.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, 7, 3, 4, dtype=F64)
    compiled = results(torch.compile(twin, backend="aot_eager", fullgraph=True), x, dy)
    compiled = {k.replace("_orig_mod.", ""): v for k, v in compiled.items()}
    assert_close(compiled, results(layer, x, dy), **EXACT)
