"""Why a batch norm did not go where it could have gone: a short list of names."""

from __future__ import annotations

__all__ = ["REASONS", "Refusal"]

REASONS: dict[str, str] = {
    "no-neighbour": "no convolution, linear layer or norm borders on it that could take it up",
    "blocked": "a call between does not commute with a scale and a shift for each channel",
    "channels-differ": "its channels are not those of the neighbour, or are mixed on the way",
    "used-elsewhere": "the tensor that would change is read by another call",
    "is-output": "the tensor that would change is an output, or is kept somewhere",
    "shared-weight": "the neighbour's weight is used in another place",
    "no-bias": "the shift needs a bias, and the neighbour has no place for one",
    "hook": "a hook on a module would see other values",
    "parametrized": "the neighbour's weight is computed anew at each call",
    "not-a-parameter": "a tensor involved is no parameter or buffer of the model",
    "in-place": "a call writes to memory that the norm's input and output would share",
    "negative-scale": "max pooling or relu lies between, and some scales are not above zero",
    "training-mode": "it normalizes by the batch: it was left in training mode",
    "no-running-statistics": "it normalizes by the batch: it keeps no running statistics",
    "masked": "it is called with a mask",
    "dynamic": "the code around it decides by values of tensors",
    "not-reached": "it does not run on the example inputs",
    "scripted": "it is compiled by TorchScript",
    "custom-forward": "its class has a forward of its own",
    "functional": "it is written as a function call, which only its own code can drop",
    "not-finite": "its scale or shift is inf or NaN, or the folded weights leave the dtype's range",
    "differs": "the folded model differed from the original beyond rounding; undone",
}


class Refusal(Exception):
    """A fold that is not to be; ``reason`` is a key of :data:`REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
