"""A folded model in one file, and back.

The file is safetensors: the tensors of the folded model's ``state_dict``, and in the header's
metadata, under ``normwise.fold``, JSON that says what a model of the unfolded class must become
before they fit::

    {"version": 1, "model": "Net",
     "structure": {"biases": [...], "borders": {...}, "norms": [...], "neutral": [...]},
     "dtypes": {"conv.weight": "float32", ...}, "aliases": {"head.weight": "embed.weight"},
     "training": ["norm.that.was.left.in.training.mode"]}

One file, so that one rename puts both in place: weights and structure cannot be of two versions.

A file is data. Nothing in it is evaluated or imported; every name and shape is held against the
model before a tensor is read, so a reader never needs more memory than the model itself, its copy
and the tensors of that model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from normwise.activations import parse
from normwise.errors import InputError, MissingDependencyError, NormwiseError, message
from normwise.files import write_atomically
from normwise.graph.edits import Edits, NormEdit, apply
from normwise.graph.modules import BORDERED
from normwise.graph.norms import is_norm
from normwise.graph.run import copy_of

__all__ = ["load_folded", "package", "save_folded"]

KEY, VERSION = "normwise.fold", 1
# The header may be this long for a model of n modules and tensors. Measured: 42 bytes for each of
# them on ResNets of 50 and 101 layers; names may be long. Parsed JSON takes up to 24 times its
# length (empty objects in a list), which is what is bounded here.
HEADER, HEADER_EACH = 2**16, 2**11
# The dtypes that a file may hold, and what safetensors calls them.
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
KINDS = ("identity", "tail", "affine")

M = TypeVar("M", bound=nn.Module)


def package(name: str) -> Any:
    """The module ``name`` of the ``export`` extra."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            message(
                f"saving in this format needs {name.partition('.')[0]}",
                f"a Python that cannot import it ({error})",
                'pip install "normwise[export]"',
            )
        ) from error


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, owner, name there, tensor) of parameters and buffers, also those held twice."""
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None:
                    yield f"{path}.{name}".lstrip("."), module, name, t


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _to_save(model: nn.Module, extra: list[str]) -> dict[str, Tensor]:
    """What the state dict holds, and of the rest what the fold changed."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not dense or value.dtype not in CODES:
            raise InputError(
                message(
                    "a folded model is saved as dense tensors of common dtypes",
                    f"{name}, which is {getattr(value, 'dtype', type(value).__name__)}",
                    "torch.save(result.model) for models with other state",
                )
            )
        tensors[name] = value
    everything = {name: t for name, _, _, t in _named_tensors(model)}
    tensors.update({name: everything[name] for name in extra if name in everything})
    return tensors


