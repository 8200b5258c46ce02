"""torch.compile, torch.export and autocast give what eager mode gives, buffers included."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

import normwise as nw

# Torch against its own advice: dynamo makes an instance of the autograd.Function that it traces,
# inductor imports torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]

# One kernel serves eager and compiled calls, so only what surrounds it may round otherwise.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A residual block: convolution, norm with residual and activation, and a loss after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nw.nn.BatchNorm2d(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x) * 2


class Plain(nn.Sequential):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(5, 4), nw.nn.BatchNorm1d(4, **options), nn.Tanh())


def steps(model: nn.Module, function: Any, inputs: list[Tensor]) -> dict[str, Any]:
    """Outputs and gradients of some steps, and the state after them."""
    result: dict[str, Any] = {}
    for i, x in enumerate(inputs):
        x = x.clone().requires_grad_()
        model.zero_grad()
        y = function(x)
        y.backward(torch.linspace(-1, 2, y.numel()).reshape(y.shape).sin())
        result |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
        result |= {f"{name}.grad{i}": p.grad for name, p in model.named_parameters()}
    return result | {name: b.clone() for name, b in model.named_buffers()}


def assert_compiled_is_eager(
    model: nn.Module, inputs: list[Tensor], backend: str = "aot_eager", **options: Any
) -> None:
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=backend, **options)
    expected = steps(model, model, inputs)
    got = steps(twin, compiled, inputs)
    for name, value in expected.items():
        assert_close(got[name], value, **CLOSE, equal_nan=True, msg=lambda t, n=name: f"{n}: {t}")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "not tracking": {"track_running_stats": False},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "skip": {"nonfinite": "skip"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_is_eager(options: dict[str, Any], training: bool) -> None:
    """Three steps: the counter moves in the graph, and nothing is compiled again for it."""
    model = Plain(**options).train(training)
    inputs = list(torch.randn(3, 6, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_is_eager(model, inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_residual_and_activation_compiled(
    training: bool, activation: str | None, layout: torch.memory_format
) -> None:
    model = Block(activation=activation).train(training).to(memory_format=layout)
    assert_compiled_is_eager(model, [torch.randn(2, 3, 6, 6).to(memory_format=layout)])


def test_mask_compiled() -> None:
    layer = nw.nn.BatchNorm1d(4)
    mask = torch.rand(3, 1, 7) < 0.6

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, mask=mask)

    assert_compiled_is_eager(Masked(), [torch.randn(3, 4, 7)])


def test_inductor_in_training() -> None:
    assert_compiled_is_eager(
        Block(activation="relu", momentum=None), list(torch.randn(2, 2, 3, 6, 6)), "inductor"
    )


def test_inductor_without_gradients() -> None:
    model = Block(activation="relu").eval()
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), **CLOSE)


def test_dynamic_batch_compiled_once() -> None:
    model, twin = Plain(), None
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [torch.randn(n, 5) for n in (6, 9, 17)]
    expected = steps(model, model, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(twin, compiled, inputs)
    assert_close(got, expected, **CLOSE)


def test_training_without_gradients_moves_the_buffers() -> None:
    model = Plain()
    twin = copy.deepcopy(model)
    x = torch.randn(6, 5)
    with torch.no_grad():
        assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), model(x), **CLOSE)
    assert_close(dict(twin.named_buffers()), dict(model.named_buffers()), **CLOSE)
    assert model[1].num_batches_tracked == 1


def test_skipped_batches_are_counted_in_the_graph() -> None:
    model = Plain(nonfinite="skip")
    bad = torch.randn(6, 5).index_fill(0, torch.tensor(1), torch.nan)
    assert_compiled_is_eager(model, [torch.randn(6, 5), bad, torch.randn(6, 5)])
    assert model[1].num_nonfinite_batches == 1
    assert model[1].num_batches_tracked == 2


def test_raise_is_raised_from_the_compiled_graph() -> None:
    layer = nw.nn.BatchNorm1d(5, nonfinite="raise")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    good = torch.randn(6, 5)
    compiled(good)
    before = layer.running_mean.clone()
    with pytest.raises(RuntimeError, match="inf or NaN in 1 of 5 channels: 3"):
        compiled(good.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(torch.inf)))
    assert torch.equal(layer.running_mean, before)


def test_the_compiled_graph_calls_the_kernels() -> None:
    """Both directions go to normwise's operators, not to a decomposition of the formulas."""
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        Plain(), fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    compiled(torch.randn(6, 5)).backward(torch.randn(6, 4))
    # The update of the running statistics is there too, inside a node that makes it functional.
    assert [c for c in called if c.startswith("normwise.")] == [
        "normwise.train_forward.default",
        "normwise.train_backward.default",
    ]
    assert not [c for c in called if "native_batch_norm" in c or "rsqrt" in c]


def test_the_function_compiled() -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        return nw.functional.batch_norm(
            x, mean, var, weight, training=True, activation="silu", channel_dim=-1
        )

    x, weight = torch.randn(3, 7, 5), torch.randn(5)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(5), torch.ones(5)
        results.append((f(x, mean, var, weight), mean, var))
    assert_close(*results, **CLOSE)


def test_errors_are_the_same_when_compiled() -> None:
    compiled = torch.compile(nw.nn.BatchNorm1d(5), backend="aot_eager")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        compiled(torch.randn(1, 5))


# Export


@pytest.mark.parametrize("options", ["plain", "momentum None", "relu", "not tracking"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_is_eager(strict: bool, training: bool, options: str) -> None:
    model = Plain(**OPTIONS[options]).train(training)
    x = torch.randn(6, 5)
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    for saved in (program, through_a_file(program)):
        module, twin = saved.module(), copy.deepcopy(model)
        for shift in range(2):
            assert_close(module(x + shift), twin(x + shift), **CLOSE)
        exported, eager = dict(module.named_buffers()), dict(twin.named_buffers())
        if not training:  # a strict export leaves the counter out, which eval mode does not read
            eager.pop("1.num_batches_tracked", None)
        assert eager.keys() <= exported.keys()
        for name, buffer in eager.items():
            assert_close(exported[name], buffer, **CLOSE)


def through_a_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_a_residual_and_a_batch_of_any_size(strict: bool, training: bool) -> None:
    model = Block(activation="relu").train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        copy.deepcopy(model),
        (torch.randn(4, 3, 6, 6),),
        dynamic_shapes=({0: batch},),
        strict=strict,
    )
    x = torch.randn(7, 3, 6, 6)
    assert_close(program.module()(x), model(x), **CLOSE)


# Autocast


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_what_torch_nn_gives(training: bool) -> None:
    """The norm takes the bfloat16 of the layer before it, its own parameters stay float32."""
    results = []
    for norm in (nw.nn.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 3)).train(training)
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model[1](model[0](x))
            y = model[2](hidden)
        assert hidden.dtype == torch.bfloat16
        y.float().mul(torch.linspace(-1, 1, 4)).backward(torch.randn(y.shape))
        slopes = {name: p.grad for name, p in model.named_parameters()}
        results.append({"y": y.float().detach(), "dx": x.grad, **slopes, **model.state_dict()})
    assert all(t.dtype != torch.bfloat16 for t in results[0].values())
    for name, expected in results[1].items():
        scale = float(expected.abs().max())
        assert_close(results[0][name], expected, rtol=0, atol=0.02 * scale + 1e-6)


def test_autocast_compiled() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nw.nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    x = torch.randn(8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        got = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_close(got, expected)
    assert_close(twin.state_dict(), model.state_dict())
