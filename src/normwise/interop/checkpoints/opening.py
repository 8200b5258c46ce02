"""Which format a path is in, by what the file starts with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from normwise.errors import NormwiseError
from normwise.interop.checkpoints.archive import Archive
from normwise.interop.checkpoints.checkpoint import Checkpoint
from normwise.interop.checkpoints.file import INTACT, Region, open_file, refuse
from normwise.interop.checkpoints.grouping import NormPlan
from normwise.interop.checkpoints.limits import shown
from normwise.interop.checkpoints.pickle_file import read_legacy, read_torch_archive
from normwise.interop.checkpoints.safetensors_file import looks_like_safetensors, read_safetensors
from normwise.interop.checkpoints.state_dicts import without_prefix
from normwise.interop.checkpoints.tensors import Stored

__all__ = ["open_checkpoint"]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
# Starts of what people take for a checkpoint, and what to do about it.
FOREIGN = {
    b"\x1f\x8b": ("a gzip file", "unpacking it first"),
    b"BZh": ("a bzip2 file", "unpacking it first"),
    b"\xfd7zXZ": ("an xz file", "unpacking it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpacking it first"),
    b"\x89HDF": ("an HDF5 file, such as Keras writes", "exporting the model to ONNX"),
    b"GGUF": ("a GGUF file", "the safetensors file that it was made from"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file that it names", "git lfs pull"),
    b"<!DOCTYPE": ("a web page", "downloading the file itself, not the page about it"),
    b"<html": ("a web page", "downloading the file itself, not the page about it"),
    b"PK\x05\x06": ("an empty zip archive", INTACT),
}
KNOWN = "a .safetensors, .pt, .pth, .bin, .onnx or .pt2 file, or a folder of Hugging Face"


@dataclass(frozen=True)
class Single:
    """The tensors of one file."""

    file: Region
    tensors: Mapping[str, Stored]
    known: list[NormPlan] | None = None

    def load(self, name: str) -> Tensor:
        return self.tensors[name].load(name)

    def plans(self) -> list[NormPlan] | None:
        return self.known

    def close(self) -> None:
        self.file.close()


def _single(file: Region) -> tuple[str, Single]:
    head = bytes(file.read(0, min(file.size, 64)))
    suffix = os.path.splitext(file.path)[1].lower()
    for start, (what, hint) in FOREIGN.items():
        if head[: len(start)].lower() == start.lower():
            file.refuse(what, hint)
    if head.startswith(b"PK\x03\x04"):
        archive = Archive(file)
        if "data.pkl" in archive:
            return "pickle", Single(file, read_torch_archive(archive))
        inside = next(iter(archive.names()), "")
        file.refuse(
            f"a zip archive of other things, such as {shown(inside)}",
            "unpacking it, and a file that was in it",
        )
    if looks_like_safetensors(head) or suffix == ".safetensors":
        return "safetensors", Single(file, without_prefix(read_safetensors(file)))
    if head.startswith(b"\x80") or suffix in PICKLES:
        return "pickle", Single(file, read_legacy(file))
    file.refuse(f"a file that starts with {shown(head, 16)}", KNOWN, f"a checkpoint is {KNOWN}")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint to read its norms, without running anything that it contains.

    ``path`` is a file (safetensors; torch.save's of a state dict, also nested under ``state_dict``,
    ``model`` and the like; TorchScript; torch.export's; ONNX) or a folder of Hugging Face, shards
    included. What a file says is checked before memory is taken for it, and only tensors that are
    asked for are read.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, foreign, of an unknown version,
            or has to run code to be read.

    Example:
        >>> import os, tempfile, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "net.pt")
        >>> torch.save({"state_dict": torch.nn.BatchNorm2d(3).state_dict()}, path)
        >>> with open_checkpoint(path) as checkpoint:
        ...     [norm.running_var for norm in checkpoint.norms()]
        [tensor([1., 1., 1.])]
    """
    name = os.fspath(path)
    file = open_file(name)
    try:
        kind, content = _single(file)
        return Checkpoint(name, kind, content)
    except BaseException as error:
        file.close()
        if isinstance(error, NormwiseError) or not isinstance(error, Exception):
            raise
        # A reader tripped over something that no check foresaw: to the caller a damaged file.
        refuse(name, f"a file that trips its reader ({type(error).__name__}: {error})", INTACT)
