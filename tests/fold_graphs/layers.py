"""Every layer that can take a batch norm, after it and before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import normwise as nw
from fold_graphs.base import Graph, Net, images, normal, signals, tokens, vectors

FOLDED = {"bn": "folded"}
B2 = nn.BatchNorm2d


def after(layer: nn.Module, norm: nn.Module) -> Net:
    return Net(lambda m, x: F.relu(m.bn(m.layer(x))), layer=layer, bn=norm)


def before(layer: nn.Module, norm: nn.Module) -> Net:
    return Net(lambda m, x: F.relu(m.layer(m.bn(x))), layer=layer, bn=norm)


def volumes() -> list[torch.Tensor]:
    return [normal(2, 2, 4, 5, 4), normal(1, 2, 6, 5, 7, seed=1)]


def sequences() -> list[torch.Tensor]:
    return [normal(2, 7, 6), normal(3, 9, 6, seed=1)]


def twins() -> list[torch.Tensor]:
    """(N, L, C) with L = C."""
    return [normal(3, 6, 6), normal(2, 6, 6, seed=1)]


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, batch_first=True, **options)


def _channels_last(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


AFTER = [
    Graph("conv1d", lambda: after(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), signals(), FOLDED),
    Graph("conv2d without bias",
          lambda: after(nn.Conv2d(3, 4, 3, bias=False), B2(4)), images(), FOLDED),
    Graph("conv3d", lambda: after(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)), volumes,
          FOLDED),
    Graph("conv2d, grouped, dilated, reflected",
          lambda: after(nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2, padding_mode="reflect"), B2(6)),
          images(4), FOLDED),
    Graph("depthwise conv2d", lambda: after(nn.Conv2d(4, 8, 3, groups=4), B2(8)), images(4),
          FOLDED),
    Graph("conv_transpose1d, grouped",
          lambda: after(nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm1d(6)),
          signals(4), FOLDED),
    Graph("conv_transpose2d, grouped, without bias",
          lambda: after(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), B2(6)),
          images(4), FOLDED),
    Graph("conv_transpose2d, depthwise, dilated",
          lambda: after(nn.ConvTranspose2d(4, 4, 3, 2, 0, 1, groups=4, dilation=2), B2(4)),
          images(4), FOLDED),
    Graph("conv_transpose3d, grouped",
          lambda: after(nn.ConvTranspose3d(2, 4, 2, 2, groups=2), nn.BatchNorm3d(4)), volumes,
          FOLDED),
    Graph("conv_transpose2d with output_size",
          lambda: Net(lambda m, x: m.bn(m.up(x, output_size=(2 * x.shape[2], 2 * x.shape[3]))),
                      up=nn.ConvTranspose2d(3, 4, 3, 2, 1), bn=B2(4)), images(), FOLDED),
    Graph("linear", lambda: after(nn.Linear(6, 4), nn.BatchNorm1d(4)), vectors(), FOLDED),
    Graph("linear without bias", lambda: after(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)),
          vectors(), FOLDED),
    Graph("linear over (N, L, C), L = C, norm over L",
          lambda: after(nn.Linear(6, 6), nn.BatchNorm1d(6)), twins, {"bn": "multiply-add"}),
    Graph("linear over (N, L, C), L = C, norm over C",
          lambda: Net(lambda m, x: _channels_last(m.bn, m.fc(x)), fc=nn.Linear(6, 6),
                      bn=nn.BatchNorm1d(6)), twins, FOLDED),
    Graph("linear, our norm over the last axis",
          lambda: after(nn.Linear(6, 6), nw.nn.BatchNorm(6, channel_dim=-1)), twins, FOLDED),
    Graph("linear, tokens flattened for the norm",
          lambda: Net(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).view(x.shape[0], -1, 4),
                      fc=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)), sequences, FOLDED),
    Graph("embedding",
          lambda: Net(lambda m, i: m.bn(m.table(i).transpose(1, 2)),
                      table=nn.Embedding(11, 4), bn=nn.BatchNorm1d(4)), tokens(), FOLDED),
    Graph("embedding with padding_idx",
          lambda: Net(lambda m, i: m.bn(m.table(i).transpose(1, 2)),
                      table=nn.Embedding(11, 4, padding_idx=0), bn=nn.BatchNorm1d(4)), tokens(),
          FOLDED),
    Graph("embedding with max_norm",
          lambda: Net(lambda m, i: m.bn(m.table(i).transpose(1, 2)),
                      table=nn.Embedding(11, 4, max_norm=1.0), bn=nn.BatchNorm1d(4)), tokens(),
          {"bn": "multiply-add: blocked"}),
    Graph("embedding tied to a linear layer",
          lambda: _tied(), tokens(), {"bn": "multiply-add: shared-weight"}),
    Graph("attention",
          lambda: Net(lambda m, x: _channels_last(m.bn, m.att(x, x, x)[0]), att=attention(),
                      bn=nn.BatchNorm1d(6)), sequences, FOLDED),
    Graph("attention without bias, weights not needed",
          lambda: Net(lambda m, x: _channels_last(m.bn, m.att(x, x, x, need_weights=False)[0]),
                      att=attention(bias=False), bn=nn.BatchNorm1d(6)), sequences,
          {"bn": "multiply-add: no-bias"}),
    Graph("keyword calls",
          lambda: Net(lambda m, x: m.bn(input=F.conv2d(input=x, bias=m.b, weight=m.w, stride=2)),
                      w=nn.Parameter(normal(4, 3, 3, 3)), b=nn.Parameter(normal(4)), bn=B2(4)),
          images(), FOLDED),
    Graph("functional linear, its weight a plain parameter",
          lambda: Net(lambda m, x: m.bn(F.linear(weight=m.w, input=x, bias=m.b)),
                      w=nn.Parameter(normal(4, 6)), b=nn.Parameter(normal(4)),
                      bn=nn.BatchNorm1d(4)), vectors(), FOLDED),
    Graph("functional conv2d without any bias",
          lambda: Net(lambda m, x: m.bn(F.conv2d(x, m.w)), w=nn.Parameter(normal(4, 3, 3, 3)),
                      bn=B2(4)), images(), {"bn": "multiply-add: no-bias"}),
    Graph("torch.conv2d", lambda: Net(lambda m, x: m.bn(torch.conv2d(x, m.c.weight, m.c.bias)),
                                      c=nn.Conv2d(3, 4, 3), bn=B2(4)), images(), FOLDED),
    Graph("weight transposed by hand",
          lambda: Net(lambda m, x: m.bn(x @ m.fc.weight.T + m.fc.bias), fc=nn.Linear(6, 4),
                      bn=nn.BatchNorm1d(4)), vectors(), {"bn": "multiply-add"}),
    Graph("einsum by hand",
          lambda: Net(lambda m, x: m.bn(torch.einsum("nc,dc->nd", x, m.w)),
                      w=nn.Parameter(normal(4, 6)), bn=nn.BatchNorm1d(4)), vectors(),
          {"bn": "multiply-add: blocked"}),
    Graph("bilinear", lambda: Net(lambda m, x: m.bn(m.b(x, x.flip(1))), b=nn.Bilinear(6, 6, 4),
                                  bn=nn.BatchNorm1d(4)), vectors(),
          {"bn": "multiply-add: blocked"}),
    Graph("lstm", lambda: Net(lambda m, x: _channels_last(m.bn, m.rnn(x)[0]),
                              rnn=nn.LSTM(6, 4, batch_first=True), bn=nn.BatchNorm1d(4)),
          sequences, {"bn": "multiply-add: blocked"}),
    Graph("unbatched input to the convolution",
          lambda: Net(lambda m, x: torch.stack([m.bn(m.c(i).unsqueeze(0)) for i in x.unbind()]),
                      c=nn.Conv2d(3, 4, 3), bn=B2(4)),
          lambda: [normal(2, 3, 6, 6), normal(2, 3, 7, 6, seed=1)], FOLDED),
    Graph("convolution of our own class",
          lambda: after(_Standardised(3, 4, 3), B2(4)), images(), {"bn": "multiply-add"}),
    Graph("convolution whose class passes another bias",
          lambda: after(_Negated(3, 4, 3), B2(4)), images(), {"bn": "multiply-add"}),
]  # fmt: skip

BEFORE = [
    Graph("→ conv1d", lambda: before(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(3)), signals(), FOLDED),
    Graph("→ conv1d, zero-padded", lambda: before(nn.Conv1d(3, 4, 5, padding=2),
                                                  nn.BatchNorm1d(3)), signals(), FOLDED),
    Graph("→ conv2d, zero-padded, strided, dilated, grouped",
          lambda: before(nn.Conv2d(4, 6, 3, (2, 1), (3, 2), 2, groups=2), B2(4)), images(4),
          FOLDED),
    Graph("→ conv2d, padding='same'",
          lambda: before(nn.Conv2d(3, 4, (3, 5), padding="same", bias=False), B2(3)), images(),
          FOLDED),
    Graph("→ conv2d, padding='valid'",
          lambda: before(nn.Conv2d(3, 4, 3, padding="valid", bias=False), B2(3)), images(),
          FOLDED),
    Graph("→ conv2d, 1 × 1, no bias", lambda: before(nn.Conv2d(3, 4, 1, bias=False), B2(3)),
          images(), FOLDED),
    *(Graph(f"→ conv2d, padding_mode='{mode}'",
            lambda mode=mode: before(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), B2(3)),
            images(), FOLDED) for mode in ("circular", "reflect", "replicate")),
    Graph("→ conv2d, padding='same', circular",
          lambda: before(nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), B2(3)),
          images(), FOLDED),
    Graph("→ conv2d, larger kernel than image",
          lambda: before(nn.Conv2d(3, 4, 7, padding=3), B2(3)), images(3, 4), FOLDED),
    Graph("→ conv3d, zero-padded", lambda: before(nn.Conv3d(2, 4, 3, 2, 1), nn.BatchNorm3d(2)),
          volumes, FOLDED),
    Graph("→ conv_transpose1d",
          lambda: before(nn.ConvTranspose1d(4, 6, 4, 3, 1, 2, groups=2), nn.BatchNorm1d(4)),
          signals(4), FOLDED),
    Graph("→ conv_transpose2d, kernel = stride",
          lambda: before(nn.ConvTranspose2d(3, 4, 2, 2, bias=False), B2(3)), images(), FOLDED),
    Graph("→ conv_transpose2d, kernel < stride",
          lambda: before(nn.ConvTranspose2d(3, 4, 1, 2), B2(3)), images(), FOLDED),
    Graph("→ conv_transpose2d, grouped, output_padding",
          lambda: before(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), B2(4)),
          images(4), FOLDED),
    Graph("→ conv_transpose3d", lambda: before(nn.ConvTranspose3d(2, 4, 3, 2, 1),
                                               nn.BatchNorm3d(2)), volumes, FOLDED),
    Graph("→ conv_transpose2d with output_size",
          lambda: Net(lambda m, x: m.up(m.bn(x), output_size=(2 * x.shape[2], 2 * x.shape[3])),
                      up=nn.ConvTranspose2d(3, 4, 3, 2, 1), bn=B2(3)), images(), FOLDED),
    Graph("→ linear", lambda: before(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(6)), vectors(),
          FOLDED),
    Graph("→ linear over (N, L, C), L = C, norm over L",
          lambda: before(nn.Linear(6, 6), nn.BatchNorm1d(6)), twins, {"bn": "multiply-add"}),
    Graph("→ linear over (N, L, C), L = C, norm over C",
          lambda: Net(lambda m, x: m.fc(_channels_last(m.bn, x)), fc=nn.Linear(6, 6),
                      bn=nn.BatchNorm1d(6)), twins, FOLDED),
    Graph("→ flatten → linear",
          lambda: Net(lambda m, x: m.fc(m.bn(x).flatten(1)), fc=nn.Linear(12, 4), bn=B2(3)),
          lambda: [normal(2, 3, 2, 2), normal(5, 3, 2, 2, seed=1)], FOLDED),
    Graph("→ self-attention",
          lambda: Net(lambda m, x: _self(m.att, _channels_last(m.bn, x)), att=attention(),
                      bn=nn.BatchNorm1d(6)), sequences, FOLDED),
    Graph("→ value of an attention alone",
          lambda: Net(lambda m, x: m.att(x, x, _channels_last(m.bn, x))[0], att=attention(),
                      bn=nn.BatchNorm1d(6)), sequences, FOLDED),
    Graph("→ attention with bias_k and zero attention",
          lambda: Net(lambda m, x: _self(m.att, _channels_last(m.bn, x)),
                      att=attention(add_bias_kv=True, add_zero_attn=True),
                      bn=nn.BatchNorm1d(6)), sequences, FOLDED),
    Graph("→ attention, other key and value widths",
          lambda: Net(lambda m, x: m.att(_channels_last(m.bn, x), x[..., :3], x[..., 3:5])[0],
                      att=attention(kdim=3, vdim=2), bn=nn.BatchNorm1d(6)), sequences,
          {"bn": "multiply-add"}),
    Graph("→ lstm", lambda: Net(lambda m, x: m.rnn(_channels_last(m.bn, x))[0],
                                rnn=nn.LSTM(6, 4, batch_first=True), bn=nn.BatchNorm1d(6)),
          sequences, {"bn": "multiply-add"}),
    Graph("→ prelu", lambda: Net(lambda m, x: m.act(m.bn(m.c(x))), c=nn.Conv2d(3, 4, 3),
                                 act=nn.PReLU(4), bn=B2(4)), images(), FOLDED),
    Graph("→ convolution that pads by a call",
          lambda: Net(lambda m, x: m.c(F.pad(m.bn(x), (1, 1, 1, 1))), c=nn.Conv2d(3, 4, 3),
                      bn=B2(3)), images(), {"bn": "multiply-add: blocked"}),
    Graph("→ convolution that pads by a module with reflection",
          lambda: Net(lambda m, x: m.c(m.pad(m.bn(x))), c=nn.Conv2d(3, 4, 3),
                      pad=nn.ReflectionPad2d(2), bn=B2(3)), images(), FOLDED),
    Graph("between two convolutions, the second zero-padded",
          lambda: Net(lambda m, x: m.d(m.bn(m.c(x))), c=nn.Conv2d(3, 4, 3),
                      d=nn.Conv2d(4, 2, 3, padding=1), bn=B2(4)), images(), FOLDED),
    Graph("norm, zero-padded convolution, norm",
          lambda: Net(lambda m, x: m.post(m.c(m.pre(x))), pre=B2(3),
                      c=nn.Conv2d(3, 4, 3, padding=1), post=B2(4)), images(),
          {"pre": "folded", "post": "folded"}),
    Graph("norm, transposed convolution, norm",
          lambda: Net(lambda m, x: m.post(m.c(m.pre(x))), pre=B2(4),
                      c=nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, bias=False), post=B2(6)),
          images(4), {"pre": "folded", "post": "folded"}),
    Graph("norm, zero-padded convolution without batch",
          lambda: Net(lambda m, x: torch.stack([m.c(i) for i in m.bn(x).unbind()]),
                      c=nn.Conv2d(3, 4, 3, padding=1), bn=B2(3)),
          lambda: [normal(2, 3, 6, 6), normal(2, 3, 7, 6, seed=1)], FOLDED),
]  # fmt: skip


def _self(att: nn.Module, x: torch.Tensor) -> Any:
    return att(x, x, x)[0]


def _tied() -> nn.Module:
    net = Net(lambda m, i: m.head(m.bn(m.table(i).transpose(1, 2)).transpose(1, 2).relu()),
              table=nn.Embedding(11, 4), bn=nn.BatchNorm1d(4),
              head=nn.Linear(4, 11, bias=False))  # fmt: skip
    net.head.weight = net.table.weight
    return net


class _Standardised(nn.Conv2d):
    """Weight standardisation: the weight is computed anew at each call."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, w, self.bias)


class _Negated(nn.Conv2d):
    """y = conv(x; w, -b)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        return self._conv_forward(input, self.weight, -self.bias)
