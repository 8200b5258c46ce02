"""``memory_saver()``: outputs of batch norms are recomputed in the backward instead of kept."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from normwise import ops
from normwise.activations import parse
from normwise.functional.observer import LISTENERS, Output, listening

__all__ = ["Saved", "memory_saver"]

# How many recomputations may hang on one another: in a stage of residual blocks each output is the
# next one's residual. Every (LIMIT + 1)th output is kept, so the backward holds at most LIMIT
# recomputed ones at a time and never recurses deeper. ResNet-50, batch 8, 112 px, against 227 MB at
# the peak of a plain backward: 192 MB with 1, 186 with 2, 178 with 4, 182 with 8.
LIMIT = 4


class Saved:
    """What a :func:`memory_saver` block saves.

    ``bytes``: of the outputs that autograd would have kept and does not; ``tensors``: how many.
    An output that somebody else holds (a list of features) counts, but stays in memory.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.tensors = 0

    def __repr__(self) -> str:
        outputs = "output" if self.tensors == 1 else "outputs"
        return f"{self.bytes / 1e6:.1f} MB in {self.tensors} {outputs} recomputed instead of kept"


class _Kept:
    """A tensor as autograd saved it, with the version check that hooks take from autograd."""

    __slots__ = ("__weakref__", "companion", "tensor", "version")

    def __init__(self, t: Tensor) -> None:
        # Detached (same memory, same version counter): an output must not hold its own graph.
        self.tensor = t.detach()
        self.version = t._version
        self.companion: _Recipe | None = None

    def unpack(self) -> Tensor:
        now = self.tensor._version
        if now != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {now}; expected version {self.version} instead. Hint: run the backward "
                "before whatever writes to it, such as optimizer.step()."
            )
        return self.tensor


class _Use:
    """One reader of an output that is recomputed: the whole of it, or a view."""

    __slots__ = ("__weakref__", "companion", "geometry", "recipe", "round")

    def __init__(self, recipe: _Recipe, t: Tensor) -> None:
        self.recipe = recipe
        self.geometry = (t.size(), t.stride(), t.storage_offset())
        self.round = recipe.round - 1
        self.companion: _Recipe | None = None
        recipe.uses += 1
        recipe.waiting += 1

    def unpack(self) -> Tensor:
        # A new view each time: autograd writes a graph of its own on what it is given.
        return self.recipe.values(self).as_strided(*self.geometry)

    def __del__(self) -> None:
        self.recipe.leave(self)


class _Recipe:
    """How to make an output again.

    The values are made for the first reader and shared until each reader had them once; then the
    next round may begin (retain_graph=True). A recipe lives as long as a reader, or as the norm's
    own node keeps x: nothing stays in memory that the graph does not need.
    """

    def __init__(self, output: Output, x: _Packed, residual: _Packed | None, depth: int) -> None:
        y, optional = output.y, (output.weight, output.bias, output.mask)
        self.x, self.residual = x, residual
        self.weight, self.bias, self.mask = (None if t is None else _Kept(t) for t in optional)
        self.statistics = [_Kept(t) for t in output.statistics]
        self.options = (output.channel_dim, output.eps, output.activation)
        self.depth = depth
        # The weak reference keeps the address, not the memory: no other storage can take its place.
        self.storage = StorageWeakRef(y.untyped_storage())
        self.bytes = y.untyped_storage().nbytes()
        self.version, self.dtype, self.stride = y._version, y.dtype, y.stride()
        self.source = _address(output.x)
        self.counted = False
        self.round = self.uses = self.waiting = 0
        self.y: Tensor | None = None

    def makes(self, t: Tensor) -> bool:
        """Whether `t`, in the output's memory, holds the output's values: itself or a view."""
        return (
            type(t) is Tensor
            and t._version == self.version
            and t.dtype == self.dtype
            and not t.is_neg()
        )

    def values(self, use: _Use) -> Tensor:
        y = self.y
        if y is None:
            y = self.y = self._recompute()
        if use.round != self.round:
            use.round = self.round
            self._had()
        return y

    def leave(self, use: _Use) -> None:
        self.uses -= 1
        if use.round != self.round:
            self._had()

    def _had(self) -> None:
        self.waiting -= 1
        if self.waiting <= 0:
            self.y = None
            self.round += 1
            self.waiting = self.uses

    @torch.no_grad()
    def _recompute(self) -> Tensor:
        statistics = [s.unpack() for s in self.statistics]
        if len(statistics) == 2:
            mean, var = statistics
        else:
            # In float64, as the forward does it: the result is the same bit for bit.
            count, mean, m2 = statistics[0].unbind(0)
            var = m2 / count.clamp(min=1)
        weight, bias, residual, mask = (
            None if t is None else t.unpack()
            for t in (self.weight, self.bias, self.residual, self.mask)
        )
        y: Tensor = ops.normalize(
            self.x.unpack(), mean, var, weight, bias, residual, mask, *self.options
        )
        if y.stride() != self.stride:
            y = torch.empty_strided(y.shape, self.stride, dtype=y.dtype, device=y.device).copy_(y)
        return y


_Packed = _Kept | _Use


def _address(t: Tensor) -> int | None:
    """Which storage it is; None where a tensor has none (sparse, wrapper subclasses)."""
    if t.layout != torch.strided:
        return None
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


