"""From what a file holds to one state dict: which of its dictionaries, under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from normwise.interop.checkpoints.limits import DEPTH, NAME, TENSORS, is_size, shown

__all__ = ["state_dict_of", "without_prefix"]

# Under which key training programs keep the model, beside optimizers and epochs. The first one that
# holds tensors is taken: weights that are trained come before their moving average.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network",
    "weights", "params", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "ema",
)  # fmt: skip
NOT_MODELS = ("optim", "scheduler", "scaler", "loss_scaler")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and its kin, of torch.compile

T = TypeVar("T")


def _flat(root: Any, kind: type[T], refuse: Callable[[str], Any]) -> Iterator[tuple[str, T]]:
    """(dotted name, tensor). Each container once: 1 kB of references can be a tree of 2**60."""
    seen, found = {id(root)}, 0
    todo = [("", root, 0)]
    while todo:
        path, container, depth = todo.pop()
        inner = []
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in pairs:
            leaf = isinstance(value, kind)
            if not leaf and (not isinstance(value, (dict, list, tuple)) or id(value) in seen):
                continue
            if not isinstance(key, str) and not is_size(key):
                continue
            text = str(key)
            if not path and text.lower().startswith(NOT_MODELS):
                continue
            name = f"{path}.{text}" if path else text
            if len(name) > NAME:
                refuse(f"a name of {len(name)} letters, {shown(name)}")
            if leaf:
                found += 1
                if found > TENSORS:
                    refuse(f"more than {TENSORS} tensors")
                yield name, value
            elif depth < DEPTH:
                seen.add(id(value))
                inner.append((name, value, depth + 1))
        todo.extend(reversed(inner))


def _unwrapped(root: Any, kind: type[T], refuse: Callable[[str], Any]) -> Any:
    for _ in range(3):  # {'model': {'state_dict': …}} has been seen
        if type(root) is not dict or any(isinstance(v, kind) for v in root.values()):
            return root
        for key in WRAPPERS:
            inner = root.get(key)
            if isinstance(inner, dict) and next(_flat(inner, kind, refuse), None) is not None:
                root = inner
                break
        else:
            return root
    return root


def without_prefix(names: Sequence[str]) -> dict[str, str]:
    """Name in the file by name without what wrappers put before all of them.

    ``n_averaged`` stands beside ``module.`` in :class:`torch.optim.swa_utils.AveragedModel`.
    """
    short = {name: name for name in names}
    for prefix in PREFIXES * 2:
        own = [name for name in short if name != "n_averaged"]
        if own and all(name.startswith(prefix) and len(name) > len(prefix) for name in own):
            cut = {name.removeprefix(prefix): full for name, full in short.items()}
            short = cut if len(cut) == len(short) else short
    return short


def state_dict_of(root: Any, kind: type[T], refuse: Callable[[str], Any]) -> dict[str, T]:
    """The tensors (objects of ``kind``) of the model in ``root``, by name."""
    if isinstance(root, kind):
        return {"tensor": root}
    if not isinstance(root, (dict, list, tuple)):
        return {}
    root = _unwrapped(root, kind, refuse)
    tensors: dict[str, T] = {}
    for name, value in _flat(root, kind, refuse):
        tensors.setdefault(name, value)
    return tensors
