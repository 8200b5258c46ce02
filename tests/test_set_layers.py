"""Layer, group, instance and RMS norm layers in place of torch.nn's: samples, state, tools."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import normwise as nw

INSTANCE = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
NAMES = ("LayerNorm", "RMSNorm", "GroupNorm", *INSTANCE)
LAZY = tuple(f"Lazy{name}" for name in INSTANCE)
SHAPES = {"1d": (6, 4, 7), "2d": (3, 4, 3, 6), "3d": (2, 4, 3, 4, 2)}
F64 = torch.float64
TOLERANCE = {F64: {"rtol": 1e-11, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 5e-6}}


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES.get(name[-2:], (3, 4, 5, 6) if name == "GroupNorm" else (3, 5, 6))


def arguments_of(name: str) -> tuple[Any, ...]:
    return {"LayerNorm": (6,), "RMSNorm": (6,), "GroupNorm": (2, 4)}.get(name, (4,))


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and torch.nn's, with the same parameters, none of them at its initial value."""
    ours, theirs = getattr(nw.nn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        if getattr(theirs, "running_mean", None) is not None:
            theirs.running_mean.normal_()
            theirs.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def options_of(name: str) -> list[dict[str, Any]]:
    if name in INSTANCE:
        return [
            {"affine": a, "track_running_stats": t, "momentum": m}
            for a in (True, False)
            for t in (True, False)
            for m in (0.3, None)
        ] + [{"affine": True, "eps": 0.1}]
    if name == "GroupNorm":
        return [{}, {"affine": False}, {"eps": 0.1}]
    return [{}, {"elementwise_affine": False}, {"eps": 0.1}] + [{"bias": False}] * (
        name == "LayerNorm"
    )


ALL_OPTIONS = [(name, options) for name in NAMES for options in options_of(name)]


def run(module: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(cotangent.to(y.dtype))
    result = {"y": y.detach(), "x.grad": x.grad}
    result |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return result | {name: t.clone() for name, t in module.state_dict().items()}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    cotangent = torch.randn(x.shape, dtype=F64)
    mine, other = run(ours, x, cotangent), run(theirs, x, cotangent)
    assert mine.keys() == other.keys()
    for name, expected in other.items():
        tolerance = TOLERANCE.get(expected.dtype, {"rtol": 0, "atol": 0})
        largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        assert_close(
            mine[name], expected, rtol=tolerance["rtol"], atol=tolerance["atol"] * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# PyTorch's own samples


class Sample(NamedTuple):
    name: str
    number: int
    training: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.name}-{self.number}-{mode}-{str(self.dtype)[6:]}"


def information(name: str) -> Any:
    return next(m for m in module_db if m.module_cls is getattr(nn, name))


def samples_of(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    info = information(name)
    inputs: list[Any] = info.module_inputs_func(info, "cpu", dtype, False, training)
    return inputs


SAMPLES = [
    Sample(name, number, training, dtype)
    for name in NAMES
    for number in range(len(samples_of(name, F64, True)))
    for training in (True, False)
    for dtype in (F64, torch.float32)
]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_pytorchs_samples(sample: Sample) -> None:
    drawn = samples_of(sample.name, sample.dtype, sample.training)[sample.number]
    arguments = drawn.constructor_input
    ours, theirs = both(sample.name, *arguments.args, **arguments.kwargs, dtype=sample.dtype)
    assert repr(ours) == repr(theirs)
    (x,) = drawn.forward_input.args
    for training in (sample.training, sample.training, not sample.training):
        assert_same(ours.train(training), theirs.train(training), x)


def test_pytorchs_errors() -> None:
    info = information("GroupNorm")
    errors = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
    assert errors
    for error in errors:
        assert error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR
        arguments = error.module_error_input.constructor_input
        with pytest.raises(error.error_type, match=error.error_regex):
            nw.nn.GroupNorm(*arguments.args, **arguments.kwargs)


# Signatures, options, flags


@pytest.mark.parametrize("name", [*NAMES, *LAZY])
def test_arguments_are_torch_nns_and_then_ours_by_keyword(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(m, name).__init__).parameters.values()) for m in (nw.nn, nn)
    )
    shared = [p for p in theirs if p.name in {o.name for o in ours}]
    assert [(p.name, p.default, p.kind) for p in shared] == [
        (p.name, p.default, p.kind) for p in ours[: len(shared)]
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(shared) :])


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_functions_take_torch_nn_functionals_arguments(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(m, name)).parameters.values())
        for m in (nw.functional, nn.functional)
    )
    assert [(p.name, p.default) for p in theirs] == [
        (p.name, p.default) for p in ours[: len(theirs)]
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(("name", "options"), ALL_OPTIONS, ids=str)
def test_every_option_in_training_and_eval(name: str, options: dict[str, Any]) -> None:
    ours, theirs = both(name, *arguments_of(name), **options, dtype=F64)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, getattr(nn, name))
    for training in (True, True, False):
        x = 2 * torch.randn(shape_of(name), dtype=F64) - 1
        assert_same(ours.train(training), theirs.train(training), x)


