"""``recalibrate``: its contract, and the order in which the parts are used."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from normwise.errors import InputError, message
from normwise.results import Entry
from normwise.tools.norms import Layers, core
from normwise.tools.recalibrate.checkpoint import Checkpoint, fingerprint
from normwise.tools.recalibrate.feed import Feed
from normwise.tools.recalibrate.layers import Layer, Selection, select
from normwise.tools.recalibrate.metric import Metric
from normwise.tools.recalibrate.modes import Outcome, by_batch, exact
from normwise.tools.recalibrate.passes import Passes
from normwise.tools.recalibrate.progress import progress_bar
from normwise.tools.recalibrate.ranks import Ranks
from normwise.tools.recalibrate.report import (
    PROMISE,
    RecalibrationReport,
    RecalibrationResult,
    entries,
)
from normwise.tools.recalibrate.transaction import Transaction

__all__ = ["recalibrate"]

MODES = ("exact", "batch")


def recalibrate(
    model: nn.Module,
    data: Any,
    *,
    batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mode: str = "exact",
    layers: Layers | None = None,
    group: Any = None,
    metric: Metric | None = None,
    blend: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    inplace: bool = False,
) -> RecalibrationResult:
    r"""Replace the running statistics of a model's batch norms by those of ``data``.

    A layer that saw batches of :math:`n_i` values a channel with means :math:`\mu_i` and sums of
    squared deviations :math:`M_i` gets

    .. math::
        \mu = \frac{\sum_i n_i \mu_i}{n}, \qquad
        \sigma^2 = \frac{\sum_i M_i + \sum_i n_i (\mu_i - \mu)^2}{n - 1}, \qquad n = \sum_i n_i

    (Chan, Golub & LeVeque 1979; the unbiased variance, as torch.nn keeps it), merged in float64:
    every batch by its size, the differences between batches included.
    ``torch.optim.swa_utils.update_bn`` averages the variances of batches with equal weight and
    leaves these differences out.

    Args:
        model: any module with batch norms (torch.nn's, normwise's, subclasses). Out of
            DistributedDataParallel, DataParallel and ``torch.compile`` the module inside is taken.
        data: an iterable of batches, or one tensor, dict or dataclass, which is one batch. A
            tensor is the model's argument. Of a tuple or list the model gets as many as its
            ``forward`` requires, so of ``(x, target)`` mostly x; of a dict or dataclass the
            fields that ``forward`` names. Tensors go to the model's device.
        batches: take the first so many; on several ranks, of each.
        forward: ``forward(model, batch)`` runs the model on a batch of any other kind.
        mode: 'exact', the default, is self-consistent: what a layer sees depends on the statistics
            of the layers before it, so the data pass through the model, in eval mode throughout,
            until every layer sees exactly what its statistics say. That takes as many passes as
            norms depend on one another, and one more that checks it; any batch size will do.
            'batch' is one pass in which every layer normalizes by the batch, as in training;
            cheaper, and off by what batch statistics scatter. (The default is what the name
            promises. Limit ``batches``, or choose 'batch', where a deep network makes it dear.)
        layers: the norms to recalibrate: names (``'stem.*'`` is a pattern), modules, or
            ``choose(name, module) -> bool``. None for all that have running statistics.
        group: the process group of several ranks, each with its own part of the data or with
            none; torch.distributed's default group if None. All of them call; all get the same.
        metric: ``metric(output, batch)``, the batch's mean loss or accuracy: a number or a dict of
            them. Averaged by batch size (first axis), before and after. 'batch' needs two more
            passes for it.
        blend: from 0 to 1, the weight of ``data`` against the statistics that were there:
            :math:`(1 - b)\,\mu_{old} + b\,\mu`, :math:`(1 - b)\,\sigma_{old}^2 + b\,\sigma^2`. None
            is 1: they are replaced, as AdaBN does for a new domain (Li et al. 2016, section 3).
            Schneider et al. 2020 (section 3) take :math:`b = n / (N + n)` for n samples of the new
            domain, where the old statistics count as N samples.
        checkpoint: a file. If the process dies, the same call goes on from there and comes to the
            same result bit for bit; the data must come in the same order (torch's, NumPy's and
            Python's global random states are kept in the file). On several ranks one file each,
            ``<name>.rank<i>``.
        progress: a bar on standard error, if that is a terminal.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        A :class:`RecalibrationResult`: ``model, report = nw.recalibrate(...)``, and ``undo()``.
        Only running statistics are different: ``running_mean``, ``running_var``, and
        ``num_batches_tracked``, the number of batches that were pooled (added to the old number
        under ``blend``). Modes, hooks, momentum, other buffers and random state are as before.

    Raises:
        InputError: no batch norm with running statistics, or lazy modules that have no shapes
            yet; empty data, or fewer than ``batches``; an iterator where several passes are
            needed; a batch that the model rejects (its own error is the cause); fewer than two
            values a channel, of all the data, or of a batch in mode 'batch'; a model that cannot
            be copied; a checkpoint of another run; another rank's failure.
        NonFiniteError: inf or NaN in what a layer sees; names the layer and the batch.
        On these, on Ctrl-C and on any other error the model stays as it was, in place too.

    Warns:
        UserWarning: if in mode 'exact' the check fails: mean and variance of an output are not
            those that the statistics promise to 1e-4. Random augmentation does that (every pass
            sees other data), and buffers too coarse for the mean (1e6 in float32).

    Example:
        >>> import torch, normwise as nw
        >>> bn = torch.nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[7.0]])]
        >>> model, report = nw.recalibrate(bn, batches)
        >>> model.running_mean.tolist(), model.running_var.tolist()
        ([3.0], [13.0])
        >>> bn.running_mean.tolist()
        [0.0]
    """
    if mode not in MODES:
        raise InputError(message("mode names a way", repr(mode), f"one of {MODES}"))
    share = 1.0 if blend is None else _share(blend)
    several = "mode='exact'" if mode == "exact" else "metric=" if metric is not None else ""
    feed = Feed(data, batches, forward, several)
    inner = core(model)
    chosen = select(inner, layers)
    ranks = Ranks(group)
    working = inner if inplace else _copy(inner, chosen)
    settings = {"mode": mode, "blend": share, "batches": batches, "ranks": ranks.size}
    with progress_bar(progress and ranks.rank == 0) as show, Transaction(working) as transaction:
        run = Passes(working, chosen.layers, feed, ranks, transaction, metric, None, show)
        if checkpoint is not None:
            identity = fingerprint(working, chosen.layers, {**settings, "rank": ranks.rank})
            run.checkpoint = Checkpoint(checkpoint, identity, ranks.rank, ranks.size)
            _go_on(run)
        outcome = (exact if mode == "exact" else by_batch)(run, share)
        report = _report(chosen, outcome, share, settings)
        if run.checkpoint is not None:
            run.checkpoint.finish()
        transaction.on_success = lambda: _write(chosen.layers, outcome)
    if report.facts["self_consistent"] is False:
        _warn(report)
    sources = [(la, la.source) for la in chosen.layers if la.name in outcome.statistics]

    def undo() -> None:
        for layer, source in sources:
            layer.write(source)

    return RecalibrationResult(model if inplace else working, report, undo)


def _share(blend: float) -> float:
    if isinstance(blend, bool) or not 0 <= blend <= 1:  # NaN is neither
        raise InputError(
            message("blend is a weight from 0 to 1", repr(blend), "blend=None to replace")
        )
    return float(blend)


def _copy(model: nn.Module, chosen: Selection) -> nn.Module:
    """A deep copy, with the chosen layers those of the copy."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            message(
                "the model can be deep-copied",
                f"{type(error).__name__}: {error}",
                "inplace=True, which needs no copy and leaves the model as it was on an error",
            )
        ) from error
    for layer in chosen.layers:
        layer.module = copied.get_submodule(layer.name)  # type: ignore[assignment] # of the same class
    return copied


