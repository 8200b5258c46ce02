"""Small networks of the families that people train, for the tools that work on whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "randomise"]


def conv_bn(
    c: int, d: int, k: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Module:
    conv = nn.Conv2d(c, d, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(d), *([nn.ReLU()] if act else []))


class Bottleneck(nn.Module):
    """He et al. 2016a."""

    def __init__(self, c: int, d: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(c, d // 2, 1),
            conv_bn(d // 2, d // 2, 3, stride),
            conv_bn(d // 2, d, 1, act=False),
        )
        self.skip = nn.Identity() if c == d and stride == 1 else conv_bn(c, d, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class PreActivation(nn.Module):
    """He et al. 2016b: the first norm reads the trunk, which goes on as it is."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class DenseLayer(nn.Module):
    """Huang et al. 2017: every layer reads all before it."""

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, 2 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class InvertedResidual(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, c: int, expand: int) -> None:
        super().__init__()
        d = c * expand
        self.body = nn.Sequential(
            conv_bn(c, d, 1), conv_bn(d, d, 3, groups=d), conv_bn(d, c, 1, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """Hu et al. 2018, with the gate between a depthwise and a pointwise convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.project = conv_bn(c, c, 3, groups=c), conv_bn(c, c, 1, act=False)
        self.reduce, self.expand = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        gate = self.expand(F.silu(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.project(y * gate.sigmoid())


class ChannelShuffle(nn.Module):
    """Ma et al. 2018: half of the channels pass, the halves are shuffled together."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(
            conv_bn(h, h, 1), conv_bn(h, h, 3, groups=h, act=False), conv_bn(h, h, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """Ronneberger et al. 2015, with norms after the transposed convolutions too."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 8, 3), conv_bn(8, 16, 3)
        self.bottom = conv_bn(16, 16, 3)
        self.up2, self.up1 = (
            nn.Sequential(nn.ConvTranspose2d(c, d, 2, 2), nn.BatchNorm2d(d))
            for c, d in ((16, 16), (16, 8))
        )
        self.out2, self.out1 = conv_bn(32, 16, 3), conv_bn(16, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.bottom(F.max_pool2d(b, 2)))
        y = self.up1(self.out2(torch.cat([y, b], 1)))
        return self.head(self.out1(torch.cat([y, a], 1)))


class Volumes(nn.Module):
    """A residual network in 3-D with a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8)
        self.conv2, self.bn2 = nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.up, self.bn3 = nn.ConvTranspose3d(8, 8, 2, 2, groups=4), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return F.leaky_relu(self.bn3(self.up(x)))


class Speech(nn.Module):
    """Convolutions over frames, an LSTM over packed utterances (Amodei et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(8, 16, 5, stride=2, padding=2), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 16, 5, padding=2), nn.BatchNorm1d(16)
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.bn3, self.head = nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = F.hardtanh(self.bn1(self.conv1(x)), 0, 20)
        x = F.hardtanh(self.bn2(self.conv2(x)), 0, 20)
        halves = (lengths + 1) // 2
        inside = torch.arange(x.shape[-1], device=x.device) < halves[:, None]
        y, _ = self.lstm((x * inside[:, None].to(x.dtype)).transpose(1, 2))
        return self.head(self.bn3(y.transpose(1, 2)).transpose(1, 2))


class Conformer(nn.Module):
    """The convolution module of Gulati et al. 2020, with its feed-forward."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.norm, self.pointwise1 = nn.LayerNorm(d), nn.Conv1d(d, 2 * d, 1, bias=False)
        self.depthwise = nn.Conv1d(d, d, 5, padding=2, groups=d, bias=False)
        self.bn, self.pointwise2 = nn.BatchNorm1d(d), nn.Conv1d(d, d, 1, bias=False)
        self.feed = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.pointwise1(self.norm(x).transpose(1, 2)), 1)
        y = self.pointwise2(F.silu(self.bn(self.depthwise(y))))
        x = x + y.transpose(1, 2)
        return x + 0.5 * self.feed(x)


class Branches(nn.Module):
    """RepVGG (Ding et al. 2021) as trained: 3 x 3, 1 x 1 and a norm alone, added."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.wide, self.narrow = conv_bn(c, c, 3, act=False), conv_bn(c, c, 1, act=False)
        self.alone = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x) + self.alone(x))


class NormAct(nn.BatchNorm2d):
    """A batch norm with a forward of its own that calls its dropout and activation, as timm's."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        stale = self.training or self.running_mean is None
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, stale, 0.1, self.eps
        )
        return self.act(self.drop(y))


class NormActs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), NormAct(8)
        self.bn2, self.conv2 = NormAct(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return x + self.conv2(self.bn2(x))


def image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 12, 12),)


def trunk(*blocks: nn.Module, head: int = 8) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 4)
    )


@dataclass(frozen=True)
class Network:
    """How to make it and what to call it with, and what becomes of its batch norms in a fold."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    folded: int
    multiply_adds: int = 0


NETWORKS = (
    Network("residual", lambda: trunk(Bottleneck(8, 16, 2), Bottleneck(16, 16), head=16), image, 8),
    # The trunk of pre-activation blocks goes on unnormalized, relu stands after the norm.
    Network("pre-activation", lambda: trunk(PreActivation(8), PreActivation(8)), image, 3, 2),
    Network(
        "dense", lambda: trunk(DenseLayer(8, 4), DenseLayer(12, 4), DenseLayer(16, 4), head=20),
        image, 4, 3,
    ),
    Network(
        "inverted residual", lambda: trunk(InvertedResidual(8, 3), InvertedResidual(8, 2)), image, 7
    ),
    Network("squeeze-excite", lambda: trunk(SqueezeExcite(8), SqueezeExcite(8)), image, 5),
    Network("channel shuffle", lambda: trunk(ChannelShuffle(8), ChannelShuffle(8)), image, 7),
    Network("encoder-decoder", UNet, lambda: (torch.randn(2, 3, 16, 16),), 7),
    Network("volumes", Volumes, lambda: (torch.randn(2, 1, 6, 8, 6),), 3),
    Network("speech", Speech, lambda: (torch.randn(3, 8, 20), torch.tensor([20, 13, 7])), 3),
    Network("conformer", Conformer, lambda: (torch.randn(2, 9, 12),), 1),
    Network(
        "vectors",
        lambda: nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(),
            nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3),
        ),
        lambda: (torch.randn(5, 6),), 3,
    ),
    Network("branches", lambda: trunk(Branches(8), Branches(8)), image, 5, 2),
    Network("norms with activations", NormActs, image, 1, 1),
)  # fmt: skip


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Scales of both signs, shifts, means and variances as of a model that was trained; eval."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = module.num_features
            signs = torch.where(torch.rand(n, generator=g) < 0.2, -1.0, 1.0)
            module.weight.copy_(signs * (0.5 + torch.rand(n, generator=g)))
            module.bias.copy_(0.3 * torch.randn(n, generator=g))
            module.running_mean.copy_(0.5 * torch.randn(n, generator=g))
            module.running_var.copy_(0.5 + torch.rand(n, generator=g))
    return model.eval()
