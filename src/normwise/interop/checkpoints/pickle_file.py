"""Files of torch.save: zip archives (1.6 and later), their predecessor, and TorchScript's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normwise.interop.checkpoints.archive import Archive
from normwise.interop.checkpoints.file import Region
from normwise.interop.checkpoints.globals import PickledTensor, Storage
from normwise.interop.checkpoints.limits import shown
from normwise.interop.checkpoints.pickles import Machine, stream_of
from normwise.interop.checkpoints.state_dicts import state_dict_of
from normwise.interop.checkpoints.tensors import Stored

__all__ = ["read_legacy", "read_torch_archive"]

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's


def _stored(
    root: Any, file: Region, region_of: Callable[[Storage], Region | None], order: str
) -> dict[str, Stored]:
    def refuse(got: str) -> None:
        file.refuse(got, "a file that holds one model's state dict")

    regions: dict[str, Region | None] = {}
    tensors = {}
    for name, found in state_dict_of(root, PickledTensor, refuse).items():
        storage = found.storage
        if found.dtype is None or storage.dtype is None:
            continue  # quantized: no norm, and no dtype of a plain tensor
        if storage.key not in regions:
            regions[storage.key] = region_of(storage)
        region = regions[storage.key]
        if region is None or storage.numel * storage.dtype.itemsize > region.size:
            file.refuse(f"{shown(name)} whose storage is missing or cut short")
        tensors[name] = Stored(
            found.shape, found.dtype, region, found.strides, found.offset, order
        ).checked(name)
    if not tensors:
        file.refuse("a pickle without tensors", "a file that torch.save wrote of a state dict")
    return tensors


def read_torch_archive(archive: Archive) -> dict[str, Stored]:
    """The tensors of a zip with a ``data.pkl``; none is read."""
    order = archive.text("byteorder") or "little"
    if order not in ("little", "big"):
        archive.file.refuse(f"an archive in the byte order {shown(order)}")
    description = archive.region("data.pkl")
    root = Machine(stream_of(description), description).run()

    def region_of(storage: Storage) -> Region | None:
        name = f"data/{storage.key}"
        return archive.region(name) if name in archive else None

    return _stored(root, archive.file, region_of, order)


def read_legacy(file: Region) -> dict[str, Stored]:
    """The format before torch 1.6: five pickles, then each storage behind its length."""
    stream = stream_of(file)

    def following() -> Any:
        return Machine(stream, file).run()

    head = following()
    if head != MAGIC or type(head) is not int:
        # A pickle from elsewhere: what it wants to call has been refused by name already.
        return _stored(head, file, lambda _: None, "little")
    if (protocol := following()) != PROTOCOL:
        file.refuse(f"a torch.save file of protocol {shown(protocol)}", "saving it with torch 1.6+")
    system, root, keys = following(), following(), following()
    little = not isinstance(system, dict) or system.get("little_endian", True) is not False
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        file.refuse("a torch.save file without the list of its storages")
    items: dict[str, int] = {}
    for storage in _storages(root):
        if storage.dtype is not None:
            items[storage.key] = storage.dtype.itemsize
    order = "little" if little else "big"
    at = stream.tell()
    regions: dict[str, Region] = {}
    for key in keys:
        n = int.from_bytes(file.read(at, 8, "the length of a storage"), order, signed=True)  # type: ignore[arg-type] # one of two
        if key not in items:
            break  # of unknown element size: what follows it cannot be found
        regions[key] = file.part(at + 8, n * items[key], f"the storage {shown(key)}")
        at += 8 + n * items[key]
    return _stored(root, file, lambda storage: regions.get(storage.key), order)


def _storages(root: Any) -> list[Storage]:
    """All storages in what a pickle made, each container once."""
    found, seen, todo = [], {id(root)}, [root]
    while todo:
        value = todo.pop()
        if isinstance(value, PickledTensor):
            found.append(value.storage)
            continue
        inner = value.values() if isinstance(value, dict) else value
        for child in inner if isinstance(value, (dict, list, tuple)) else ():
            if isinstance(child, (dict, list, tuple, PickledTensor)) and id(child) not in seen:
                seen.add(id(child))
                todo.append(child)
    return found
