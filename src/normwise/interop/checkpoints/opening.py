"""From a path to an open checkpoint."""

from __future__ import annotations

import os

from normwise.interop.checkpoints.checkpoint import Checkpoint, Content
from normwise.interop.checkpoints.folders import INDEX, Sharded, file_in
from normwise.interop.checkpoints.single import open_single

__all__ = ["open_checkpoint"]


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
    given = os.fsdecode(path)
    found = file_in(given) if os.path.isdir(given) else given
    content: Content
    if found.endswith(INDEX):
        content = Sharded(found)
        return Checkpoint(given, content.format, content)
    content = single = open_single(found)
    return Checkpoint(given, single.format, content)