class _Saver:
    """The hooks of one block; nested blocks of a thread share what they know."""

    def __init__(self, outer: _Saver | None) -> None:
        self.saved = Saved()
        self.outer = outer
        empty: WeakValueDictionary[int, _Recipe] = WeakValueDictionary()
        kept: WeakValueDictionary[int, _Kept] = WeakValueDictionary()
        # By the address of the storage. A value keeps its address from being used again.
        self.recipes: WeakValueDictionary[int, _Recipe] = empty if outer is None else outer.recipes
        self.kept: WeakValueDictionary[int, _Kept] = kept if outer is None else outer.kept
        self.made: _Recipe | None = None

    def observe(self, output: Output) -> None:
        """A norm made an output: note how, unless keeping it is as good."""
        self.made = None
        y, address = output.y, _address(output.y)
        if address is None or type(y) is not Tensor or y.storage_offset() != 0:
            return
        nbytes = y.untyped_storage().nbytes()
        if nbytes == 0 or nbytes != y.numel() * y.element_size():
            return
        x = self._packed(output.x)
        residual = None
        if output.residual is not None:
            residual = self._packed(output.residual)
            if isinstance(residual, _Kept) and not self._kept_anyway(output):
                return  # to keep the residual instead of the output saves nothing
        depth = 1 + max((p.recipe.depth for p in (x, residual) if isinstance(p, _Use)), default=0)
        if depth <= LIMIT:
            self.made = self.recipes[address] = _Recipe(output, x, residual, depth)

    def _kept_anyway(self, output: Output) -> bool:
        """Whether the residual stays in memory: its maker's reader or the norm itself keeps it."""
        assert output.residual is not None
        act = parse(output.activation)
        if act.code != 0 and not act.from_output:
            return True
        return _address(output.residual) in self.kept

    def _packed(self, t: Tensor) -> _Packed:
        address = _address(t)
        recipe = None if address is None else self.recipes.get(address)
        return _Use(recipe, t) if recipe is not None and recipe.makes(t) else _Kept(t)

    def pack(self, t: Tensor) -> _Packed:
        made, self.made = self.made, None
        packed = self._packed(t)
        address = _address(t)
        if isinstance(packed, _Use):
            self._count(packed.recipe)
        elif address is not None:
            self.kept[address] = packed
        # The first tensor that a norm saves is x. Its entry holds the recipe, so that this lives
        # until the norm's own backward is done, and no longer.
        if made is not None and made.source == address:
            packed.companion = made
        return packed

    def _count(self, recipe: _Recipe) -> None:
        if recipe.counted:
            return
        recipe.counted = True
        saver: _Saver | None = self
        while saver is not None:
            saver.saved.bytes += recipe.bytes
            saver.saved.tensors += 1
            saver = saver.outer


def _unpack(packed: _Packed) -> Tensor:
    return packed.unpack()


def _innermost() -> _Saver | None:
    """The saver around this block in this thread."""
    listener = LISTENERS.get(threading.get_ident(), [None])[-1]
    owner = getattr(listener, "__self__", None)
    return owner if isinstance(owner, _Saver) else None


@contextlib.contextmanager
def memory_saver() -> Iterator[Saved]:
    """Train with less memory: outputs of batch norms are recomputed in the backward, not kept.

    A convolution keeps its input for its backward, and that input is mostly the output of a batch
    norm, which itself keeps *its* input. The second determines the first: within this block
    autograd keeps, instead of an output of a :mod:`normwise` batch norm (activation and residual
    included), how to make it again from x, the statistics, the parameters and the residual.
    Gradients are the same bit for bit; each output costs one more elementwise pass. The idea is
    that of In-Place Activated BatchNorm (Rota Bulò, Porzi & Kontschieder, CVPR 2018), which
    overwrites x and inverts the activation; here x stays, so any activation will do.

    The forward stands in the block; the backward may follow outside. Also a decorator:
    ``@nw.memory_saver()``. Works in training mode, and in eval mode where a gradient is asked for.

    Yields:
        Saved: ``bytes`` and ``tensors`` that autograd does not keep; grows during the block.

    Raises:
        RuntimeError: in the backward, as without the block, if something that it needs was written
            to after the forward, such as a parameter by ``optimizer.step()``.

    Kept as usual: outputs changed in place before they are read; outputs whose residual nobody
    else keeps; every fifth of a chain of residual blocks; what :func:`torch.compile` compiled.
    Torch asks only the innermost saved tensor hooks: in a region under
    ``torch.utils.checkpoint`` or ``save_on_cpu`` those decide, not this block around them.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import memory_saver
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), nw.nn.BatchNorm2d(8, activation="relu"),
        ...     torch.nn.Conv2d(8, 8, 3),
        ... )
        >>> with memory_saver() as saved:
        ...     loss = model(torch.randn(2, 3, 9, 9)).square().mean()
        >>> loss.backward()
        >>> saved.tensors, saved.bytes
        (1, 3136)
    """
    saver = _Saver(_innermost())
    with listening(saver.observe), saved_tensors_hooks(saver.pack, _unpack):
        try:
            yield saver.saved
        finally:
            saver.made = None
