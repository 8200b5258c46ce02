"""What int8 makes of a model, and where a fold widened the range of the weights.

The int8 here is simulated: values are rounded to the grid and stay floating point, so that the
figures are those of the arithmetic and of no particular kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from normwise.errors import InputError, message
from normwise.graph.run import Call, copy_of, on_examples, same_random_numbers, tensors_in
from normwise.pages import Axis, Chart
from normwise.results import Entry, Report, number
from normwise.tools.weights import LAYERS, blocks, output_range, over_outputs

__all__ = ["QuantizationReport", "quantization_report", "simulate_int8"]

M = TypeVar("M", bound=nn.Module)

# A layer counts as widened from 1 bit / 2 of lost resolution: its peak over its rms grew by this.
WIDER = math.sqrt(2)
# A channel counts as far out from this many medians of |a|.
FAR, NAMED = 4.0, 4


class QuantizationReport(Report):
    """Signal-to-noise ratios of a model in int8, layer by layer and end to end.

    ``entries``, one a layer that holds a weight: ``action`` 'widened' if folding made the weights'
    peak over their root mean square grow by more than sqrt(2) (half a bit), 'kept' if not,
    'measured' if no original was given. Facts of an entry:

    - ``snr_tensor``, ``snr_channel``: in dB, of the layer's output when its input (per tensor) and
      its weights (per tensor, per output channel) are in int8 and all else is exact;
    - ``worst_tensor``, ``worst_channel``: the same of the output channel that has the lowest: large
      channels hide in the whole what happens to small ones;
    - ``peak``: max |w| over the root mean square, (in the original, here);
    - ``why``: the channels whose factor a is more than four times the median, with the factors.

    ``facts`` of the whole: ``snr_tensor``, ``snr_channel`` of the model's outputs with all layers
    in int8.
    """

    title: ClassVar[str] = "int8"
    columns: ClassVar[tuple[str, ...]] = (
        "snr_tensor", "snr_channel", "worst_tensor", "worst_channel", "peak", "why",
    )  # fmt: skip

    def summary(self) -> list[str]:
        tensor, channel = (number(self.facts[k]) for k in ("snr_tensor", "snr_channel"))
        end = f"the model's output: {tensor:.1f} dB with weights per tensor, {channel:.1f} dB "
        return [*super().summary(), end + "per channel"]

    def charts(self) -> list[Chart]:
        kinds = (("snr_tensor", "per tensor"), ("snr_channel", "per channel"),
                 ("worst_tensor", "worst channel, per tensor"),
                 ("worst_channel", "worst channel, per channel"))  # fmt: skip
        noise = [
            {"layer": e.name, "snr": e.facts.get(key), "weights": kind}
            for e in self.entries
            for key, kind in kinds
        ]
        peaks = [
            {"layer": e.name, "peak": peak, "model": model}
            for e in self.entries
            for peak, model in zip(e.facts.get("peak") or (), ("original", "folded"), strict=False)
        ]
        layer = Axis("layer", "layer", "layer")
        return [
            Chart(
                "scatter",
                "Signal to noise in int8",
                "Of each layer's output, by how its weights are scaled; 6 dB are one bit.",
                noise,
                x=layer,
                y=Axis("snr", "signal to noise in dB"),
                color=Axis("weights", "weights", "category", values=[kind for _, kind in kinds]),
            ),
            Chart(
                "scatter",
                "Range of the weights",
                "Largest weight over the root mean square; what is doubled has lost a bit.",
                peaks,
                x=layer,
                y=Axis("peak", "peak over root mean square"),
                color=Axis("model", "model", "category", values=("original", "folded")),
                joined=True,
            ),
        ]


def fake_weight(module: nn.Module, per_channel: bool) -> Tensor:
    """The weight on the symmetric grid -127 … 127, one scale for all or for each output channel."""
    w: Any = module.weight
    w = w.detach()
    if w.numel() == 0:
        return torch.empty_like(w)
    groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
    if per_channel:
        largest = output_range(w, groups, transposed)
        scale = over_outputs(largest, w, groups, transposed) / 127
    else:
        scale = w.abs().max() / 127
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    result: Tensor = (w / safe).round().clamp(-127, 127) * safe
    return result


@dataclass
class Range:
    """The values that a tensor took in calibration, as the affine grid 0 … 255 that covers them."""

    low: float = 0.0
    high: float = 0.0
    """Both from 0 on: zero must be exact, for padding (Jacob et al. 2018, section 2.1)."""

    def see(self, x: Tensor) -> None:
        if x.numel():
            self.low = min(self.low, float(x.min()))
            self.high = max(self.high, float(x.max()))

    def fake(self, x: Tensor) -> Tensor:
        scale = (self.high - self.low) / 255
        if not scale > 0 or not math.isfinite(scale):
            return x
        zero = round(-self.low / scale)
        return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


class _FakeInput:
    """A pre-hook that rounds a layer's input."""

    def __init__(self, seen: Range) -> None:
        self.range = seen

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        args, kwargs = list(args), dict(kwargs)
        if args:
            args[0] = self.range.fake(args[0])
        elif "input" in kwargs:
            kwargs["input"] = self.range.fake(kwargs["input"])
        return tuple(args), kwargs


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers in int8: those that hold their weight as a parameter."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and module._parameters.get("weight") is not None
    }
    if not found:
        raise InputError(
            message(
                "int8 is for convolutions and linear layers",
                f"{type(model).__name__} without one whose weight is a parameter",
                "a model of torch.nn's layers, parametrizations removed",
            )
        )
    return found


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    with on_examples(), torch.no_grad(), same_random_numbers():
        return tensors_in(call.copy().run(model))


