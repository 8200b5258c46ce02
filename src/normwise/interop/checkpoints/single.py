"""One file: which format it is in, by what it starts with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from normwise.errors import NormwiseError
from normwise.interop.checkpoints.archive import Archive
from normwise.interop.checkpoints.exported import is_exported, read_exported
from normwise.interop.checkpoints.file import INTACT, Region, open_file
from normwise.interop.checkpoints.grouping import NormPlan
from normwise.interop.checkpoints.limits import shown
from normwise.interop.checkpoints.onnx_file import read_onnx
from normwise.interop.checkpoints.pickle_file import read_legacy, read_torch_archive
from normwise.interop.checkpoints.safetensors_file import looks_like_safetensors, read_safetensors
from normwise.interop.checkpoints.tensors import Stored

__all__ = ["KNOWN", "SUFFIXES", "Single", "open_single"]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
SUFFIXES = (*PICKLES, ".safetensors", ".onnx", ".pt2")
TAR = slice(257, 262)
KNOWN = "a .safetensors, .pt, .pth, .bin, .onnx or .pt2 file, or a folder of Hugging Face"
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


@dataclass(frozen=True)
class Single:
    """The tensors of one file."""

    format: str
    file: Region
    tensors: Mapping[str, Stored]
    known: list[NormPlan] | None = None

    def load(self, name: str) -> Tensor:
        return self.tensors[name].load(name)

    def plans(self) -> list[NormPlan] | None:
        return self.known

    def close(self) -> None:
        self.file.close()


def _read(file: Region) -> Single:
    head = bytes(file.read(0, min(file.size, 512)))
    suffix = os.path.splitext(file.path)[1].lower()
    if looks_like_safetensors(head):  # first: a header of 35,615 bytes starts as gzip does
        return Single("safetensors", file, read_safetensors(file))
    for start, (what, hint) in FOREIGN.items():
        if head[: len(start)].lower() == start.lower():
            file.refuse(what, hint)
    if head[TAR.start : TAR.stop] == b"ustar":  # as torch 0.1 saved; "net.pth.tar" seldom is one
        file.refuse("a tar archive", "unpacking it first")
    if head.startswith(b"PK\x03\x04"):
        archive = Archive(file)
        if is_exported(archive):
            return Single("exported", file, *read_exported(archive))
        if "data.pkl" in archive:
            return Single("pickle", file, read_torch_archive(archive))
        inside = next(iter(archive.names()), "")
        file.refuse(
            f"a zip archive of other things, such as {shown(inside)}",
            "unpacking it, and a file that was in it",
        )
    if suffix == ".onnx":
        return Single("onnx", file, *read_onnx(file))
    if suffix == ".safetensors":
        return Single("safetensors", file, read_safetensors(file))
    if head.startswith(b"\x80") or suffix in PICKLES:
        return Single("pickle", file, read_legacy(file))
    file.refuse(f"a file that starts with {shown(head, 16)}", KNOWN, f"a checkpoint is {KNOWN}")


def open_single(path: str) -> Single:
    """The file at ``path``, open, its tensors known and none of them read.

    Raises:
        CheckpointError: whatever it is that comes.
    """
    file = open_file(path)
    try:
        return _read(file)
    except BaseException as error:
        file.close()
        if isinstance(error, NormwiseError) or not isinstance(error, Exception):
            raise
        # A reader tripped over something that no check foresaw: to the caller a damaged file.
        file.refuse(f"a file that trips its reader ({type(error).__name__}: {shown(str(error))})")
