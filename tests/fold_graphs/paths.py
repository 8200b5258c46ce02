"""What lies between a norm and the layer that takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from fold_graphs.base import Graph, Net, images, normal, signals

FOLDED = {"bn": "folded"}
MULTIPLY_ADD = {"bn": "multiply-add"}
BLOCKED = {"bn": "multiply-add: blocked"}
B2 = nn.BatchNorm2d


def up(way: Callable[[Tensor], Tensor], channels: int = 4, norm: int | None = None) -> Net:
    """conv → way → norm."""
    return Net(lambda m, x: m.bn(way(m.c(x))), c=nn.Conv2d(3, channels, 3), bn=B2(norm or channels))


def down(way: Callable[[Tensor], Tensor], channels: int = 3, groups: int = 1) -> Net:
    """norm → way → zero-padded conv."""
    return Net(lambda m, x: m.c(way(m.bn(x))), bn=B2(3),
               c=nn.Conv2d(channels, 4, 3, padding=1, groups=groups))  # fmt: skip


def shuffle_by_view(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffle_by_index(x: Tensor) -> Tensor:
    return x[:, torch.tensor([0, 2, 1, 3])]


def _shiftless(m: Any) -> None:
    """b = 0, so that the norm only scales."""
    m.bn.running_mean.zero_()
    nn.init.zeros_(m.bn.bias)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, self.order)  # type: ignore[arg-type]


def chunks_swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, a], 1)


def splits_mixed(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [1, 2, 1], dim=1)
    return torch.cat((c, b, a), dim=1)


def stacked_and_back(x: Tensor) -> Tensor:
    return torch.stack(x.unbind(1), dim=-1).permute(0, 3, 1, 2)


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    # name: (way, upwards, downwards)
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), "folded", "folded"),
    "avg_pool2d, padded, zeros not counted": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "folded", "folded"),
    "avg_pool2d, padded, zeros counted": (
        lambda x: F.avg_pool2d(x, 3, 2, 1), "multiply-add", "multiply-add"),
    "avg_pool2d, ceil_mode": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), "folded", "folded"),
    "avg_pool2d, divided by another number": (
        lambda x: F.avg_pool2d(x, 2, divisor_override=3), "multiply-add", "multiply-add"),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), "folded", "folded"),
    "mean over the image": (lambda x: x.mean((2, 3), keepdim=True), "folded", "folded"),
    "mean over the channels": (
        lambda x: x.mean(1, keepdim=True).expand_as(x), "multiply-add", "multiply-add"),
    "sum over the image": (lambda x: x.sum((2, 3), keepdim=True), "multiply-add", "multiply-add"),
    "lp pooling": (lambda x: F.lp_pool2d(x, 2, 2), "multiply-add", "multiply-add"),
    "flatten and back": (
        lambda x: x.flatten(2).unflatten(2, x.shape[2:]), "folded", "folded"),
    "reshape": (lambda x: x.reshape(x.shape[0], x.shape[1], -1, 1), "folded", "folded"),
    "permute there and back": (
        lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "folded", "folded"),
    "height and width swapped": (lambda x: x.transpose(2, 3), "folded", "folded"),
    "rot90 and flip": (lambda x: torch.flip(x, [2, 3]), "folded", "folded"),
    "channels reversed": (lambda x: x.flip(1), "folded", "folded"),
    "channels rolled": (lambda x: x.roll(1, 1), "folded", "folded"),
    "slice of the image": (lambda x: x[:, :, 1:, ::2], "folded", "folded"),
    "channel added and dropped": (
        lambda x: torch.cat([x, x[:, :1]], 1)[:, : x.shape[1]], "folded", "folded"),
    "contiguous, clone, detach": (
        lambda x: x.contiguous().clone().detach(), "folded", "folded"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), "folded", "folded"),
    "nearest-exact": (
        lambda x: F.interpolate(x, size=(7, 5), mode="nearest-exact"), "folded", "folded"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
                 "folded", "folded"),
    "bilinear, corners aligned": (
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True),
        "folded", "folded"),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "folded", "folded"),
    "area": (lambda x: F.interpolate(x, size=(4, 3), mode="area"), "folded", "folded"),
    "antialiased": (
        lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True),
        "folded", "folded"),
    "dropout": (lambda x: F.dropout2d(F.dropout(x, 0.5, False), 0.5, training=False),
                "folded", "folded"),
    "times a number": (lambda x: -2.5 * x / 3, "folded", "folded"),
    "plus a number": (lambda x: 1.5 - (x + 2), "folded", "folded"),
    "times zero": (lambda x: 0 * x, "multiply-add", "multiply-add"),
    "times itself": (lambda x: x * x, "multiply-add", "multiply-add"),
    "added to itself": (lambda x: x + x, "folded", "folded"),
    "added to itself, with a factor": (lambda x: torch.add(x, x, alpha=2), "folded", "folded"),
    "minus itself turned around": (lambda x: x - x.flip(3), "multiply-add", "folded"),
    "softmax": (lambda x: x.softmax(1), "multiply-add", "multiply-add"),
    "relu": (lambda x: x.relu(), "multiply-add", "multiply-add"),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), "multiply-add: negative-scale",
                   "multiply-add"),
    "zero padding": (lambda x: F.pad(x, (1, 1)), "multiply-add", "multiply-add"),
    "padding with a number": (
        lambda x: F.pad(x, (1, 1), value=2.0), "multiply-add", "multiply-add"),
    "negative padding": (lambda x: F.pad(x, (-1, -1, -1, 0)), "folded", "folded"),
    "replicated border": (lambda x: F.pad(x, (2, 1, 0, 1), mode="replicate"), "folded", "folded"),
    "pixel shuffle and back": (
        lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat_interleave(4, 1), 2), 2)[:, ::4],
        "folded", "folded"),
    "float and back": (lambda x: x.to(x.dtype).type_as(x), "folded", "folded"),
    "chained in place": (
        lambda x: (x + 0).mul_(2).add_(1), "folded", "folded"),
    "channel dropped": (lambda x: x.index_fill(1, torch.tensor([0]), 0.0),
                        "multiply-add", "multiply-add"),
    "masked_fill": (lambda x: x.masked_fill(x > 1, 0.0), "multiply-add", "multiply-add"),
    "clamp": (lambda x: x.clamp(-1, 1), "multiply-add", "multiply-add"),
    "cumsum": (lambda x: x.cumsum(3), "multiply-add", "multiply-add"),
    "sorted": (lambda x: x.sort(3).values, "multiply-add", "multiply-add"),
    "where": (lambda x: torch.where(x > 0, x, x * 0.1), "multiply-add", "multiply-add"),
    "grid_sample": (
        lambda x: F.grid_sample(x, x.new_zeros(len(x), 2, 2, 2), align_corners=False),
        "multiply-add", "multiply-add"),
    "fft": (lambda x: torch.fft.rfft2(x).real, "multiply-add", "multiply-add"),
}  # fmt: skip

SIMPLE = [
    *(Graph(f"conv → {name} → norm", lambda w=way: up(w), images(), {"bn": there})
      for name, (way, there, _) in WAYS.items()),
    *(Graph(f"norm → {name} → conv", lambda w=way: down(w), images(), {"bn": there})
      for name, (way, _, there) in WAYS.items()),
]  # fmt: skip

SHUFFLES: list[Graph] = [
    *(Graph(f"conv → {name} → norm", lambda w=way: up(w), images(), FOLDED) for name, way in (
        ("shuffle by views", shuffle_by_view), ("shuffle by index", shuffle_by_index),
        ("torch.channel_shuffle", lambda x: F.channel_shuffle(x, 2)),
        ("chunks swapped", chunks_swapped), ("splits mixed", splits_mixed),
        ("unbind and stack", stacked_and_back))),
    *(Graph(f"norm → {name} → conv, grouped",
            lambda w=way: Net(lambda m, x: m.d(w(m.bn(x))), bn=B2(4),
                              d=nn.Conv2d(4, 4, 3, padding=1, groups=2)), images(4), FOLDED)
      for name, way in (("shuffle by views", shuffle_by_view),
                        ("shuffle by index", shuffle_by_index),
                        ("torch.channel_shuffle", lambda x: F.channel_shuffle(x, 2)),
                        ("chunks swapped", chunks_swapped))),
    Graph("shuffle module with its order as a buffer, both ways",
          lambda: Net(lambda m, x: m.d(m.mid(m.s(m.bn(m.s(m.c(x))))).relu()), s=Shuffle(),
                      c=nn.Conv2d(3, 4, 1), bn=B2(4), mid=B2(4), d=nn.Conv2d(4, 2, 1)), images(),
          {"bn": "folded", "mid": "folded"}),
]  # fmt: skip

MERGING = [
    Graph("cat of two convolutions → norm",
          lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=nn.Conv2d(3, 2, 3),
                      b=nn.Conv2d(3, 3, 3, bias=False), bn=B2(5)), images(), FOLDED),
    Graph("cat of one convolution with itself → norm",
          lambda: Net(lambda m, x: m.bn(torch.cat([m.y(x)] * 2, 1)), y=nn.Conv2d(3, 2, 3),
                      bn=B2(4)), images(), MULTIPLY_ADD),
    Graph("cat along the height → norm",
          lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 2)), a=nn.Conv2d(3, 4, 3),
                      b=nn.Conv2d(3, 4, 3), bn=B2(4)), images(), FOLDED),
    Graph("cat with the input → norm",
          lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), x], 1)),
                      a=nn.Conv2d(3, 2, 3, padding=1), bn=B2(5)), images(), MULTIPLY_ADD),
    Graph("norm → cat with another branch → conv",
          lambda: Net(lambda m, x: m.c(torch.cat([m.bn(x), x.tanh()], 1)), bn=B2(3),
                      c=nn.Conv2d(6, 2, 3, padding=1)), images(), FOLDED),
    Graph("two norms → cat → norm → conv",
          lambda: Net(lambda m, x: m.c(m.post(torch.cat([m.a(x), m.b(x)], 1)).relu()), a=B2(3),
                      b=B2(3), post=B2(6), c=nn.Conv2d(6, 2, 3)), images(),
          {"a": "merged", "b": "merged", "post": "multiply-add"}),
    Graph("sum of two convolutions → norm",
          lambda: Net(lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(3, 4, 3),
                      b=nn.Conv2d(3, 4, 3, bias=False), bn=B2(4)), images(), FOLDED),
    Graph("difference of two convolutions → norm",
          lambda: Net(lambda m, x: m.bn(torch.sub(m.a(x), m.b(x), alpha=2)),
                      a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), bn=B2(4)), images(), FOLDED),
    Graph("convolution plus the input → norm",
          lambda: Net(lambda m, x: m.bn(m.a(x) + x), a=nn.Conv2d(3, 3, 3, padding=1), bn=B2(3)),
          images(), MULTIPLY_ADD),
    Graph("convolution plus a parameter → norm",
          lambda: Net(lambda m, x: m.bn(m.a(x) + m.shift), a=nn.Conv2d(3, 4, 3),
                      shift=nn.Parameter(normal(4, 1, 1)), bn=B2(4)), images(), MULTIPLY_ADD),
    Graph("residual block",
          lambda: Net(lambda m, x: m.b2(m.c2(m.b1(m.c1(x)).relu())).add(m.b0(m.c0(x))).relu(),
                      c1=nn.Conv2d(3, 4, 3, padding=1), b1=B2(4), b2=B2(4),
                      c2=nn.Conv2d(4, 4, 3, padding=1), c0=nn.Conv2d(3, 4, 1), b0=B2(4)),
          images(), {"b0": "folded", "b1": "folded", "b2": "folded"}),
    Graph("norm + norm → conv",
          lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x.tanh())), a=B2(3), b=B2(3),
                      c=nn.Conv2d(3, 4, 3)), images(),
          {"a": "multiply-add", "b": "multiply-add"}),
    Graph("norms on both sides of a sum of convolutions",
          lambda: Net(lambda m, x: m.bn(m.a(m.c(x)) + m.b(m.d(x))), a=B2(4), b=B2(4), bn=B2(4),
                      c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(3, 4, 3)), images(),
          {"a": "folded", "b": "folded", "bn": "folded"}),
    Graph("pre-activation block",
          lambda: Net(lambda m, x: x + m.c2(m.b2(m.c1(m.b1(x).relu())).relu()), b1=B2(3),
                      c1=nn.Conv2d(3, 4, 3, padding=1), b2=B2(4),
                      c2=nn.Conv2d(4, 3, 3, padding=1)), images(),
          {"b1": "multiply-add", "b2": "folded"}),
    Graph("dense block",
          lambda: Net(_dense, c0=nn.Conv2d(3, 4, 1), b1=B2(4), c1=nn.Conv2d(4, 2, 3, padding=1),
                      b2=B2(6), c2=nn.Conv2d(6, 2, 3, padding=1), b3=B2(8)), images(),
          {"b1": "multiply-add", "b2": "multiply-add", "b3": "multiply-add"}),
    Graph("squeeze and excitation",
          lambda: Net(_excited, c=nn.Conv2d(3, 4, 3), bn=B2(4), squeeze=nn.Conv2d(4, 2, 1),
                      sbn=B2(2), excite=nn.Conv2d(2, 4, 1)), images(),
          {"bn": "folded", "sbn": "folded"}),
    Graph("gated after the norm's convolution",
          lambda: Net(lambda m, x: m.bn(m.c(x) * m.g(x).sigmoid()), c=nn.Conv2d(3, 4, 3),
                      g=nn.Conv2d(3, 4, 3), bn=B2(4)), images(), BLOCKED),
    Graph("max_pool, scales above zero, up",
          lambda: up(lambda x: F.max_pool2d(x, 2)), images(), FOLDED, positive=True),
    Graph("max_pool with padding, scales above zero, down",
          lambda: down(lambda x: F.max_pool2d(x, 3, 2, 1)), images(), FOLDED, positive=True),
    Graph("max_pool with indices and unpooling, up",
          lambda: up(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
          images(), MULTIPLY_ADD, positive=True),
    Graph("adaptive max_pool, scales above zero, up",
          lambda: up(lambda x: F.adaptive_max_pool2d(x, 3)), images(), FOLDED, positive=True),
    Graph("amax over the image, scales above zero, up",
          lambda: up(lambda x: x.amax((2, 3), keepdim=True)), images(), FOLDED, positive=True),
    Graph("max over pairs of channels, scales above zero, up",
          lambda: up(lambda x: x.unflatten(1, (4, 2)).amax(2), 8, 4), images(),
          {"bn": "multiply-add: channels-differ"}, positive=True),
    Graph("max over pairs of channels, scales above zero, down",
          lambda: Net(lambda m, x: m.c(m.bn(x).unflatten(1, (2, 2)).amax(2)), bn=B2(4),
                      c=nn.Conv2d(2, 4, 3)), images(4), MULTIPLY_ADD, positive=True),
    Graph("relu between, scales above zero, a shift",
          lambda: up(lambda x: x.relu()), images(), BLOCKED, positive=True),
    Graph("relu between, scales above zero, no shift", lambda: up(lambda x: x.relu()), images(),
          FOLDED, positive=True, prepare=_shiftless),
    Graph("leaky relu between, scales above zero, no shift, down",
          lambda: down(lambda x: F.leaky_relu(x, 0.2)), images(), MULTIPLY_ADD, positive=True,
          prepare=_shiftless),
    Graph("torch.maximum of two, scales above zero",
          lambda: Net(lambda m, x: m.bn(torch.maximum(m.a(x), m.b(x))), a=nn.Conv2d(3, 4, 3),
                      b=nn.Conv2d(3, 4, 3), bn=B2(4)), images(), MULTIPLY_ADD, positive=True),
    Graph("norm to two convolutions and a linear layer",
          lambda: Net(_fan_out, bn=B2(3), a=nn.Conv2d(3, 4, 3, padding=1),
                      b=nn.ConvTranspose2d(3, 2, 3, 2, 1), fc=nn.Linear(3, 5)), images(), FOLDED),
    Graph("norm to a convolution and a relu",
          lambda: Net(lambda m, x: (m.c(y := m.bn(x)), y.relu()), bn=B2(3),
                      c=nn.Conv2d(3, 4, 3)), images(), MULTIPLY_ADD),
    Graph("conv → norm → norm",
          lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4), B2(4)), images(),
          {"1": "folded", "2": "folded"}),
    Graph("norm → norm → norm", lambda: nn.Sequential(B2(3), nw.nn.BatchNorm2d(3), B2(3)),
          images(), {"0": "merged", "1": "merged", "2": "multiply-add"}),
    Graph("conv → norm → avg_pool → norm → conv → norm",
          lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4), nn.AvgPool2d(2), B2(4),
                                nn.Conv2d(4, 2, 1), B2(2)), images(),
          {"1": "folded", "3": "folded", "5": "folded"}),
    Graph("global pool → flatten → norm → linear",
          lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)), images(),
          {"4": "folded"}),
    Graph("conv → global pool → squeeze → norm",
          lambda: Net(lambda m, x: m.bn(m.c(x).mean([-1, -2])), c=nn.Conv2d(3, 4, 3),
                      bn=nn.BatchNorm1d(4)), images(), FOLDED),
    Graph("conv → norm over the width",
          lambda: Net(lambda m, x: m.bn(m.c(x).transpose(1, 3)), c=nn.Conv2d(3, 6, 3),
                      bn=B2(6)), images(3, 8, 8), MULTIPLY_ADD),
    Graph("channels × height as the features of a norm, up",
          lambda: Net(lambda m, x: m.bn(m.c(x).flatten(1, 2)), c=nn.Conv2d(3, 4, 3),
                      bn=nn.BatchNorm1d(24)), images(3, 8, 8), MULTIPLY_ADD),
    Graph("groups of channels as samples of a norm, up",
          lambda: Net(lambda m, x: m.bn(m.c(x).flatten(0, 1).unsqueeze(1)),
                      c=nn.Conv2d(3, 4, 3), bn=B2(1)), images(), FOLDED),
    Graph("patches by unfold → linear",
          lambda: Net(lambda m, x: m.fc(F.unfold(m.bn(x), 2, stride=2).transpose(1, 2)),
                      bn=B2(3), fc=nn.Linear(12, 4)), images(3, 8), FOLDED),
    Graph("1-D: conv → slice by step → norm → conv, zero-padded",
          lambda: Net(lambda m, x: m.d(m.bn(m.c(x)[..., ::2]).relu()), c=nn.Conv1d(3, 4, 3),
                      bn=nn.BatchNorm1d(4), d=nn.Conv1d(4, 2, 3, padding=1)), signals(), FOLDED),
    Graph("broadcast over positions → norm",
          lambda: Net(lambda m, x: m.bn(m.c(x.mean((2, 3), keepdim=True)).expand(-1, -1, 4, 4)),
                      c=nn.Conv2d(3, 4, 1), bn=B2(4)), images(), FOLDED),
    Graph("constant added on the way, scales shared",
          lambda: Net(lambda m, x: m.bn(m.c(x) + torch.ones(4, 1, 1)), c=nn.Conv2d(3, 4, 3),
                      bn=B2(4)), images(), MULTIPLY_ADD),
]  # fmt: skip


def _dense(m: Any, x: Tensor) -> Tensor:
    x = m.c0(x)
    x = torch.cat([x, m.c1(m.b1(x).relu())], 1)
    x = torch.cat([x, m.c2(m.b2(x).relu())], 1)
    out: Tensor = m.b3(x)
    return out


def _excited(m: Any, x: Tensor) -> Tensor:
    x = m.bn(m.c(x)).relu()
    s = m.sbn(m.squeeze(F.adaptive_avg_pool2d(x, 1))).relu()
    out: Tensor = x * m.excite(s).sigmoid()
    return out


def _fan_out(m: Any, x: Tensor) -> Any:
    y = m.bn(x)
    return m.a(y), m.b(y), m.fc(y.mean((2, 3)))