def _with_hooks(
    model: nn.Module, call: Call, layers: dict[str, nn.Module], hook: Callable[..., None]
) -> list[Tensor]:
    """One run; ``hook(name, module, args, kwargs, output)`` at each call of a layer."""
    handles = [
        module.register_forward_hook(
            lambda m, a, k, out, name=name: hook(name, m, a, k, out), with_kwargs=True
        )
        for name, module in layers.items()
    ]
    try:
        return _run(model, call)
    finally:
        for handle in handles:
            handle.remove()


def _calibrate(model: nn.Module, call: Call, layers: dict[str, nn.Module]) -> dict[str, Range]:
    ranges = {name: Range() for name in layers}

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ranges[name].see(args[0] if args else kwargs["input"])

    _with_hooks(model, call, layers, see)
    return ranges


def simulate_int8(model: M, data: Any, *, per_channel: bool = False) -> M:
    r"""A copy of ``model`` in eval mode that computes what int8 would, in floating point.

    Weights of convolutions and linear layers: symmetric, :math:`s = \max |w| / 127` over the tensor
    or over each output channel. Their inputs: affine with 256 steps over the smallest and largest
    value (and zero) that ``data`` gives there. Biases, borders and all else stay as they are, as
    they do in int32. Krishnamoorthi 2018 (arXiv 1806.08342), sections 2.1 to 2.3.

    Args:
        data: calibration inputs, one call as for :func:`normwise.fold`; a few hundred samples.

    Raises:
        InputError: if there is no layer to quantize or the model does not run on ``data``.
    """
    call = Call.of(data)
    made = copy_of(model).eval()
    layers = _layers(made)
    ranges = _calibrate(made, call, layers)
    with torch.no_grad():
        for name, module in layers.items():
            module.weight.copy_(fake_weight(module, per_channel))  # type: ignore[operator] # a tensor
            module.register_forward_pre_hook(_FakeInput(ranges[name]), with_kwargs=True)
    return made  # type: ignore[return-value] # a copy of model


class _Power:
    """Of a signal and of what differs from it, by channel, summed in float64."""

    def __init__(self) -> None:
        self.signal: Tensor | float = 0.0
        self.noise: Tensor | float = 0.0

    def add(self, wanted: Tensor, got: Tensor, axis: int = 0) -> None:
        a, b = (t.detach().double().movedim(axis, 0).flatten(1) for t in (wanted, got))
        self.signal = self.signal + a.square().sum(1)
        self.noise = self.noise + (b - a).square().sum(1)

    def whole(self) -> float:
        return float(decibels(*(torch.as_tensor(t).sum() for t in (self.signal, self.noise))))

    def worst(self) -> float:
        """Of the channels that are not zero throughout."""
        signal, noise = torch.as_tensor(self.signal), torch.as_tensor(self.noise)
        live = signal > 0
        return float(decibels(signal, noise)[live].min()) if bool(live.any()) else math.nan


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """10 log10 of the ratio; inf without noise, NaN without either."""
    return 10 * (signal.log10() - noise.log10())


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return output.dim() + 1 - weight.dim()