@pytest.mark.parametrize("name", INSTANCE)
def test_running_statistics_that_are_switched(name: str) -> None:
    ours, theirs = both(name, 4, track_running_stats=True, dtype=F64)
    for layer in (ours, theirs):
        layer.track_running_stats = False
    x = torch.randn(shape_of(name), dtype=F64)
    assert_same(ours, theirs, x)
    assert_same(ours.eval(), theirs.eval(), x)


@pytest.mark.parametrize("name", INSTANCE)
def test_a_sample_without_the_batch_axis(name: str) -> None:
    ours, theirs = both(name, 4, affine=True, track_running_stats=True, dtype=F64)
    x = torch.randn(shape_of(name)[1:], dtype=F64)
    assert_same(ours, theirs, x)
    residual = torch.randn_like(x)
    assert_close(ours.eval()(x, residual=residual), theirs.eval()(x) + residual)


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("name", INSTANCE)
def test_wrong_rank_is_torch_nns_error(name: str, rank: int) -> None:
    ours, theirs = both(name, 4, affine=True)
    x = torch.randn((4,) * rank)
    try:
        theirs(x)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).partition(" (")[0]):
            ours(x)
    else:
        assert ours(x).shape == x.shape


def test_wrong_number_of_features() -> None:
    x = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"size at dim=1 to match num_features \(4\)"):
        nw.nn.InstanceNorm1d(4, affine=True)(x)
    with pytest.warns(UserWarning, match="dim=0 does not match num_features"):
        y = nw.nn.InstanceNorm1d(4)(x[0])
    assert y.shape == x[0].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str, own: bool, dtype: torch.dtype) -> None:
    options = {"affine": True} if name in INSTANCE else {}
    parameter_dtype = dtype if own else torch.float32
    ours, theirs = both(name, *arguments_of(name), **options, dtype=parameter_dtype)
    if name == "RMSNorm":
        ours.eps = theirs.eps = 1e-5  # its default follows the dtype
    x = torch.randn(shape_of(name)).to(dtype)
    exact = copy.deepcopy(theirs).double()(x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rms_norm's, of mixed dtypes
        cotangent = torch.randn(x.shape)
        mine, other = (run(m, x, cotangent) for m in (ours, theirs))
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in other.items()}
    assert_close(mine["y"].double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)


# State and copies


@pytest.mark.parametrize(("name", "options"), ALL_OPTIONS, ids=str)
def test_state_dict_is_torch_nns_and_loads_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = both(name, *arguments_of(name), **options)
    ours(torch.randn(shape_of(name)))
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert state._metadata == theirs.state_dict()._metadata
    theirs.load_state_dict(state)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.dtype == state[key].dtype


def through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_a_file,
}


