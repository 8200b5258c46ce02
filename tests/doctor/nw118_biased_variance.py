from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def scaled(factor: float) -> nn.Module:
    model = net(bn=norm())
    model.bn.running_var *= factor
    return model


def here() -> Case:
    figures = {"n": 32.0, "biased": "here"}
    return Case(scaled(31 / 32), {"peers": [scaled(1)]}, {("bn", "warning")}, figures)


def there() -> Case:
    kwargs = {"peers": {"port": scaled(9 / 10)}}
    return Case(scaled(1), kwargs, {("bn", "warning")}, {"n": 10.0, "biased": "port"})


def large_batch() -> Case:
    """n = 6272: a small effect on the output, and plain in the figures."""
    case = scaled(6271 / 6272), {"peers": [scaled(1)]}
    return Case(*case, {("bn", "info")}, {"n": 6272.0})


def trained() -> Case:
    """Ten batches of 16 values, both averages kept."""
    bn = nn.BatchNorm1d(6)
    biased = copy.deepcopy(bn)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(16, 6, generator=g) * torch.arange(1, 7)
        bn(x)
        biased.running_mean.lerp_(x.mean(0), 0.1)
        biased.running_var.lerp_(x.var(0, correction=0), 0.1)
    # The initial 1 is in both, so the ratio is that of the channels only once it is forgotten.
    bn.running_var -= 0.9**10
    biased.running_var -= 0.9**10
    return Case(net(bn=biased), {"peers": [net(bn=bn)]}, {("bn", "warning")}, {"n": 16.0})


def another_ratio() -> Case:
    return Case(scaled(0.7137), {"peers": [scaled(1)]})


def uneven() -> Case:
    other = scaled(31 / 32)
    other.bn.running_var[3] *= 1.01
    return Case(other, {"peers": [scaled(1)]})


def another_mean() -> Case:
    other = scaled(31 / 32)
    other.bn.running_mean += 0.1
    return Case(other, {"peers": [scaled(1)]})


FIRES: Cases = {
    "here": here,
    "in the peer": there,
    "a large batch": large_batch,
    "averages of batches": trained,
}
QUIET: Cases = {
    "the same": lambda: Case(scaled(1), {"peers": [scaled(1)]}),
    "no n/(n - 1)": another_ratio,
    "uneven": uneven,
    "another mean": another_mean,
    "one channel": lambda: Case(
        net(bn=norm(1, running_var=0.9)), {"peers": [net(bn=norm(1, running_var=1.0))]}
    ),
}


def digits(model: Any, data: Any) -> Case:
    """A port that kept each layer's biased variance: 64 samples of 16, 16 and 1 positions."""
    port = copy.deepcopy(model)
    for bn, n in ((port.bn1, 64 * 16), (port.bn2, 64 * 16), (port.bn3, 64)):
        bn.running_var *= (n - 1) / n
    expect = {("bn1", "info"), ("bn2", "info"), ("bn3", "info")}
    return Case(port, {"peers": [model]}, expect, {"n": 64.0})
