"""What the norms without batch statistics share: an activation that the norm carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from normwise.activations import parse

__all__ = ["CarriesActivation", "drop_bias", "lacks_bias_text"]

# Stands before torch.nn's class among the bases, so its super() is that class.
if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def drop_bias(module: nn.Module, bias: bool) -> None:
    """torch.nn's own keyword for it came later than 2.10, from which on normwise runs."""
    if not bias:
        module.register_parameter("bias", None)


def lacks_bias_text(module: nn.Module, text: str) -> str:
    """``, bias=False`` where there is a weight alone and torch.nn's text does not tell."""
    alone = module._parameters.get("weight") is not None and module._parameters["bias"] is None
    return ", bias=False" if alone and "bias=" not in text else ""


class CarriesActivation(_Base):
    activation: str | None

    def _set_activation(self, activation: str | None) -> None:
        if activation is not None:
            parse(activation)
        self.activation = None if activation == "none" else activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if "bias" in self._parameters:
            text += lacks_bias_text(self, text)
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if getattr(self, "channel_dim", 1) != 1:
            text += f", channel_dim={self.channel_dim}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of torch.nn's own layers, and of ours from before an option, lack it."""
        base: Any = super()
        base.__setstate__(state)
        self.__dict__.setdefault("activation", None)
