"""What a batch norm is by default in other frameworks, as data: the numbers that a port forgets.

``momentum`` is everywhere the weight of the *new* batch, as in torch.nn; most frameworks count the
other way, by the weight of the old value, and document 1 minus what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass

from normwise.errors import InputError, message

__all__ = ["CONVENTIONS", "Convention", "convention"]


@dataclass(frozen=True)
class Convention:
    """The defaults of a framework's batch norm.

    eps: added to the variance. momentum: weight of the new batch in the running statistics; None
    where the framework has no default, but asks for it. unbiased: whether the running variance
    averages unbiased batch variances (n - 1), as torch.nn's does; None where it depends on the
    kernel. weight, bias, mean, var: how the four tensors are called there. axis: of the channels.
    source: the document that says so.
    """

    name: str
    eps: float
    momentum: float | None
    unbiased: bool | None
    weight: str
    bias: str
    mean: str
    var: str
    axis: int
    source: str


_ALL = (
    Convention(
        "torch", 1e-5, 0.1, True, "weight", "bias", "running_mean", "running_var", 1,
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
    ),
    # Biased by keras.ops.moments; TensorFlow's fused kernel, which Keras 2 used on rank 4, put
    # n - 1 into the moving variance.
    Convention(
        "keras", 1e-3, 0.01, None, "gamma", "beta", "moving_mean", "moving_variance", -1,
        "https://keras.io/api/layers/normalization_layers/batch_normalization/",
    ),
    Convention(
        "flax", 1e-5, 0.01, False, "scale", "bias", "mean", "var", -1,
        "https://flax.readthedocs.io/en/latest/api_reference/flax.linen/layers.html",
    ),
    # decay_rate has no default; mean_ema and var_ema hold the average without its start from 0.
    Convention(
        "haiku", 1e-5, None, False, "scale", "offset", "mean_ema/average", "var_ema/average", -1,
        "https://dm-haiku.readthedocs.io/en/latest/api.html#batchnorm",
    ),
    # decay 0.999; a fused kernel by default, with n - 1; scale=False by default: no gamma.
    Convention(
        "tf-slim", 1e-3, 0.001, None, "gamma", "beta", "moving_mean", "moving_variance", -1,
        "https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/contrib/layers/batch_norm",
    ),
    Convention(
        "paddle", 1e-5, 0.1, False, "weight", "bias", "_mean", "_variance", 1,
        "https://www.paddlepaddle.org.cn/documentation/docs/en/api/paddle/nn/BatchNorm2D_en.html",
    ),
    Convention(
        "mindspore", 1e-5, 0.1, None, "gamma", "beta", "moving_mean", "moving_variance", 1,
        "https://www.mindspore.cn/docs/en/stable/api_python/nn/mindspore.nn.BatchNorm2d.html",
    ),
    # Three blobs: sums of mean and variance, and the weight to divide them by; gamma and beta
    # belong to the Scale layer that follows.
    Convention(
        "caffe", 1e-5, 0.001, True, "scale/0", "scale/1", "0", "1", 1,
        "https://caffe.berkeleyvision.org/tutorial/layers/batchnorm.html",
    ),
    # "ReduceVar refers to the population variance".
    Convention(
        "onnx", 1e-5, 0.1, False, "scale", "B", "input_mean", "input_var", 1,
        "https://onnx.ai/onnx/operators/onnx__BatchNormalization.html",
    ),
)  # fmt: skip

CONVENTIONS = {one.name: one for one in _ALL}
"""By name."""

_ALIASES = {
    "pytorch": "torch",
    "tensorflow": "keras",
    "tf": "keras",
    "tf.keras": "keras",
    "jax": "flax",
    "nnx": "flax",
    "dm-haiku": "haiku",
    "slim": "tf-slim",
    "tf_slim": "tf-slim",
    "paddlepaddle": "paddle",
}


def convention(framework: str) -> Convention:
    """The convention of the framework of this name, in any case.

    Raises:
        InputError: if there is none in the table.

    Example:
        >>> convention("Keras").eps
        0.001
    """
    name = framework.lower() if isinstance(framework, str) else ""
    name = _ALIASES.get(name, name)
    if name not in CONVENTIONS:
        raise InputError(
            message(
                "framework names where the weights came from",
                repr(framework),
                f"one of {', '.join(CONVENTIONS)}",
            )
        )
    return CONVENTIONS[name]
