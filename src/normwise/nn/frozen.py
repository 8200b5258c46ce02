"""Frozen batch norm: statistics and parameters of a pretrained backbone that nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise import functional as F
from normwise.activations import parse
from normwise.functional.masks import lengths_to_mask

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(nn.Module):
    r"""Batch norm of constants, for an input of any rank: buffers only, the same in every mode.

    :math:`y = \phi\bigl((x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}\,\gamma_c + \beta_c +
    \mathrm{res}\bigr)`, with all four vectors buffers: no optimizer finds a parameter, ``.train()``
    changes nothing, gradients flow to the input alone. Not an instance of torch.nn's batch norms,
    so tools that reset or re-estimate statistics (``update_bn``) leave it alone.

    Loads the state dicts of torch.nn's and normwise's batch norms (``num_batches_tracked`` is left
    out), of torchvision's ``FrozenBatchNorm2d``, and of detectron2's: where its first version
    (Caffe2 models) has ``weight`` and ``bias`` alone, mean 0 and variance 1 stand in, as there.

    Args:
        num_features: :math:`C`.
        eps: added to the variance; 0 is allowed.
        device, dtype: of the buffers.
        activation: as :class:`~normwise.nn.BatchNorm`'s.
        channel_dim: the axis of the channels.

    Call:
        ``bn(x, residual=None, mask=None, lengths=None, activation=None)``, as
        :class:`~normwise.nn.BatchNorm`.

    Example:
        >>> import torch, normwise as nw
        >>> frozen = nw.nn.FrozenBatchNorm(3)
        >>> _ = frozen.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        >>> list(frozen.parameters())
        []
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    _version = 3  # detectron2's
    nonfinite = "propagate"
    track_running_stats = True
    momentum = 0.0
    affine = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if activation is not None:
            parse(activation)
        self.num_features, self.eps = num_features, eps
        self.activation = None if activation == "none" else activation
        self.channel_dim = channel_dim
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            vector = torch.full(
                (num_features,), value, device=device, dtype=dtype or torch.get_default_dtype()
            )
            self.register_buffer(name, vector)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """``activation(bn(input) + residual)`` by the buffers; ``activation`` is for this call
        instead of the layer's own."""
        if lengths is not None:
            mask = lengths_to_mask(lengths, input, self.channel_dim, mask)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0,
            self.eps, residual=residual, mask=mask,
            activation=self.activation if activation is None else activation,
            channel_dim=self.channel_dim,
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        version = local_metadata.get("version")
        caffe2 = f"{prefix}weight" in state_dict and (version is None or version < 2)
        if caffe2 and f"{prefix}running_mean" not in state_dict:
            state_dict[f"{prefix}running_mean"] = torch.zeros_like(self.running_mean)
        if caffe2 and f"{prefix}running_var" not in state_dict:
            state_dict[f"{prefix}running_var"] = torch.ones_like(self.running_var)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text if self.channel_dim == 1 else f"{text}, channel_dim={self.channel_dim}"
