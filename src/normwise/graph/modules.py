"""What stands where a batch norm stood, or where a convolution took one up at its borders.

Plain PyTorch throughout, so that folded models script, export and train like any other.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.activations import parse

__all__ = [
    "BORDERED",
    "BorderConv1d",
    "BorderConv2d",
    "BorderConv3d",
    "BorderConvTranspose1d",
    "BorderConvTranspose2d",
    "BorderConvTranspose3d",
    "ChannelAffine",
    "Tail",
    "activation_module",
    "bordered",
]


def activation_module(activation: str | None) -> nn.Module:
    """torch.nn's module for one of :mod:`normwise.activations`; Identity for None."""
    if activation is None:
        return nn.Identity()
    act = parse(activation)
    if act.name == "leaky_relu":
        return nn.LeakyReLU(act.slope)
    modules: dict[str, type[nn.Module]] = {
        "none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish,
        "silu": nn.SiLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
    }  # fmt: skip
    return modules[act.name]()


class Tail(nn.Module):
    """What is left of a folded norm that was called with a residual: ``activation(x + r)``."""

    def __init__(self, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation_module(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = input if residual is None else input + residual
        out: Tensor = self.activation(y)
        return out


class ChannelAffine(nn.Module):
    """``activation(x * weight + bias + residual)``: a batch norm in eval, without statistics.

    Args:
        weight, bias: shape ``(C,)``: :math:`a = \\gamma / \\sqrt{\\sigma^2 + \\epsilon}` and
            :math:`b = \\beta - a \\mu`.
        channel_dim: the axis of the channels.
        activation: one of normwise's activations, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        channel_dim: int = 1,
        activation: str | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad)
        self.bias = nn.Parameter(bias, requires_grad)
        self.channel_dim = channel_dim
        self.activation = activation_module(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        shape = [1] * input.dim()
        shape[self.channel_dim] = -1
        weight, bias = self.weight.reshape(shape), self.bias.reshape(shape)
        # Two passes, the second over what is in cache: at batch 1 0.3 to 0.65 of the time of
        # torch.addcmul and 0.5 to 0.7 of torch.nn's batch norm. In the parameters' precision, as
        # batch norm computes.
        y = (input.to(weight.dtype) * weight).add_(bias).to(input.dtype)
        if residual is not None:
            y = y + residual
        out: Tensor = self.activation(y)
        return out

    def extra_repr(self) -> str:
        text = f"{self.weight.numel()}"
        return text if self.channel_dim == 1 else f"{text}, channel_dim={self.channel_dim}"


# A convolution after a batch norm pads with zeros what the norm has shifted. Folded, it reads the
# unshifted input and must give its border what the shift adds there. The shift is the same at all
# positions, so that is the convolution of a one-channel image of ones with `border`, the weights
# summed over the input channels with the shift as their factors: exact for every input size, at
# 1/C of the convolution's own cost and for one sample whatever the batch.


class BorderConv1d(nn.Conv1d):
    border: Tensor

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        ones = torch.ones((1, 1, input.size(-1)), dtype=input.dtype, device=input.device)
        edge = F.conv1d(ones, self.border, None, self.stride, self.padding, self.dilation)
        return y + (edge if input.dim() == 3 else edge[0])


class BorderConv2d(nn.Conv2d):
    border: Tensor

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        ones = torch.ones(
            (1, 1, input.size(-2), input.size(-1)), dtype=input.dtype, device=input.device
        )
        edge = F.conv2d(ones, self.border, None, self.stride, self.padding, self.dilation)
        return y + (edge if input.dim() == 4 else edge[0])


class BorderConv3d(nn.Conv3d):
    border: Tensor

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        ones = torch.ones(
            (1, 1, input.size(-3), input.size(-2), input.size(-1)),
            dtype=input.dtype,
            device=input.device,
        )
        edge = F.conv3d(ones, self.border, None, self.stride, self.padding, self.dilation)
        return y + (edge if input.dim() == 5 else edge[0])


class BorderConvTranspose1d(nn.ConvTranspose1d):
    border: Tensor

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, dilation = list(self.stride), list(self.dilation)
        padding, kernel = [int(p) for p in self.padding], list(self.kernel_size)
        extra = self._output_padding(input, output_size, stride, padding, kernel, 1, dilation)
        y = F.conv_transpose1d(
            input, self.weight, self.bias, stride, padding, extra, self.groups, dilation
        )
        ones = torch.ones((1, 1, input.size(-1)), dtype=input.dtype, device=input.device)
        edge = F.conv_transpose1d(ones, self.border, None, stride, padding, extra, 1, dilation)
        return y + (edge if input.dim() == 3 else edge[0])


class BorderConvTranspose2d(nn.ConvTranspose2d):
    border: Tensor

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, dilation = list(self.stride), list(self.dilation)
        padding, kernel = [int(p) for p in self.padding], list(self.kernel_size)
        extra = self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)
        y = F.conv_transpose2d(
            input, self.weight, self.bias, stride, padding, extra, self.groups, dilation
        )
        ones = torch.ones(
            (1, 1, input.size(-2), input.size(-1)), dtype=input.dtype, device=input.device
        )
        edge = F.conv_transpose2d(ones, self.border, None, stride, padding, extra, 1, dilation)
        return y + (edge if input.dim() == 4 else edge[0])


class BorderConvTranspose3d(nn.ConvTranspose3d):
    border: Tensor

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, dilation = list(self.stride), list(self.dilation)
        padding, kernel = [int(p) for p in self.padding], list(self.kernel_size)
        extra = self._output_padding(input, output_size, stride, padding, kernel, 3, dilation)
        y = F.conv_transpose3d(
            input, self.weight, self.bias, stride, padding, extra, self.groups, dilation
        )
        ones = torch.ones(
            (1, 1, input.size(-3), input.size(-2), input.size(-1)),
            dtype=input.dtype,
            device=input.device,
        )
        edge = F.conv_transpose3d(ones, self.border, None, stride, padding, extra, 1, dilation)
        return y + (edge if input.dim() == 5 else edge[0])


BORDERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BorderConv1d,
    nn.Conv2d: BorderConv2d,
    nn.Conv3d: BorderConv3d,
    nn.ConvTranspose1d: BorderConvTranspose1d,
    nn.ConvTranspose2d: BorderConvTranspose2d,
    nn.ConvTranspose3d: BorderConvTranspose3d,
}


def bordered(conv: nn.Module, border: Tensor) -> nn.Module:
    """``conv`` as the class with a border term; the same parameters, attributes and mode."""
    cls = BORDERED[type(conv)]
    new = cls.__new__(cls)
    for name, value in conv.__dict__.items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    weight = conv.weight
    assert isinstance(weight, Tensor)
    new.register_parameter("border", nn.Parameter(border, weight.requires_grad))
    return new
