"""Checkpoints of any format, read for their norms without trusting the file.

``file`` reads bytes, ``limits`` says how many, ``tensors`` makes tensors of them. A format each:
``safetensors_file``, ``pickle_file`` and ``exported`` (on ``archive``, ``pickles``, ``globals``),
``onnx_file`` (on ``protobuf``); ``single`` tells them apart, ``folders`` has what comes in several
files. ``state_dicts`` finds the model in what was saved, ``grouping`` the norms in its names.
"""

from normwise.interop.checkpoints.checkpoint import Checkpoint, StoredNorm, group_norms
from normwise.interop.checkpoints.opening import open_checkpoint
from normwise.interop.checkpoints.tensors import TensorInfo

__all__ = ["Checkpoint", "StoredNorm", "TensorInfo", "group_norms", "open_checkpoint"]