def _layer_snr(
    model: nn.Module, call: Call, layers: dict[str, nn.Module]
) -> dict[str, tuple[_Power, _Power]]:
    """For weights per tensor and per channel."""
    ranges = _calibrate(model, call, layers)
    powers = {name: (_Power(), _Power()) for name in layers}

    def measure(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        args, kwargs = _FakeInput(ranges[name])(module, args, kwargs)
        weight = module._parameters["weight"]
        for per_channel in (False, True):
            module._parameters["weight"] = nn.Parameter(fake_weight(module, per_channel), False)
            try:
                got = module.forward(*args, **kwargs)  # not the call: hooks have run
            finally:
                module._parameters["weight"] = weight
            powers[name][per_channel].add(output, got, _channel_axis(module, output))

    _with_hooks(model, call, layers, measure)
    return powers


def _peak(weight: Tensor) -> float:
    rms = float(weight.double().square().mean().sqrt()) if weight.numel() else 0.0
    return float(weight.abs().max()) / rms if rms else math.nan


def _factors(module: nn.Module, before: Tensor) -> tuple[Tensor, Tensor]:
    """|a| by output channel and by input channel, with W' = diag(a_out) W diag(a_in)."""
    shape = (getattr(module, "groups", 1), getattr(module, "transposed", False))
    w: Any = module.weight
    old, new = (blocks(t.detach().double(), *shape).norm(dim=3) for t in (before, w))
    ratio = (new / old).log()  # (groups, outputs, inputs)
    ratio = torch.where(torch.isfinite(ratio), ratio, torch.nan)
    # Medians: one far channel must not move what is said of the others.
    outputs = ratio.nanmedian(2, keepdim=True).values
    inputs = (ratio - outputs).nanmedian(1).values
    return outputs.flatten().exp(), inputs.flatten().exp()


def _why(module: nn.Module, before: Tensor) -> str | None:
    """The channels whose factor is far above the median."""
    parts = []
    for side, a in zip(("output", "input"), _factors(module, before), strict=True):
        a = a.nan_to_num(0.0)
        middle = float(a.median()) if a.numel() else 0.0
        order = a.argsort(descending=True).tolist()
        far = [c for c in order if middle > 0 and float(a[c]) > FAR * middle]
        if far:
            named = ", ".join(f"{c} (|a| = {float(a[c]):.3g})" for c in far[:NAMED])
            rest = f" and {len(far) - NAMED} more" if len(far) > NAMED else ""
            parts.append(f"{side} channels {named}{rest}; median {middle:.3g}")
    return "; ".join(parts) or None


def quantization_report(
    model: nn.Module, data: Any, *, original: nn.Module | None = None
) -> QuantizationReport:
    """How much int8 costs a model, and what the fold has to do with it.

    A batch norm folded into a layer multiplies each of its channels by a. Where a few channels have
    |a| far above the median they take the range of the whole tensor, and the other channels are
    left with a few of its 255 steps. Weights per channel have a scale each and do not mind (for a
    norm that went up; one that went down multiplies input channels, which share a scale), and
    :func:`normwise.equalize` takes the difference out.

    Args:
        model: mostly one from :func:`normwise.fold`; left as it was, read in eval mode.
        data: one call, as for :func:`normwise.fold`: calibrates, and is measured on.
        original: the model before folding, to compare the layers of the same name with.

    Returns:
        QuantizationReport: one entry a layer; prints as a table.

    Raises:
        InputError: if there is no layer to quantize or the model does not run on ``data``.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import quantization_report
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)).eval()
        >>> x = torch.randn(64, 8)
        >>> with torch.no_grad():
        ...     _ = net[1].weight.fill_(0.1)[3].fill_(2.0)
        >>> report = quantization_report(nw.fold(net, x, seconds=0).model, x, original=net)
        >>> report["0"].action, report["0"].facts["why"]
        ('widened', 'output channels 3 (|a| = 2); median 0.1')
        >>> report["0"].facts["worst_channel"] > report["0"].facts["worst_tensor"] + 6
        True
    """
    call = Call.of(data)
    read = copy_of(model).eval()
    layers = _layers(read)
    powers = _layer_snr(read, call, layers)
    others = {} if original is None else dict(original.named_modules())
    entries = []
    for name, module in layers.items():
        weight = module._parameters["weight"]
        before = getattr(others.get(name), "weight", None)
        assert weight is not None
        tensor, channel = powers[name]
        facts: dict[str, Any] = {
            "snr_tensor": tensor.whole(), "snr_channel": channel.whole(),
            "worst_tensor": tensor.worst(), "worst_channel": channel.worst(),
        }  # fmt: skip
        action = "measured"
        if isinstance(before, Tensor) and before.shape == weight.shape:
            facts["peak"] = (_peak(before.detach()), _peak(weight.detach()))
            widened = facts["peak"][1] > WIDER * facts["peak"][0]
            action = "widened" if widened else "kept"
            facts["why"] = _why(module, before) if widened else None
        entries.append(Entry(name, action, facts=facts))
    whole: dict[str, Any] = {}
    wanted = _run(read, call)
    for key, per_channel in (("snr_tensor", False), ("snr_channel", True)):
        power = _Power()
        got = _run(simulate_int8(read, data, per_channel=per_channel), call)
        for a, b in zip(wanted, got, strict=True):
            power.add(a.reshape(1, -1), b.reshape(1, -1))
        whole[key] = power.whole()
    return QuantizationReport(entries, whole)
