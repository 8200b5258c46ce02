"""A checkpoint written again with some of its tensors replaced; all else is as it was.

Of a safetensors file the bytes are copied, in pieces, so memory does not depend on its size. A file
of torch.save is loaded whole, by ``torch.load(weights_only=True)``, which runs no code either.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn, TypeVar

import torch
from torch import Tensor

from normwise.errors import InputError, message
from normwise.files import write_atomically
from normwise.interop.checkpoints.file import Region, refuse
from normwise.interop.checkpoints.folders import INDEX, file_in
from normwise.interop.checkpoints.limits import parse_json
from normwise.interop.checkpoints.safetensors_file import CODES
from normwise.interop.checkpoints.single import Single, open_single
from normwise.interop.checkpoints.state_dicts import state_dict_of, without_prefix

__all__ = ["replaced", "rewrite"]

_PIECE = 16 << 20
_CODE_OF = {name: code for code, name in CODES.items()}

T = TypeVar("T")


def rewrite(
    path: str | os.PathLike[str], output: str | os.PathLike[str], tensors: Mapping[str, Tensor]
) -> None:
    """Write the checkpoint at ``path`` to ``output``, in its own format, with ``tensors`` (by name,
    as :func:`~normwise.interop.checkpoints.open_checkpoint` calls them) in place of its own.

    Other tensors, their order, metadata and what else a file of torch.save holds stay. ``output``
    may be ``path``: the file is whole at every moment.

    Raises:
        InputError: if the format is not safetensors or torch.save's, ``output`` is named like
            another one, or a name is not in the file.
        CheckpointError: if ``path`` cannot be read.
        OutputError: if ``output`` cannot be written.
    """
    given = os.fsdecode(path)
    found = file_in(given) if os.path.isdir(given) else given
    if found.endswith(INDEX):
        _cannot(given, "a folder of several files", "the one of its files that holds the layer")
    single = open_single(found)
    try:
        if single.format not in ("safetensors", "pickle"):
            _cannot(given, f"one in the format {single.format!r}", "the model it came from")
        _fitting(output, single.format)
        full = without_prefix(list(single.tensors))
        unknown = [name for name in tensors if name not in full]
        if unknown:
            _cannot(given, f"one without {unknown[0]!r}", "names from the check of this file")
        new = {full[name]: t.detach().cpu().contiguous() for name, t in tensors.items()}
        if single.format == "safetensors":
            write_atomically(output, lambda file: _safetensors(single, new, file))
        else:
            root = _load(found, new)
            write_atomically(output, lambda file: torch.save(root, file))
    finally:
        single.close()


def _cannot(path: str, got: str, hint: str) -> NoReturn:
    invariant = f"{path!r} can be written again if it is a safetensors file or one of torch.save"
    raise InputError(message(invariant, got, hint))


def _fitting(output: str | os.PathLike[str], format: str) -> None:
    """Nobody looks into a file that ends in .safetensors for a pickle, or the other way round."""
    suffix = os.path.splitext(os.fsdecode(output))[1].lower()
    if (suffix == ".safetensors") != (format == "safetensors") or suffix in (".onnx", ".pt2"):
        raise InputError(
            message(
                "output is named after the format of the checkpoint, which it keeps",
                f"{os.fsdecode(output)!r} for {format}",
                "a name in .safetensors" if format == "safetensors" else "a name in .pt",
            )
        )


def _safetensors(single: Single, new: Mapping[str, Tensor], out: BinaryIO) -> None:
    file = single.file
    length = int.from_bytes(file.read(0, 8), "little")
    header: dict[str, Any] = parse_json(file.read(8, length))
    body = file.part(8 + length, file.size - 8 - length, "the tensors")
    places = {
        n: (e["data_offsets"][0], e["data_offsets"][1])
        for n, e in header.items()
        if n != "__metadata__"
    }
    order = sorted(places, key=lambda name: places[name])
    at = 0
    for name in order:
        begin, end = places[name]
        size = end - begin
        if name in new:
            t = new[name]
            header[name] |= {"dtype": _CODE_OF[str(t.dtype).removeprefix("torch.")]}
            header[name] |= {"shape": list(t.shape)}
            size = t.nbytes
        header[name]["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors; aligned ones need no copy
    out.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        if name in new:
            out.write(new[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            _copy(body, places[name], out)


def _copy(body: Region, place: tuple[int, int], out: BinaryIO) -> None:
    begin, end = place
    for at in range(begin, end, _PIECE):
        out.write(body.read(at, min(_PIECE, end - at)))


def _load(path: str, new: Mapping[str, Tensor]) -> Any:
    try:
        root = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes: it reads less than the reader of norms
        first = str(error).partition("\n")[0]
        refuse(
            path,
            f"a pickle that torch.load(weights_only=True) does not read ({first})",
            "saving its state dict alone",
        )
    return replaced(root, new)


def replaced(root: T, new: Mapping[str, Tensor]) -> T:
    """``root``, a state dict or what holds one, with the tensors of these names replaced in all
    places where they stand; containers on the way are copied, with their attributes."""

    def refuse_(got: str) -> NoReturn:
        raise InputError(message("a state dict maps names to tensors", got, "model.state_dict()"))

    flat = state_dict_of(root, Tensor, refuse_)
    missing = [name for name in new if name not in flat]
    if missing:
        refuse_(f"one without {missing[0]!r}")
    by_id = {id(flat[name]): t for name, t in new.items()}
    result: T = _with(root, by_id, {})
    return result


def _with(value: Any, by_id: Mapping[int, Tensor], done: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in done:
        # Of an OrderedDict the copy has the attributes: _metadata, the versions of modules.
        done[id(value)] = held = copy.copy(value)
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            held[key] = _with(inner, by_id, done)
    return done[id(value)]
