"""The two ways to new statistics: by the batch in one pass, and self-consistent in several."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from normwise.errors import InputError, message
from normwise.tools.recalibrate.layers import Layer, Statistics
from normwise.tools.recalibrate.passes import Pass, Passes, raise_nonfinite

__all__ = ["Outcome", "by_batch", "exact"]

# Two passes in a row that move no statistic by more end the search, where the data come in another
# order each time and so never give the same bits. In standard deviations and relative variance.
_TOLERANCE = {torch.float64: 1e-12}
_TOLERANCE_ELSE = 1e-6
_STALLS = 3


@dataclass
class Outcome:
    """New statistics, and the pass that tells of them. ``last`` was run with ``statistics`` where
    ``verified``. before, after: the metric."""

    statistics: dict[str, Statistics]
    last: Pass
    passes: int
    verified: bool
    before: dict[str, float]
    after: dict[str, float]


def _proposals(run: Passes, seen: Pass, blend: float) -> dict[str, Statistics]:
    """For the layers that saw data, and only finite ones."""
    found = {}
    for layer in run.layers:
        pool = seen.pools[layer.name]
        if pool.seen is not None and pool.values and pool.nonfinite is None:
            found[layer.name] = layer.proposal(pool.seen, pool.batches, blend)
    return found


def _check_some_ran(run: Passes, seen: Pass) -> None:
    if not seen.order:
        raise InputError(
            message(
                "one of the layers to recalibrate runs on the data at least",
                "a forward that called none of " + ", ".join(la.name for la in run.layers[:8]),
                "forward=, if it calls something else than the model",
            )
        )


def by_batch(run: Passes, blend: float) -> Outcome:
    """Every layer normalizes by the batch, as in training; its statistics are of all it saw."""
    before = run.measure("metric before") if run.metric is not None else {}
    seen = run.collect(0, by_batch=True)
    _check_some_ran(run, seen)
    run.transaction.evaluate([])
    statistics = _proposals(run, seen, blend)
    after = {}
    if run.metric is not None:
        for layer in run.layers:
            if layer.name in statistics:
                layer.write(statistics[layer.name])
        after = run.measure("metric after")
    return Outcome(statistics, seen, 1, False, before, after)


def _change(layer: Layer, old: Statistics, new: Statistics) -> float:
    """By how much the layer's map moves, beyond two roundings of its buffers."""
    if old.equals(new):
        return 0.0
    buffer = layer.module.running_var
    assert buffer is not None
    rounding = 2 * torch.finfo(buffer.dtype).eps
    var = new.var + layer.module.eps
    mean_change = ((new.mean - old.mean).abs() - rounding * new.mean.abs()).clamp(min=0)
    var_change = ((new.var - old.var).abs() - rounding * new.var).clamp(min=0)
    change = float(torch.maximum(mean_change * var.rsqrt(), var_change / var).max())
    return change if math.isfinite(change) else math.inf


def _tolerance(layer: Layer) -> float:
    buffer = layer.module.running_var
    assert buffer is not None
    return _TOLERANCE.get(buffer.dtype, _TOLERANCE_ELSE)


def exact(run: Passes, blend: float) -> Outcome:
    """Passes in eval mode until each layer sees what its statistics say.

    After pass k the layers with fewer than k norms before them are right for good, since what they
    see no longer changes: as many passes as norms depend on one another, and one that finds nothing
    to change, which is the proof. A layer that feeds itself (called several times in a row) is a
    fixed point, approached until nothing changes or nothing improves.
    """
    loop = run.loop
    if not loop:
        loop.update(step=0, near=0, stalled=0, settled=-1, residual=math.inf, before=None)
    while True:
        seen = run.collect(loop["step"], by_batch=False)
        _check_some_ran(run, seen)
        loop["step"] += 1
        metric = seen.average.values()
        if loop["before"] is None:
            loop["before"] = metric
        current = {layer.name: layer.read() for layer in run.layers}
        proposals = _proposals(run, seen, blend)
        changes = {}
        for layer in run.layers:
            if layer.name in proposals:
                changes[layer.name] = _change(
                    layer, current[layer.name], proposals[layer.name]
                ) / _tolerance(layer)
            elif seen.pools[layer.name].nonfinite is not None:
                changes[layer.name] = math.inf
        settled = _settled(run, seen, changes, current)
        if _ended(run, changes, settled, len(seen.order)):
            for name in seen.order:
                if (where := seen.pools[name].nonfinite) is not None:
                    raise_nonfinite(name, where, run.ranks.size)
            statistics = {
                name: s._replace(tracked=proposals[name].tracked)
                for name, s in current.items()
                if name in proposals
            }
            return Outcome(statistics, seen, loop["step"], True, loop["before"], metric)
        for layer in run.layers:
            if layer.name in proposals:
                layer.write(proposals[layer.name])
            elif layer.name in seen.order and not current[layer.name].finite():
                # Poisoned, and feeding itself perhaps: from where torch.nn's layers start.
                layer.write(current[layer.name].initial())


def _settled(
    run: Passes, seen: Pass, changes: dict[str, float], current: dict[str, Statistics]
) -> int:
    """How many layers, from the first that runs, did not change. Where the next one met something
    not finite, no statistic but its own can be to blame; else the data are."""
    for position, name in enumerate(seen.order):
        where = seen.pools[name].nonfinite
        if where is not None and not current[name].finite():
            return position
        if where is not None:
            raise_nonfinite(name, where, run.ranks.size)
        if changes.get(name, 0.0) > 1:
            return position
    return len(seen.order)


def _ended(run: Passes, changes: dict[str, float], settled: int, layers: int) -> bool:
    loop = run.loop
    residual = max(changes.values(), default=0.0)
    if residual == 0:
        return True
    loop["near"] = loop["near"] + 1 if residual <= 1 else 0
    if loop["near"] == 2:
        return True
    better = settled > loop["settled"] or residual < 0.9 * loop["residual"]
    loop["settled"] = max(settled, loop["settled"])
    loop["residual"] = min(residual, loop["residual"])
    # In fewer passes than layers the last layer of a chain may have had no chance yet.
    loop["stalled"] = 0 if better or loop["step"] <= layers else loop["stalled"] + 1
    return bool(loop["stalled"] >= _STALLS)