def save_folded(model: nn.Module, structure: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``model``, which :func:`normwise.fold` gave the changes ``structure``, to one file.

    Raises:
        MissingDependencyError: without safetensors.
        InputError: if the model's state is not all dense tensors.
        OutputError: if the file cannot be written; what was there stays.
    """
    library = package("safetensors.torch")
    tensors = _to_save(model, structure["neutral"])
    first: dict[int, str] = {}
    aliases = {}
    for name, t in tensors.items():
        if first.setdefault(id(t), name) != name:
            aliases[name] = first[id(t)]
    config = {
        "version": VERSION,
        "model": type(model).__qualname__,
        "structure": structure,
        "dtypes": {n: str(t.dtype).removeprefix("torch.") for n, _, _, t in _named_tensors(model)},
        "aliases": aliases,
        "training": [p for p, m in model.named_modules() if m.training],
    }
    # Two names for one memory would be written once and read as one: views get memory of their own.
    held: set[int] = set()
    own = {}
    for name, t in tensors.items():
        if name not in aliases:
            plain = t.detach().cpu().contiguous()
            own[name] = plain.clone() if _storage(plain) in held else plain
            held.add(_storage(own[name]))
    data = library.save(own, {KEY: json.dumps(config)})
    write_atomically(path, lambda file: file.write(data))


def _refuse(path: str | os.PathLike[str], got: str, hint: str = "") -> NoReturn:
    raise InputError(
        message(
            f"{os.fspath(path)!r} must be a file that result.save() wrote for this model",
            got,
            hint or "the model as it was built before fold, and an intact file",
        )
    )


def _config(path: Path, model: nn.Module) -> dict[str, Any]:
    """The checked configuration: all types right, all names of the model."""
    limit = HEADER + HEADER_EACH * sum(1 for _ in (*model.modules(), *_named_tensors(model)))
    if not path.is_file():
        _refuse(path, "no file" if not path.exists() else "something else than a file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        _refuse(path, f"{type(error).__name__}: {error}")
    if length > min(limit, path.stat().st_size):
        _refuse(path, f"a header of {length} bytes")
    try:
        with package("safetensors").safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (NormwiseError, MemoryError):
        raise
    except Exception as error:  # its own SafetensorError, OSError, UnicodeError by version
        _refuse(path, f"{type(error).__name__}: {error}")
    if text is None:
        _refuse(path, f"a safetensors file without {KEY!r} in its metadata")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"metadata that is no JSON ({type(error).__name__})")
    if not isinstance(config, dict):
        _refuse(path, "metadata that is no JSON object")
    version = config.get("version")
    if version != VERSION:
        _refuse(path, f"format version {version!r}; this normwise reads {VERSION}", "a newer one")
    shape: dict[str, type] = {"structure": dict, "dtypes": dict, "aliases": dict, "training": list}
    for name, kind in shape.items():
        if not isinstance(config.get(name), kind):
            _refuse(path, f"metadata whose {name!r} is no {kind.__name__}")
    return config


def _module(path: Path, modules: Mapping[str, nn.Module], name: object) -> nn.Module:
    if not isinstance(name, str) or name not in modules:
        _refuse(path, f"changes to a module {name!r} that the model does not have")
    return modules[name]


def _norm_edit(path: Path, modules: Mapping[str, nn.Module], entry: object) -> NormEdit:
    if not isinstance(entry, dict):
        _refuse(path, "a norm that is no JSON object")
    name, kind = entry.get("path"), entry.get("kind")
    norm = _module(path, modules, name)
    if not is_norm(norm):
        _refuse(path, f"a folded batch norm {name!r}, where the model has a {type(norm).__name__}")
    if kind not in KINDS:
        _refuse(path, f"a change of kind {kind!r} to {name!r}")
    activation = entry.get("activation")
    try:
        parse("none" if activation is None else activation)
    except Exception as error:
        _refuse(path, f"an activation {activation!r} ({type(error).__name__})")
    axis, features = entry.get("channel_dim"), entry.get("features")
    if type(axis) is not int or not -8 <= axis <= 8:
        _refuse(path, f"a channel axis {axis!r}")
    if kind == "affine" and (type(features) is not int or features != norm.num_features):
        _refuse(path, f"{features!r} channels of {name!r}, which has {norm.num_features}")
    number = None
    if kind == "affine":
        number = torch.zeros(int(norm.num_features), dtype=torch.float64)  # type: ignore[arg-type] # an int
    return NormEdit(str(name), kind, activation, axis, number, number)


def _edits(path: Path, model: nn.Module, structure: Mapping[str, Any]) -> Edits:
    """The changes of the file, with zeros for numbers; shapes are the model's own."""
    lists = (structure.get("biases"), structure.get("norms"), structure.get("neutral"))
    borders = structure.get("borders")
    if not all(isinstance(part, list) for part in lists) or not isinstance(borders, dict):
        _refuse(path, "a structure that is not one of result.save()")
    modules = dict(model.named_modules(remove_duplicate=False))
    edits = Edits()
    for name in structure["biases"]:
        module = _module(path, modules, name)
        weight = module._parameters.get("weight")
        if module._parameters.get("bias", module) is not None or weight is None:
            _refuse(path, f"a new bias for {name!r}, which has one or has no place for it")
        channels = getattr(module, "out_channels", getattr(module, "out_features", 0))
        edits.biases[name] = torch.zeros(channels, dtype=torch.float64)
    for name in borders:
        module = _module(path, modules, name)
        if type(module) not in BORDERED:
            _refuse(path, f"a border for {name!r}, which is {type(module).__name__}")
        kernel, channels = tuple(module.kernel_size), module.out_channels  # type: ignore[arg-type] # of convolutions
        size = (1, channels) if getattr(module, "transposed", False) else (channels, 1)
        edits.borders[name] = torch.zeros(*size, *kernel, dtype=torch.float64)
    edits.norms = [_norm_edit(path, modules, entry) for entry in structure["norms"]]
    changed = [e.path for e in edits.norms]
    if len(set(changed)) != len(changed):
        _refuse(path, "two changes to one batch norm")
    return edits


@torch.no_grad()
def _set_dtypes(path: Path, model: nn.Module, dtypes: Mapping[str, Any]) -> None:
    tensors = {name: t for name, _, _, t in _named_tensors(model)}
    if dtypes.keys() != tensors.keys():
        odd = sorted(map(str, dtypes.keys() ^ tensors.keys()))
        _refuse(path, f"tensors of another model: {', '.join(odd[:5])}")
    for name, t in tensors.items():
        dtype = DTYPES.get(dtypes[name]) if isinstance(dtypes[name], str) else None
        if dtype is None or (dtype != t.dtype and not (dtype.is_floating_point and _floats(t))):
            _refuse(path, f"dtype {dtypes[name]!r} of {name}, which is {t.dtype}")
        if dtype != t.dtype:
            t.data = t.data.to(dtype)  # in place: a tied weight stays tied


def _floats(t: Tensor) -> bool:
    return t.is_floating_point()


def _check_tensors(
    path: Path, file: Any, wanted: Mapping[str, Tensor], aliases: Mapping[str, Any]
) -> None:
    """The names and shapes in the file are those of the model, before one tensor is read."""
    held = set(file.keys())
    for name, source in aliases.items():
        known = isinstance(source, str) and source in held and name in wanted
        if not known or wanted[name] is not wanted.get(source):
            _refuse(path, f"{name} as another name of {source!r}, which it is not in the model")
    odd = sorted((held | aliases.keys()) ^ wanted.keys())
    if odd:
        _refuse(path, f"tensors of another model: {', '.join(odd[:5])}")
    for name in held:
        part, like = file.get_slice(name), wanted[name]
        if list(part.get_shape()) != list(like.shape):
            _refuse(path, f"{name} of shape {list(part.get_shape())}, which is {list(like.shape)}")
        if part.get_dtype() != CODES.get(like.dtype):
            _refuse(path, f"{name} as {part.get_dtype()}, which is {like.dtype}")


def load_folded(model: M, path: str | os.PathLike[str]) -> M:
    """A model as :meth:`FoldResult.save` saved it: folded, without folding again.

    Args:
        model: an instance of the unfolded model, as its class builds it; left as it was. Its
            weights do not matter, its device is kept, its dtypes become those that were saved.
        path: the file. It may come from anyone: nothing in it runs, and all of it is held against
            ``model`` before its tensors are read.

    Returns:
        A folded copy of ``model``, in eval mode, that computes what the saved one computed.

    Raises:
        InputError: if the file is truncated, is none of :meth:`FoldResult.save`, or belongs to
            another model; also if ``model`` is on the meta device.
        MissingDependencyError: without safetensors.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise.graph import fold, load_folded
        >>> net = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> x = torch.randn(2, 3, 9, 9)
        >>> result = fold(net(), x, seconds=0)
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> result.save(file)
        >>> torch.equal(load_folded(net(), file)(x), result.model(x))
        True
    """
    path = Path(path)
    if any(t.is_meta for _, _, _, t in _named_tensors(model)):
        raise InputError(
            message(
                "load_folded takes a model with memory",
                "one on the meta device",
                "model.to_empty(device='cpu'), or build it outside torch.device('meta')",
            )
        )
    config = _config(path, model)
    edits = _edits(path, model, config["structure"])
    folded = apply(edits, copy_of(model).eval())
    _set_dtypes(path, folded, config["dtypes"])
    # keep_vars: two names of one tensor are seen to be one.
    wanted = folded.state_dict(keep_vars=True)
    extra = {n: t for n, _, _, t in _named_tensors(folded) if n not in wanted}
    extra = {n: t for n, t in extra.items() if n in config["structure"]["neutral"]}
    modules = dict(folded.named_modules(remove_duplicate=False))
    with package("safetensors").safe_open(os.fspath(path), framework="pt") as file:
        _check_tensors(path, file, {**wanted, **extra}, config["aliases"])
        for name in config["training"]:
            if not isinstance(name, str) or name not in modules:
                _refuse(path, f"a module {name!r} that the model does not have")
            modules[name].training = True
        # The state dict of the folded model itself, so that it carries its modules' versions.
        for name in wanted:
            wanted[name] = file.get_tensor(config["aliases"].get(name, name))
        folded.load_state_dict(wanted)
        with torch.no_grad():
            for name, t in extra.items():
                t.copy_(file.get_tensor(name))
    return folded  # type: ignore[return-value] # a copy of model