# torch.nn's lazy layers cannot be deep-copied before their first input.
@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in NAMES for how in COPIES] + [(n, "pickle") for n in LAZY],
)
def test_copies_keep_the_options(name: str, how: str) -> None:
    arguments = () if name in LAZY else arguments_of(name)
    layer = getattr(nw.nn, name)(*arguments, activation="relu")
    twin = COPIES[how](layer)
    assert repr(twin) == repr(layer)
    assert repr(layer).endswith("activation='relu')")
    x = torch.randn(shape_of(name))
    assert torch.equal(twin(x), layer(x))
    assert (twin(x) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_from_before_our_options_has_their_defaults(name: str) -> None:
    layer = getattr(nw.nn, name)(*arguments_of(name))
    state = {k: v for k, v in layer.__dict__.items() if k not in ("activation", "channel_dim")}
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    x = torch.randn(shape_of(name))
    assert torch.equal(old(x), layer(x))
    assert repr(old) == repr(layer)


# Ours beyond torch.nn


@pytest.mark.parametrize("name", NAMES)
def test_activation_and_residual_are_those_of_pytorch(name: str) -> None:
    options = {"track_running_stats": True} if name in INSTANCE else {}
    fused = getattr(nw.nn, name)(*arguments_of(name), **options, activation="gelu", dtype=F64)
    plain = getattr(nn, name)(*arguments_of(name), **options, dtype=F64)
    x, residual, cotangent = torch.randn(3, *shape_of(name), dtype=F64)
    for training in (True, False):
        found = []
        for function in (
            lambda a, r: fused(a, residual=r),
            lambda a, r: nn.functional.gelu(plain(a) + r),
        ):
            a, r = x.clone().requires_grad_(), residual.clone().requires_grad_()
            y = function(a, r)
            found.append((y.detach(), *torch.autograd.grad(y, (a, r), cotangent)))
        assert_close(*found, **TOLERANCE[F64])
        assert_close(fused.state_dict(), plain.state_dict(), **TOLERANCE[F64])
        fused.train(not training)
        plain.train(not training)


@pytest.mark.parametrize("name", ["GroupNorm", *INSTANCE])
def test_channels_on_another_axis(name: str) -> None:
    options = {} if name == "GroupNorm" else {"affine": True, "track_running_stats": True}
    layer = getattr(nw.nn, name)(*arguments_of(name), **options, channel_dim=-1, dtype=F64)
    peer = getattr(nn, name)(*arguments_of(name), **options, dtype=F64)
    assert repr(layer).endswith("channel_dim=-1)")
    x = torch.randn(shape_of(name), dtype=F64)
    for training in (True, False):
        y = layer.train(training)(x.movedim(1, -1))
        assert_close(y.movedim(-1, 1), peer.train(training)(x), **TOLERANCE[F64])
    assert_close(layer.state_dict(), peer.state_dict(), **TOLERANCE[F64])


def test_masked_positions_stay_out_of_the_running_statistics() -> None:
    layer, peer = both("InstanceNorm1d", 4, track_running_stats=True, dtype=F64)
    x = torch.randn(2, 4, 9, dtype=F64)
    mask = torch.arange(9).expand(2, 1, 9) < 6
    layer(x.masked_fill(~mask, torch.nan), mask=mask)
    peer(x[..., :6])
    assert_close(layer.state_dict(), peer.state_dict(), **TOLERANCE[F64])
    before = layer.running_var.clone()
    assert not layer(x, mask=torch.zeros_like(mask)).any()
    assert torch.equal(layer.running_var, before)


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_become_ours(name: str) -> None:
    lazy, theirs = getattr(nw.nn, name)(), getattr(nn, name)()
    assert repr(lazy) == repr(theirs)
    x = torch.randn(shape_of(name))
    assert_close(lazy(x), theirs(x), **TOLERANCE[torch.float32])
    assert type(lazy) is getattr(nw.nn, name[4:])
    assert lazy.num_features == 4
    assert repr(lazy) == repr(theirs)
    assert_same(lazy, theirs, x)


def test_lazy_layers_take_a_single_sample_and_another_axis() -> None:
    assert nw.nn.LazyInstanceNorm1d()(torch.randn(4, 7)).shape == (4, 7)
    lazy = nw.nn.LazyInstanceNorm2d(channel_dim=-1, bias=False)
    assert lazy(torch.randn(2, 5, 6, 4)).shape == (2, 5, 6, 4)
    assert (lazy.num_features, lazy.bias) == (4, None)


def test_memory_format_of_group_norm_is_torch_nns() -> None:
    ours, theirs = both("GroupNorm", 2, 4)
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert ours(x).stride() == theirs(x).stride()
    assert_same(ours, theirs, x)


# Compilers, transforms, autocast


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiling = [
    pytest.mark.usefixtures("_fresh_compiler"),
    # Torch against its own advice, see test_compile.py.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


class Net(nn.Module):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        more = {"affine": True, "track_running_stats": True} if name in INSTANCE else {}
        self.norm = getattr(nw.nn, name)(*arguments_of(name), **more, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * 2, residual=x) - 1


def marked(function: Any) -> Any:
    for mark in compiling:
        function = mark(function)
    return function


ONE_OF_EACH = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d")


@marked
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiled_is_eager(name: str, activation: str | None) -> None:
    model = Net(name, activation=activation)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(shape_of(name))
        cotangent = torch.randn(x.shape)
        expected = run(model, x, cotangent)
        got = run(compiled, x, cotangent)
        got = {n.replace("_orig_mod.", ""): t for n, t in got.items()}
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


@marked
def test_inductor() -> None:
    model = nn.Sequential(nw.nn.LayerNorm(6), nw.nn.RMSNorm(6, activation="relu"))
    twin = copy.deepcopy(model)
    x, cotangent = torch.randn(2, 5, 6)
    got = run(torch.compile(twin, fullgraph=True), x, cotangent)
    got = {n.replace("_orig_mod.", ""): t for n, t in got.items()}
    assert_close(got, run(model, x, cotangent), rtol=1e-4, atol=1e-5)


@marked
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exported_is_eager(name: str, strict: bool) -> None:
    model = Net(name, activation="relu")
    x = torch.randn(shape_of(name))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        copy.deepcopy(model), (x,), dynamic_shapes=({0: batch},), strict=strict
    )
    module = program.module()
    for rows in (2, 5):
        x = torch.randn(rows, *shape_of(name)[1:])
        assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    # A strict export leaves out the counter, which instance norm never reads.
    moved = dict(module.named_buffers())
    for key, buffer in model.named_buffers():
        if not key.endswith("num_batches_tracked"):
            assert_close(moved[key], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_under_vmap(name: str) -> None:
    models = [Net(name).double() for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, *shape_of(name), dtype=F64)

    def member(p: Any, b: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (p, b), (x,))

    y = torch.vmap(member)(parameters, buffers, x)
    assert_close(y, torch.stack([m(v) for m, v in zip(models, x, strict=True)]), **TOLERANCE[F64])
    for key, stacked in buffers.items():
        own = torch.stack([dict(m.named_buffers())[key] for m in models])
        assert_close(stacked, own, **TOLERANCE[F64])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_dtypes_of_torch_nn(name: str) -> None:
    ours, theirs = both(name, *arguments_of(name))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape_of(name)).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype
        assert_close(y, expected, rtol=0.01, atol=0.02)


def test_deterministic_algorithms_are_no_error() -> None:
    layer, x = nw.nn.LayerNorm(6), torch.randn(4, 6)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = layer(x), layer(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
