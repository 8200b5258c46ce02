"""A run that was killed goes on where it was: its state in a file, written whole, read warily."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import InputError, message
from normwise.files import write_atomically
from normwise.moments import Moments
from normwise.tools.recalibrate.collect import Pool
from normwise.tools.recalibrate.feed import tensors_of
from normwise.tools.recalibrate.layers import Layer, Statistics
from normwise.tools.recalibrate.metric import Average
from normwise.tools.recalibrate.transaction import RandomState

__all__ = ["Checkpoint", "State", "digest", "fingerprint"]

_FORMAT = "normwise.recalibrate 1"
# Writing takes a twentieth of the time at most: on a slow disk it comes less often.
_SHARE = 20


@dataclass
class State:
    """Where a run is: in pass ``step``, after ``batches`` of it.

    statistics: of the layers during this pass. pools, order, reused, average: of this pass so far.
    last: the digest of the last batch. start, now: random states. loop: what passes before left.
    """

    step: int
    batches: int
    last: int
    statistics: dict[str, Statistics]
    pools: dict[str, Pool]
    order: list[str]
    reused: list[str]
    average: Average
    start: RandomState
    now: RandomState
    loop: dict[str, Any]


def _bytes(t: Tensor) -> Any:
    flat = t.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def digest(batch: Any) -> int:
    """A checksum of a batch's tensors, to know it again."""
    crc = 0
    for t in tensors_of(batch):
        crc = zlib.crc32(_bytes(t), zlib.crc32(str(tuple(t.shape)).encode(), crc))
    return crc


def fingerprint(model: nn.Module, layers: list[Layer], settings: Mapping[str, Any]) -> str:
    """Of all that decides the result, but for the data: the weights, the layers, the settings."""
    sha = hashlib.sha256(_FORMAT.encode())
    sha.update(repr(sorted(settings.items())).encode())
    for layer in layers:
        sha.update(f"{layer.name} {type(layer.module).__name__} {layer.module.eps!r}\n".encode())
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        if t.device.type != "meta":
            sha.update(_bytes(t))
    return sha.hexdigest()


def _moments(m: Moments | None) -> list[Tensor] | None:
    return None if m is None else [m.count, m.mean, m.m2]


def _to_plain(state: State) -> dict[str, Any]:
    return {
        **{k: getattr(state, k) for k in ("step", "batches", "last", "order", "reused", "loop")},
        "statistics": {name: list(s) for name, s in state.statistics.items()},
        "pools": {
            name: [_moments(p.seen), _moments(p.given), p.batches, p.nonfinite, p.rounding]
            for name, p in state.pools.items()
        },
        "average": [state.average.sums, state.average.weight],
        "start": state.start.to_plain(),
        "now": state.now.to_plain(),
    }


def _from_plain(plain: dict[str, Any], layers: list[Layer]) -> State:
    statistics, pools = {}, {}
    for layer in layers:
        like = layer.read().mean
        if plain["statistics"]:
            mean, var, tracked = plain["statistics"][layer.name]
            if not mean.shape == var.shape == like.shape:
                raise ValueError(f"statistics of layer {layer.name!r} have another shape")
            statistics[layer.name] = Statistics(mean.to(like), var.to(like), int(tracked))
        seen, given, batches, nonfinite, rounding = plain["pools"][layer.name]
        seen, given = (
            None if m is None else Moments(*m).to(like.device, like.dtype) for m in (seen, given)
        )
        if any(m is not None and m.mean.shape != like.shape for m in (seen, given)):
            raise ValueError(f"moments of layer {layer.name!r} have another shape")
        pools[layer.name] = Pool(seen, given, batches, nonfinite and tuple(nonfinite), rounding)
    return State(
        **{k: plain[k] for k in ("step", "batches", "last", "order", "reused", "loop")},
        statistics=statistics,
        pools=pools,
        average=Average(*plain["average"]),
        start=RandomState.from_plain(plain["start"]),
        now=RandomState.from_plain(plain["now"]),
    )


class Checkpoint:
    """The file of one rank.

    Raises:
        InputError: in :meth:`read`, for a file that is none, is damaged, is of another run or of
            one that ended.
        OutputError: in :meth:`write`.
    """

    def __init__(self, path: str | os.PathLike[str], identity: str, rank: int, ranks: int) -> None:
        name = os.fspath(path)
        self.path = Path(name if ranks == 1 else f"{name}.rank{rank}")
        self.identity = identity
        self._due = 0.0

    def read(self, layers: list[Layer]) -> State | None:
        """What the file holds; None if there is none."""
        if not self.path.exists():
            return None
        shown = repr(str(self.path))
        try:
            # weights_only: tensors and numbers; a file from elsewhere cannot run code.
            plain = torch.load(self.path, map_location="cpu", weights_only=True)
            if plain["format"] != _FORMAT:
                raise ValueError(f"format {plain['format']!r}")
            same, finished = plain["fingerprint"] == self.identity, bool(plain["finished"])
            state = _from_plain(plain["state"], layers) if same and not finished else None
        except Exception as error:  # torch.load raises what a damaged file makes it trip over
            raise InputError(
                message(
                    "checkpoint= names a file that recalibrate wrote, or none yet",
                    f"{shown} ({type(error).__name__}: {error})",
                    "another path, or removing the file to start anew",
                )
            ) from error
        if not same:
            raise InputError(
                message(
                    "a checkpoint belongs to one model and one way to recalibrate it",
                    f"{shown}, written for other weights, layers, ranks, mode, blend or batches",
                    "the same call with the same model, another path, or removing the file",
                )
            )
        if finished:
            raise InputError(
                message(
                    "a checkpoint is there to go on from",
                    f"{shown}, of a run that ended well",
                    "removing the file to recalibrate once more",
                )
            )
        return state

    def due(self) -> bool:
        return time.monotonic() >= self._due

    def write(self, state: State) -> None:
        self._save({"state": _to_plain(state), "finished": False})

    def finish(self) -> None:
        """Only that it ended: the result is the caller's to save."""
        self._save({"state": None, "finished": True})

    def _save(self, content: dict[str, Any]) -> None:
        begin = time.monotonic()
        whole = {"format": _FORMAT, "fingerprint": self.identity, **content}
        write_atomically(self.path, lambda file: torch.save(whole, file))
        end = time.monotonic()
        self._due = end + _SHARE * (end - begin)
