"""Folders of Hugging Face: which file of it is the model, and models in several files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice

from torch import Tensor

from normwise.interop.checkpoints.file import Region, open_file, refuse
from normwise.interop.checkpoints.grouping import NormPlan
from normwise.interop.checkpoints.limits import DESCRIPTION, NAME, SHARDS, parse_json, shown
from normwise.interop.checkpoints.neighbours import neighbour
from normwise.interop.checkpoints.single import SUFFIXES, Single, open_single
from normwise.interop.checkpoints.tensors import TensorInfo

__all__ = ["INDEX", "Sharded", "file_in"]

INDEX = ".index.json"
STEMS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors",
         "diffusion_pytorch_model.bin")  # fmt: skip
ENTRIES = 10_000  # of a folder; one that has more is no model


def file_in(folder: str) -> str:
    """The file that holds the folder's model, or the index of the files that do."""
    for stem in STEMS:
        for name in (stem + INDEX, stem):
            if os.path.lexists(found := os.path.join(folder, name)):
                return found
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, ENTRIES))
    except OSError as error:
        refuse(folder, f"{type(error).__name__}: {error}", "a folder that this user can read")
    models = [name for name in names if name.lower().endswith(SUFFIXES)]
    if len(models) == 1:
        return os.path.join(folder, models[0])
    some = ", ".join(shown(name) for name in models[:4]) or "no checkpoint"
    refuse(folder, f"a folder with {some}", "the path of one file, or a folder with one of "
           + ", ".join(STEMS[:2]))  # fmt: skip


class Sharded:
    """A model in several files, by its index. One file at a time is open."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: Single | None = None
        self.format = "sharded"
        self._shard_of = self._index(open_file(path))
        try:
            self.tensors: Mapping[str, TensorInfo] = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, TensorInfo]:
        names: dict[str, list[str]] = {}
        for name, shard in self._shard_of.items():
            names.setdefault(shard, []).append(name)
        if len(names) > SHARDS:
            refuse(self._path, f"an index of {len(names)} files", "an index of one model")
        found: dict[str, TensorInfo] = {}
        for shard, wanted in names.items():
            tensors = self._shard(shard).tensors
            for name in wanted:
                if name not in tensors:
                    refuse(
                        self._path,
                        f"an index that has {shown(name)} in {shown(shard)}, which does not",
                        "the index and the files of one download",
                    )
                found[name] = TensorInfo(tensors[name].shape, tensors[name].dtype)
        return {name: found[name] for name in self._shard_of}

    def _index(self, file: Region) -> dict[str, str]:
        try:
            content = parse_json(file.read(0, min(file.size, DESCRIPTION + 1)))
            places = content.get("weight_map")
        except ValueError as error:
            file.refuse(f"an index that cannot be read ({shown(str(error), 200)})")
        finally:
            file.close()
        if not isinstance(places, dict) or not places:
            file.refuse("JSON without a weight_map, which says where each tensor is")
        for name, shard in places.items():
            if not isinstance(shard, str) or "/" in shard or len(name) > NAME:
                file.refuse(f"an index that has {shown(name)} in {shown(shard)}, no file's name")
        return places

    def _shard(self, shard: str) -> Single:
        path = neighbour(self._path, shard)
        if self._open is None or self._open.file.path != path:
            self.close()
            self._open = open_single(path)
        return self._open

    def load(self, name: str) -> Tensor:
        single = self._shard(self._shard_of[name])
        if name not in single.tensors:
            refuse(self._path, f"a file that no longer has {shown(name)}", "opening it again")
        return single.load(name)

    def plans(self) -> list[NormPlan] | None:
        return None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
