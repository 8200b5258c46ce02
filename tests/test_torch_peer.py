"""The layers in place of torch.nn's: PyTorch's own samples, state, flags, errors, tools."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import normwise as nw

PAIRS = {
    name: (getattr(nw.nn, name), getattr(nn, name))
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
}
LAZY = {
    name: (getattr(nw.nn, name), getattr(nn, name))
    for name in ("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d")
}
SHAPES = {"1d": (6, 5, 7), "2d": (4, 5, 3, 6), "3d": (2, 5, 3, 4, 2)}
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
}


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES[name[-2:]]


def both(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's, with the same parameters, none of them at its initial value."""
    ours, theirs = (cls(*args, **kwargs) for cls in (PAIRS | LAZY)[name])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        if theirs.running_mean is not None:
            theirs.running_mean.normal_()
            theirs.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    """Output and all gradients, and the state after."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    if y.requires_grad:
        y.backward(cotangent.to(y.dtype))
    result = {"y": y.detach(), "x.grad": x.grad}
    result |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return result | {name: t.clone() for name, t in module.state_dict().items()}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    mine, other = run(ours, x, cotangent), run(theirs, x, cotangent)
    assert mine.keys() == other.keys()
    for name, expected in other.items():
        if expected is None:
            assert mine[name] is None
            continue
        tolerance = dict(TOLERANCE.get(expected.dtype, {"rtol": 0, "atol": 0}))
        if name in ("weight.grad", "bias.grad") and expected.numel():
            # A sum is as exact as its terms are large, not as what is left of them: over 30 draws
            # torch.nn's weight.grad is up to 3.9e-7 of the largest off the float64 one, ours 1.5e-7
            tolerance["atol"] *= max(1.0, float(expected.abs().max()))
        assert_close(
            mine[name],
            expected,
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# PyTorch's own samples


class Sample(NamedTuple):
    name: str
    number: int
    training: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.name}-{self.number}-{mode}-{str(self.dtype)[6:]}"

    def draw(self) -> Any:
        info = next(m for m in module_db if m.module_cls is PAIRS[self.name][1])
        return info.module_inputs_func(
            info, "cpu", self.dtype, requires_grad=False, training=self.training
        )[self.number]


def all_samples() -> list[Sample]:
    found = []
    for info in module_db:
        name = info.module_cls.__name__
        if name not in PAIRS or info.module_cls is not PAIRS[name][1]:
            continue
        count = len(info.module_inputs_func(info, "cpu", torch.float32, False, True))
        found += [
            Sample(name, number, training, dtype)
            for number in range(count)
            for training in (True, False)
            for dtype in (torch.float64, torch.float32)
        ]
    return found


def test_pytorch_has_samples_of_every_class() -> None:
    assert {s.name for s in all_samples()} == set(PAIRS)


@pytest.mark.parametrize("sample", all_samples(), ids=str)
def test_pytorchs_samples(sample: Sample) -> None:
    """Three steps and one in the other mode: outputs, gradients, state; and the representation."""
    drawn = sample.draw()
    arguments = drawn.constructor_input
    ours, theirs = both(sample.name, *arguments.args, **arguments.kwargs, dtype=sample.dtype)
    assert repr(ours) == repr(theirs)
    (x,) = drawn.forward_input.args
    for training in (sample.training, sample.training, not sample.training):
        ours.train(training)
        theirs.train(training)
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("name", PAIRS)
def test_pytorchs_errors(name: str) -> None:
    info = next(m for m in module_db if m.module_cls is PAIRS[name][1])
    errors = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
    assert errors
    for error in errors:
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        sample = error.module_error_input
        module = PAIRS[name][0](*sample.constructor_input.args, **sample.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*sample.forward_input.args)


# Signatures


@pytest.mark.parametrize("name", [*PAIRS, *LAZY])
def test_arguments_are_torch_nns_and_then_ours_by_keyword(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(cls.__init__).parameters.values()) for cls in (PAIRS | LAZY)[name]
    )
    shared = [p for p in theirs if p.name in {o.name for o in ours}]
    assert [(p.name, p.default, p.kind) for p in shared] == [
        (p.name, p.default, p.kind) for p in ours[: len(shared)]
    ]
    assert len(shared) == len(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(shared) :])


def test_the_function_takes_torch_nn_functionals_arguments() -> None:
    ours = list(inspect.signature(nw.functional.batch_norm).parameters.values())
    theirs = list(inspect.signature(nn.functional.batch_norm).parameters.values())
    assert [(p.name, p.default) for p in theirs] == [
        (p.name, p.default) for p in ours[: len(theirs)]
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_is_torch_nn_functionals(training: bool, weight: bool, bias: bool) -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64) if weight else None
    b = torch.randn(5, dtype=torch.float64) if bias else None
    results = []
    for function in (nw.functional.batch_norm, nn.functional.batch_norm):
        torch.manual_seed(1)
        mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
        results.append((function(x, mean, var, w, b, training, 0.3, 1e-3), mean, var))
    assert_close(*results, **TOLERANCE[torch.float64])


# Flags, and flags that change


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "momentum None": lambda m: setattr(m, "momentum", None),
    "momentum 0": lambda m: setattr(m, "momentum", 0.0),
    "momentum 1": lambda m: setattr(m, "momentum", 1.0),
    "eps": lambda m: setattr(m, "eps", 0.5),
    "track_running_stats off": lambda m: setattr(m, "track_running_stats", False),
    "no buffers": lambda m: [setattr(m, n, None) for n in ("running_mean", "running_var")],
    "no buffers, not tracking": lambda m: [
        *(setattr(m, n, None) for n in ("running_mean", "running_var")),
        setattr(m, "track_running_stats", False),
    ],
    "no counter": lambda m: setattr(m, "num_batches_tracked", None),
    "no counter, momentum None": lambda m: [
        setattr(m, "num_batches_tracked", None),
        setattr(m, "momentum", None),
    ],
    "no weight": lambda m: setattr(m, "weight", None),
    "no bias": lambda m: setattr(m, "bias", None),
    "frozen": lambda m: m.requires_grad_(False),
    "weight frozen": lambda m: m.weight.requires_grad_(False),
    "reset_running_stats": lambda m: m.reset_running_stats(),
    "reset_parameters": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("start", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_flags_that_change_in_use(name: str, mutation: str, start: bool) -> None:
    ours, theirs = both(name, 5, dtype=torch.float64)
    ours.train(start)
    theirs.train(start)
    for step in range(4):
        if step == 1:
            MUTATIONS[mutation](ours)
            MUTATIONS[mutation](theirs)
        if step == 3:
            ours.train(not start)
            theirs.train(not start)
        assert_same(ours, theirs, torch.randn(shape_of(name), dtype=torch.float64) + 3)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"track_running_stats": False, "momentum": None},
        {"affine": False, "track_running_stats": False},
        {"eps": 0.1, "momentum": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", PAIRS)
def test_every_option_in_training_and_eval(name: str, options: dict[str, Any]) -> None:
    ours, theirs = both(name, 5, **options, dtype=torch.float64)
    assert repr(ours) == repr(theirs)
    for training in (True, True, True, False):
        ours.train(training)
        theirs.train(training)
        assert_same(ours, theirs, 2 * torch.randn(shape_of(name), dtype=torch.float64) - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["own", "float32"])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision(dtype: torch.dtype, parameters: str, training: bool) -> None:
    ours, theirs = both("BatchNorm2d", 5, dtype=dtype if parameters == "own" else torch.float32)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(16, 5, 6, 6).to(dtype)
    exact = copy.deepcopy(theirs).double()(x.double())
    mine, other = (run(m, x, torch.randn(x.shape)) for m in (ours, theirs))
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in other.items()}
    # The one rounding of the output is all that is lost; torch.nn also rounds the statistics.
    assert_close(mine["y"].double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_one_value_per_channel_is_an_error_in_training_only(name: str) -> None:
    shape = (1, 5) + (1,) * (len(shape_of(name)) - 2)
    ours, theirs = both(name, 5)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(torch.randn(shape))
    x = torch.randn(shape)
    assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[torch.float32])
    assert ours.num_batches_tracked == 0


@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (4, 5, 6), (4, 5, 6, 7), (1, 5, 2, 2, 2), (1,) * 6]
)
@pytest.mark.parametrize("name", PAIRS)
def test_wrong_rank_is_torch_nns_error(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs = both(name, 5)
    x = torch.randn(shape)
    try:
        theirs(x)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).partition(" (")[0]):
            ours(x)
    else:
        assert ours(x).shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 7), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batches(shape: tuple[int, ...], training: bool, momentum: float | None) -> None:
    """No element moves no running statistic, as in torch.nn."""
    ours, theirs = both("BatchNorm1d", 5, momentum=momentum)
    ours.train(training)
    theirs.train(training)
    for _ in range(2):
        assert_same(ours, theirs, torch.randn(shape))


# Layouts


def layouts() -> dict[str, Tensor]:
    x2, x3 = torch.randn(4, 5, 3, 6), torch.randn(2, 5, 3, 4, 2)
    return {
        "NC": torch.randn(4, 5),
        "NCL": torch.randn(4, 5, 7),
        "NCHW": x2,
        "NCDHW": x3,
        "channels_last": x2.to(memory_format=torch.channels_last),
        "channels_last_3d": x3.to(memory_format=torch.channels_last_3d),
        "channels_last, one pixel": torch.randn(4, 5, 1, 1).to(memory_format=torch.channels_last),
        "channels_last, one image": x2[:1].to(memory_format=torch.channels_last),
        "channels_last, one channel": torch.randn(4, 1, 3, 6).to(memory_format=torch.channels_last),
        "a slice of the batch": torch.randn(8, 5, 3, 6)[::2],
        "a slice of the channels": torch.randn(4, 9, 3, 6)[:, 2:7],
        "every second column": torch.randn(4, 5, 3, 12)[..., ::2],
        "a slice of the rows, channels_last": torch.randn(4, 5, 9, 6).to(
            memory_format=torch.channels_last
        )[:, :, 3:6],
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", layouts())
def test_output_has_the_layout_of_torch_nns(layout: str, training: bool) -> None:
    x = layouts()[layout]
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[x.dim()]
    ours, theirs = both(name, x.shape[1])
    ours.train(training)
    theirs.train(training)
    strides = [ours(x).stride(), theirs(x).stride()]
    # The stride of an axis of size 1 says nothing.
    mine, other = ([s for s, n in zip(own, x.shape, strict=True) if n > 1] for own in strides)
    assert mine == other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", layouts())
def test_values_do_not_depend_on_the_layout(layout: str, training: bool) -> None:
    x = layouts()[layout].double()
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[x.dim()]
    ours, theirs = both(name, x.shape[1], dtype=torch.float64)
    assert_same(ours.train(training), theirs.train(training), x)


# State


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_is_torch_nns_and_loads_both_ways(name: str) -> None:
    ours, theirs = both(name, 5)
    ours(torch.randn(shape_of(name)))
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert state._metadata == theirs.state_dict()._metadata
    theirs.load_state_dict(state)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.dtype == state[key].dtype


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"activation": "relu"}], ids=str)
def test_our_options_are_not_in_the_state_dict(options: dict[str, Any]) -> None:
    assert list(nw.nn.BatchNorm2d(5, **options).state_dict()) == list(
        nn.BatchNorm2d(5).state_dict()
    )


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_of_version_1_has_no_counter(name: str) -> None:
    """Checkpoints from before PyTorch 0.4.1: what is missing stays as it is."""
    ours, theirs = both(name, 5)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    fresh = PAIRS[name][0](5)
    assert not any(fresh.load_state_dict(state))
    assert fresh.num_batches_tracked == 0
    assert torch.equal(fresh.running_mean, ours.running_mean)


def test_state_dict_of_version_2_without_counter_is_an_error() -> None:
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        nw.nn.BatchNorm2d(5).load_state_dict(state)


def test_a_whole_model_loads_both_ways() -> None:
    def model(module: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(module.BatchNorm2d(4), nn.ReLU()))

    ours, theirs = model(nw.nn), model(nn)
    x = torch.randn(2, 3, 6, 6)
    theirs(x)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", PAIRS)
def test_reset_gives_a_fresh_layer(name: str) -> None:
    ours, _ = both(name, 5, momentum=None)
    ours(torch.randn(shape_of(name)))
    ours.reset_parameters()
    for key, value in PAIRS[name][1](5).state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", PAIRS)
def test_copies_are_equal_and_apart(name: str, how: str) -> None:
    layer = PAIRS[name][0](5, 1e-3, None, activation="silu", nonfinite="skip")
    x = torch.randn(shape_of(name))
    layer(x)
    layer(torch.full_like(x, torch.nan))
    twin = COPIES[how](layer)
    assert repr(twin) == repr(layer)
    assert twin.num_nonfinite_batches == 1
    before = layer.running_mean.clone()
    # Both have seen the same batches, so the next moves both the same way.
    assert torch.equal(twin(x + 1), layer(x + 1))
    assert torch.equal(twin.running_mean, layer.running_mean)
    assert not torch.equal(layer.running_mean, before)
    assert twin.running_mean.data_ptr() != layer.running_mean.data_ptr()


def test_weights_only_load_of_the_state() -> None:
    layer = nw.nn.BatchNorm2d(5)
    layer(torch.randn(2, 5, 3, 3))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nn.BatchNorm2d(5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.running_var, layer.running_var)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["to", "factory"])
def test_dtypes_move_as_in_torch_nn(how: str, dtype: torch.dtype) -> None:
    moved = [
        cls(5).to(dtype) if how == "to" else cls(5, dtype=dtype) for cls in PAIRS["BatchNorm2d"]
    ]
    ours, theirs = ({k: (v.dtype, v.device) for k, v in m.state_dict().items()} for m in moved)
    assert ours == theirs


@pytest.mark.parametrize("how", ["to", "factory"])
def test_meta_device(how: str) -> None:
    layer = nw.nn.BatchNorm2d(5).to("meta") if how == "to" else nw.nn.BatchNorm2d(5, device="meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    x = torch.empty(2, 5, 3, 3, device="meta").to(memory_format=torch.channels_last)
    y = layer(x)
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(2, 5, 3, 3)).isfinite().all()


# What other tools do with batch norms


@pytest.mark.parametrize("name", [*PAIRS, *LAZY])
def test_is_a_torch_nn_batch_norm(name: str) -> None:
    ours, theirs = (PAIRS | LAZY)[name]
    assert issubclass(ours, theirs)
    assert issubclass(ours, nn.modules.batchnorm._NormBase)
    assert ours.__name__ == theirs.__name__
    assert ours.__module__.startswith("normwise.")


def test_any_rank_is_a_batch_norm() -> None:
    assert issubclass(nw.nn.BatchNorm, nn.modules.batchnorm._BatchNorm)


def test_update_bn_recognises_ours() -> None:
    data = [torch.randn(8, 5) * 3 + 1 for _ in range(3)]
    models = [nn.Sequential(cls(5)) for cls in PAIRS["BatchNorm1d"]]
    for model in models:
        torch.optim.swa_utils.update_bn(data, model)
        assert model[0].momentum == 0.1
    assert_close(models[0].state_dict(), models[1].state_dict())
    assert models[0][0].num_batches_tracked == 3


def test_conversion_to_sync_batch_norm_recognises_ours() -> None:
    ours, _ = both("BatchNorm2d", 5)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))[0]
    assert isinstance(synced, nn.SyncBatchNorm)
    assert_close(synced.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_fusion_into_a_convolution_takes_ours() -> None:
    convolution, (ours, _) = nn.Conv2d(3, 5, 3), both("BatchNorm2d", 5)
    convolution.eval()
    ours.eval()
    x = torch.randn(2, 3, 6, 6)
    fused = nn.utils.fusion.fuse_conv_bn_eval(convolution, ours)
    assert_close(fused(x), ours(convolution(x)), rtol=1e-4, atol=1e-5)


def test_averaged_model_takes_ours() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nw.nn.BatchNorm1d(5))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        model(torch.randn(8, 4))
        averaged.update_parameters(model)
    assert not torch.equal(averaged.module[1].running_mean, torch.zeros(5))


# Lazy


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)
@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_become_ours(name: str, options: dict[str, Any]) -> None:
    ours, theirs = (cls(**options) for cls in LAZY[name])
    assert repr(ours) == repr(theirs)
    x = torch.randn(shape_of(name))
    assert_close(ours(x), theirs(x), **TOLERANCE[torch.float32])
    assert type(ours) is PAIRS[name[4:]][0]
    assert ours.num_features == 5
    assert repr(ours) == repr(theirs)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_load_a_state_dict(name: str) -> None:
    _, source = both(name[4:], 5)
    ours = LAZY[name][0](activation="relu")
    ours.load_state_dict(source.state_dict())
    x = torch.randn(shape_of(name))
    source.eval()
    assert_close(ours.eval()(x), source(x).relu(), **TOLERANCE[torch.float32])
    assert ours.activation == "relu"


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_take_a_residual_in_the_first_call(name: str) -> None:
    lazy, x = LAZY[name][0](), torch.randn(shape_of(name))
    plain = PAIRS[name[4:]][0](5)
    assert torch.equal(lazy(x, residual=x), plain(x, residual=x))


def test_lazy_layers_read_their_own_channel_axis() -> None:
    lazy = nw.nn.LazyBatchNorm1d(channel_dim=-1, nonfinite="skip")
    assert lazy(torch.randn(4, 7, 5)).shape == (4, 7, 5)
    assert (lazy.num_features, lazy.channel_dim, lazy.nonfinite) == (5, -1, "skip")
    assert lazy.num_nonfinite_batches == 0


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_keep_their_options_in_a_pickle(name: str) -> None:
    lazy = pickle.loads(pickle.dumps(LAZY[name][0](activation="relu")))
    x = torch.randn(shape_of(name))
    assert (lazy(x) >= 0).all()


# Ours beyond torch.nn


def test_representation_tells_what_is_not_the_default() -> None:
    layer = nw.nn.BatchNorm(5, activation="relu", channel_dim=-1, nonfinite="skip")
    assert repr(layer) == (
        f"BatchNorm({nn.BatchNorm1d(5).extra_repr()}, activation='relu', channel_dim=-1, "
        "nonfinite='skip')"
    )


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((6, 5), 1), ((6, 5), -1), ((5, 6), 0), ((2, 3, 5), -1), ((2, 3, 4, 5), -1), ((2, 5, 3, 2), 1),
     ((2, 3, 5, 2, 2, 2), 2), ((2, 3, 5, 2, 2, 2), -4)],
    ids=str,
)  # fmt: skip
def test_the_axis_named_is_the_axis_kept(shape: tuple[int, ...], channel_dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    layer = nw.nn.BatchNorm(5, channel_dim=channel_dim, dtype=torch.float64)
    peer = nn.BatchNorm1d(5, dtype=torch.float64)
    rows = x.movedim(channel_dim, -1).reshape(-1, 5)
    y = layer(x).movedim(channel_dim, -1).reshape(-1, 5)
    assert_close(y, peer(rows), **TOLERANCE[torch.float64])
    assert_close(layer.state_dict(), peer.state_dict(), **TOLERANCE[torch.float64])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": nn.functional.leaky_relu,
    "leaky_relu(0.2)": lambda z: nn.functional.leaky_relu(z, 0.2),
    "hardswish": nn.functional.hardswish,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual_are_those_of_pytorch(activation: str, training: bool) -> None:
    fused = nw.nn.BatchNorm2d(5, activation=activation, dtype=torch.float64).train(training)
    plain = nn.BatchNorm2d(5, dtype=torch.float64).train(training)
    x, residual, cotangent = torch.randn(3, 2, 5, 4, 3, dtype=torch.float64)
    gradients = []
    for function in (
        lambda a, r: fused(a, residual=r),
        lambda a, r: ACTIVATIONS[activation](plain(a) + r),
    ):
        a, r = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = function(a, r)
        gradients.append((y.detach(), *torch.autograd.grad(y, (a, r), cotangent)))
    assert_close(*gradients, **TOLERANCE[torch.float64])
    assert_close(fused.state_dict(), plain.state_dict(), **TOLERANCE[torch.float64])


def test_masked_elements_are_as_if_they_were_not_there() -> None:
    lengths = torch.tensor([4, 7, 1])
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    mask = (torch.arange(7) < lengths[:, None])[:, None]
    layer = nw.nn.BatchNorm1d(5, dtype=torch.float64)
    peer = nn.BatchNorm1d(5, dtype=torch.float64)
    y = layer(x, mask=mask)
    rows = mask[:, 0]
    assert_close(y.movedim(1, -1)[rows], peer(x.movedim(1, -1)[rows]), **TOLERANCE[torch.float64])
    assert not y.movedim(1, -1)[~rows].any()
    assert_close(layer.state_dict(), peer.state_dict(), **TOLERANCE[torch.float64])
