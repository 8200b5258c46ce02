"""What the names in a pickle stand for. A name that is not here cannot be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from normwise.interop.checkpoints.file import Region
from normwise.interop.checkpoints.limits import is_size, shown
from normwise.interop.checkpoints.tensors import DTYPES

__all__ = ["OPAQUE", "Global", "Instance", "PickledTensor", "Storage", "call", "new"]


class _Opaque:
    """Stands for what holds no norm: a set, a NumPy scalar, a sparse tensor."""


OPAQUE = _Opaque()


class Global(NamedTuple):
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Instance(dict[Any, Any]):
    """An object of a TorchScript class (or a namespace): its attributes."""


_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """``numel`` elements under a key; quantized ones have no dtype here."""

    key: str
    dtype: torch.dtype | None
    numel: int

    @staticmethod
    def of(pid: Any, region: Region) -> Storage:
        """From ``('storage', class, key, device, numel)``; before torch 0.4 with a view behind."""
        fits = (
            isinstance(pid, tuple)
            and len(pid) in (5, 6)
            and pid[0] == "storage"
            and isinstance(pid[1], Global)
            and isinstance(pid[2], str)
            and is_size(pid[4])
            and pid[5:] in ((), (None,))
        )
        if not fits:
            region.refuse("a pickle that refers to something else than a tensor's storage")
        kind = pid[1]
        known = kind.module in ("torch", "torch.cuda", "torch.storage")
        return Storage(pid[2], DTYPES.get(_STORAGES.get(kind.name, "")) if known else None, pid[4])


@dataclass(frozen=True)
class PickledTensor:
    storage: Storage
    dtype: torch.dtype | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """_rebuild_tensor, _v2 and _v3, which has a dtype as its seventh argument."""
    dtype = DTYPES.get(rest[2].name) if len(rest) > 2 and isinstance(rest[2], Global) else None
    fits = isinstance(shape, tuple) and isinstance(strides, tuple) and isinstance(storage, Storage)
    if not fits or not all(map(is_size, (offset, *shape, *strides))):
        raise ValueError("a tensor of wrong arguments")
    return PickledTensor(storage, dtype or storage.dtype, offset, shape, strides)


def _first(value: Any, *_: Any) -> Any:
    return value


def _opaque(*_: Any) -> Any:
    return OPAQUE


def _mapping(*arguments: Any) -> Any:
    """OrderedDict() and, as Python 2 wrote it, OrderedDict([[key, value], …])."""
    pairs = arguments[0] if arguments else ()
    made: dict[Any, Any] = {}
    if isinstance(pairs, (list, tuple)):
        for pair in pairs:
            if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str):
                made[pair[0]] = pair[1]
    return made


def _default(*_: Any) -> Any:
    return {}


def _typed(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A parameter or tensor with attributes. A subclass could keep anything under its name."""
    known = ("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter",
             "torch.nn.parameter.Buffer")  # fmt: skip
    tensor = isinstance(kind, Global) and kind.path in known and isinstance(arguments, tuple)
    function = _CALLS.get(function.path) if isinstance(function, Global) else None
    return function(*arguments) if tensor and function not in (None, _typed) else OPAQUE


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default,
    "collections.Counter": _mapping,
    **dict.fromkeys(
        (
            "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_sparse_csr_tensor", "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            "torch.serialization._get_layout", "torch.device", "torch.Generator",
            "torch.jit._pickle.build_tensor_from_id", "torch.per_tensor_affine",
            "builtins.set", "builtins.frozenset", "builtins.complex", "builtins.slice",
            "builtins.bytearray", "builtins.range", "__builtin__.set", "_codecs.encode",
            "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct", "datetime.datetime", "datetime.timedelta",
            "decimal.Decimal", "fractions.Fraction", "uuid.UUID",
            "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
            "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
        ),
        _opaque,
    ),
}  # fmt: skip


def call(function: Any, arguments: Any, region: Region) -> Any:
    """What stands for the result of a call."""
    known = _CALLS.get(function.path) if isinstance(function, Global) else None
    if known is not None and isinstance(arguments, tuple):
        return known(*arguments)
    if isinstance(function, Global):
        if function.module == "copyreg" or function.module == "copy_reg":
            # copyreg._reconstructor(class, object, None): how the first pickle protocols say `new`.
            kind = arguments[0] if isinstance(arguments, tuple) and arguments else None
            if function.name == "_reconstructor" and isinstance(kind, Global):
                return new(kind, region)
        region.refuse(
            f"a pickle that calls {shown(function.path)}",
            "a file of tensors alone (safetensors, or torch.save(model.state_dict(), path)); do "
            "not load this one with weights_only=False unless you trust whoever wrote it",
            "a checkpoint is read without running the code that it names",
        )
    raise TypeError("a call of what is no function")


def new(kind: Any, region: Region) -> Any:
    """What stands for an object of a class that the pickle names."""
    if not isinstance(kind, Global):
        raise TypeError("an object of what is no class")
    if kind.module.startswith("__torch__") or kind.path == "argparse.Namespace":
        return Instance()
    if kind.path in ("collections.OrderedDict", "collections.defaultdict"):
        return {}
    if _CALLS.get(kind.path) is _opaque:
        return OPAQUE
    region.refuse(
        f"an object of the class {shown(kind.path)}, as torch.save(model) and "
        "torch.save({'args': an object, …}) write",
        "torch.save(model.state_dict(), path) in a program that has the class",
        "a checkpoint is read without importing the classes that it names",
    )
