"""Who is measured: torch.nn eager, ``torch.compile`` of it, and normwise; and the copy beside them.

Every contender gets the same tensors, the same parameters and running statistics, and does the same
work.  Parameters are float32 where the input is a half type, as under autocast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import Case
from .timing import Call

COPY = "copy"
TORCH = "torch.nn"
COMPILE = "torch.compile"
OURS = "normwise"
AGAIN = "torch.nn again"  # the harness against itself: how far from 1 is noise


@dataclasses.dataclass(frozen=True)
class Data:
    """The tensors of a case, in its dtype and layout."""

    x: Tensor
    residual: Tensor | None
    cotangent: Tensor
    state: dict[str, Tensor]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


def make_data(case: Case, seed: int = 0) -> Data:
    """Random tensors with a mean, in a residual too, so that a ReLU closes on some of the elements.

    The cotangent is random: the gradient of ``sum()`` through a batch norm is identically zero.
    """
    generator = torch.Generator().manual_seed(seed)
    grad = case.phase != "eval"
    x = _filled(case, generator).requires_grad_(grad)
    residual = _filled(case, generator).requires_grad_(grad) if case.fused == "add+relu" else None
    vector = torch.float64 if case.dtype == "float64" else torch.float32
    state = {
        key: torch.rand(case.channels, generator=generator, dtype=vector) + 0.5
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    state["num_batches_tracked"] = torch.tensor(0)
    return Data(x, residual, _filled(case, generator), state)


def _filled(case: Case, generator: torch.Generator) -> Tensor:
    """N(0.5, 1).  At most a million numbers are drawn, then repeated: drawing 25 million of them
    one by one takes longer than everything that is measured on them."""
    dtype = getattr(torch, case.dtype)
    y = torch.empty(case.shape, dtype=dtype)
    drawn = torch.randn(min(y.numel(), 1_000_003), generator=generator).add_(0.5).to(dtype)
    flat = y.view(-1)
    for start in range(0, flat.numel(), drawn.numel()):
        part = flat[start : start + drawn.numel()]
        part.copy_(drawn[: part.numel()])
    if case.layout == "channels_last":
        last = torch.channels_last if y.ndim == 4 else torch.channels_last_3d
        y = y.contiguous(memory_format=last)
    return y


class TorchBlock(nn.Module):
    """Batch norm, addition and ReLU as models write them, in place wherever that is possible."""

    def __init__(self, norm: nn.Module, fused: str) -> None:
        super().__init__()
        self.norm = norm
        self.relu = nn.ReLU(inplace=True) if fused != "none" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return y if self.relu is None else self.relu(y)


def _class_name(case: Case) -> str:
    return f"BatchNorm{max(1, len(case.shape) - 2)}d"


def _finish(norm: nn.Module, case: Case, data: Data) -> nn.Module:
    norm.to(data.state["weight"].dtype).load_state_dict(data.state)
    return norm.train(case.phase != "eval")


def _torch_block(case: Case, data: Data) -> nn.Module:
    norm = _finish(getattr(nn, _class_name(case))(case.channels), case, data)
    return TorchBlock(norm, case.fused).train(norm.training)


def _compiled_block(case: Case, data: Data) -> Callable[..., Tensor]:
    import torch._functorch.config as functorch

    # Without it the compiled backward gives its inputs' memory away and can be called only once.
    functorch.donated_buffer = False
    # Code compiled for earlier cases would count towards the limit of recompilations, past which
    # dynamo silently runs eagerly.
    torch._dynamo.reset()
    return torch.compile(_torch_block(case, data), fullgraph=True, dynamic=False)


def _our_block(case: Case, data: Data) -> nn.Module:
    import normwise.nn

    activation = None if case.fused == "none" else "relu"
    norm = getattr(normwise.nn, _class_name(case))(case.channels, activation=activation)
    return _finish(norm, case, data)


_BLOCKS: dict[str, Callable[[Case, Data], Callable[..., Tensor]]] = {
    TORCH: _torch_block,
    AGAIN: _torch_block,
    COMPILE: _compiled_block,
    OURS: _our_block,
}


def build(contender: str, case: Case, data: Data) -> Call:
    """The call to time.  Its result is what `disagreement` compares."""
    if contender == COPY:
        return _copy(data.x.detach())
    block = _BLOCKS[contender](case, data)
    if case.phase == "backward":
        return _backward(block, data)
    if data.residual is None:
        return lambda: block(data.x)
    if contender == OURS:
        return lambda: block(data.x, residual=data.residual)
    return lambda: block(data.x, data.residual)


def _copy(x: Tensor) -> Call:
    destination = torch.empty_like(x)
    return lambda: destination.copy_(x)


def _backward(block: Callable[..., Tensor], data: Data) -> Call:
    """The engine's call on a graph that is kept, for x, the parameters and the residual."""
    if data.residual is None:
        y = block(data.x)
    else:
        y = block(data.x, residual=data.residual)
    assert isinstance(block, nn.Module)
    inputs = (*data.operands, *block.parameters())
    return lambda: torch.autograd.grad(y, inputs, data.cotangent, retain_graph=True)


# In the half types an output near zero rounds to either side of the ReLU, so a few gradients in a
# thousand differ wholly: hence a norm over the tensor, and bounds that only wrong work exceeds.
_TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.15}


def disagreement(case: Case, got: object, expected: object) -> str:
    """Why two contenders did not do the same work, or the empty string.

    Not a test of accuracy: a guard against timing a contender that skips its work.
    """
    worst = max(
        (_distance(a, b) for a, b in zip(_tensors(got), _tensors(expected), strict=True)),
        default=0.0,
    )
    if worst <= _TOLERANCE[case.dtype]:
        return ""
    return f"differs from {TORCH} by {worst:.2g} (relative, root mean square)"


def _tensors(result: object) -> tuple[Tensor, ...]:
    # An object to the type checker: what a contender returns is a tensor or a sequence of them.
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    a, b = a.detach(), b.detach()
    wide = torch.promote_types(a.dtype, torch.float32)
    difference = torch.linalg.vector_norm(a - b, dtype=wide)
    distance = float(difference / torch.linalg.vector_norm(b, dtype=wide))
    return distance if distance == distance else float("inf")