def _go_on(run: Passes) -> None:
    """Take up what a checkpoint holds; on several ranks all go on from the pass that is furthest.

    Whoever is a pass ahead has been through the exchange at its end, so that it knows what those
    behind need.
    """
    assert run.checkpoint is not None
    state, error = None, None
    try:
        state = run.checkpoint.read(list(run.layers))
    except Exception as failure:
        error = failure
    shared = None if state is None else (state.step, state.statistics, state.loop)
    furthest = max(
        (s for s in run.ranks.exchange(shared, error) if s is not None),
        key=lambda s: s[0],
        default=None,
    )
    if furthest is None:
        return
    step, statistics, run.loop = furthest
    run.resume = state if state is not None and state.step == step else None
    for layer in run.layers:
        if layer.name in statistics:
            layer.write(statistics[layer.name])


def _write(layers: list[Layer], outcome: Outcome) -> None:
    for layer in layers:
        if layer.name in outcome.statistics:
            layer.write(outcome.statistics[layer.name])


def _report(
    chosen: Selection, outcome: Outcome, blend: float, settings: dict[str, Any]
) -> RecalibrationReport:
    found, holds = entries({layer.name: layer for layer in chosen.layers}, outcome, blend)
    every: list[Entry] = [*found, *chosen.left]
    facts = {
        "mode": settings["mode"],
        "blend": blend,
        "passes": outcome.passes,
        "batches": outcome.last.batches,
        "ranks": settings["ranks"],
        "self_consistent": holds,
        "metric_before": outcome.before,
        "metric_after": outcome.after,
    }
    if holds is not None:
        for error in ("mean_error", "var_error"):
            facts[error] = max(e.facts[error] for e in found if error in e.facts)
    return RecalibrationReport(every, facts)


def _warn(report: RecalibrationReport) -> None:
    errors = {
        e.name: max(e.facts["mean_error"], e.facts["var_error"])
        for e in report
        if "mean_error" in e.facts
    }
    worst = max(errors, key=lambda name: errors[name])
    warnings.warn(
        message(
            f"after recalibration outputs follow the statistics to {PROMISE:.0e}",
            f"{errors[worst]:.1e} at layer {worst!r} after {report.facts['passes']} passes",
            "data without random augmentation, model.double() if means are large, or mode='batch'",
        ),
        UserWarning,
        stacklevel=3,
    )
