"""``check``: the rules run over a model or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise.doctor import states
from normwise.doctor.config import Config
from normwise.doctor.dynamics import Dynamics
from normwise.doctor.finding import Finding
from normwise.doctor.report import CheckReport
from normwise.doctor.rule import NEEDS, all_rules
from normwise.doctor.structure import Structure
from normwise.doctor.subject import NormState, Subject
from normwise.errors import InputError, NormwiseError, message
from normwise.graph.run import Call, not_running
from normwise.interop.conventions import convention
from normwise.tools.norms import core
from normwise.tools.recalibrate.feed import Feed, arguments_for
from normwise.tools.recalibrate.transaction import RandomState

__all__ = ["check"]

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]


def check(
    model_or_checkpoint: nn.Module | Checkpoint,
    data: Any = None,
    *,
    example_inputs: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int = 8,
    optimizer: torch.optim.Optimizer | None = None,
    peers: Iterable[nn.Module | Checkpoint] | Mapping[str, nn.Module | Checkpoint] = (),
    framework: str | None = None,
    select: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str | None = None,
    per_layer: Mapping[str, Iterable[str] | str] | None = None,
    config: Config | None = None,
) -> CheckReport:
    """Reads the norms of a model as a linter reads code: named findings, evidence, a remedy.

    Rules ``NW1xx`` look at parameters, buffers and attributes (a checkpoint is enough), ``NW2xx``
    at the graph of a run on an example, ``NW3xx`` at what data show, in eval mode and normalizing
    by the batch. The model, its modes, buffers, hooks and the random state are as before on every
    exit. ``normwise.doctor.all_rules()`` lists the rules; a rule's docstring is its page.

    Args:
        model_or_checkpoint: a module, a state dict, or the path of a checkpoint (safetensors,
            .pt, .onnx, a folder of Hugging Face's), of which only the norms' tensors are read and
            no code is run.
        data: batches, as for :func:`normwise.recalibrate`: a DataLoader, a list, one tensor.
        example_inputs: what the model is called with, for the rules of structure: a tensor, a tuple
            of arguments, a dict of keyword ones. The first batch of ``data`` if None.
        forward: ``forward(model, batch)`` runs the model on a batch of ``data``.
        batches: how many batches of ``data`` to use.
        optimizer: the one that trains the model, for the rules on weight decay.
        peers: other checkpoints of the same model: those of other ranks, or of another step.
        framework: where the weights came from (``'keras'``, ``'flax'``, …), for the rules on
            conventions.
        select, ignore: rules, by code, the start of one, or name.
        per_layer: pattern of layer names -> rules whose findings there are dropped.
        config: the same from a file: ``Config.from_pyproject()``; the arguments come on top.

    Returns:
        CheckReport: ``.findings``, worst first, then in the order of the layers.

    Raises:
        InputError: arguments that do not fit, or a model that does not run on the data.
        CheckpointError: a file that is no checkpoint, is damaged, or would run code.

    Example:
        >>> import torch, normwise as nw
        >>> bn = torch.nn.BatchNorm1d(3)
        >>> _ = bn.running_var.copy_(torch.tensor([1.0, -1.0, 1.0]))
        >>> nw.check(bn).findings[0].rule
        'negative-variance'
    """
    chosen = (config or Config()).merged(Config.of(select, ignore, per_layer))
    if batches < 1 or isinstance(batches, bool):
        raise InputError(message("batches is 1 or more", repr(batches), "batches=8"))
    if framework is not None:
        convention(framework)  # an unknown one is an error whatever rules run
    model = core(model_or_checkpoint) if isinstance(model_or_checkpoint, nn.Module) else None
    subject = Subject(
        states.of_model(model) if model is not None else _norms_of(model_or_checkpoint),
        _name_of(model_or_checkpoint),
        model,
        peers={name: {n.name: n for n in _norms_of(p)} for name, p in _named(peers)},
        optimizer=optimizer,
        framework=framework,
        data=data,
    )
    errors: dict[str, str] = {}
    if model is None:
        if data is not None or example_inputs is not None:
            raise InputError(
                message(
                    "data run through a model",
                    f"data for {subject.source}, a checkpoint without code",
                    "the model with the checkpoint's weights loaded",
                )
            )
    else:
        random = RandomState.now()
        try:
            _run(subject, model, data, example_inputs, forward, batches, chosen, errors)
        finally:
            random.restore()
    return _judge(subject, chosen, errors)


def _named(
    peers: Iterable[nn.Module | Checkpoint] | Mapping[str, nn.Module | Checkpoint],
) -> list[tuple[str, nn.Module | Checkpoint]]:
    if isinstance(peers, Mapping):
        return list(peers.items())
    return [
        (str(p) if isinstance(p, (str, os.PathLike)) else f"peer {i}", p)
        for i, p in enumerate(peers, 1)
    ]


def _norms_of(source: nn.Module | Checkpoint) -> list[NormState]:
    if isinstance(source, nn.Module):
        return states.of_model(core(source))
    if isinstance(source, Mapping):
        return states.of_state_dict(source)
    if isinstance(source, (str, os.PathLike)):
        return states.of_file(source)
    raise InputError(
        message(
            "check takes a module, a state dict or the path of a checkpoint",
            f"a {type(source).__name__}",
            "nw.check(model)",
        )
    )


def _name_of(source: nn.Module | Checkpoint) -> str:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).name or str(source)
    return type(source).__name__ if isinstance(source, nn.Module) else "the state dict"


def _run(
    subject: Subject,
    model: nn.Module,
    data: Any,
    example_inputs: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    batches: int,
    config: Config,
    errors: dict[str, str],
) -> None:
    """Fill in the structure and the dynamics, as far as there is something to run on."""
    needs = {rule.needs for rule in all_rules() if config.runs(rule)}
    held: list[Any] | None = None
    if data is not None:
        held = list(Feed(data, batches, forward, several=""))
        if not held:
            raise InputError(message("data hold a batch at least", "none", "a non-empty loader"))
    if "graph" in needs and (example_inputs is not None or (held and forward is None)):
        if example_inputs is not None:
            call = Call.of(example_inputs)
        else:
            assert held is not None
            call = Call(*arguments_for(model, held[0]))
        try:
            subject.structure = Structure.of(model, call)
        except Exception as error:
            if example_inputs is not None and not isinstance(error, NormwiseError):
                raise not_running(error) from error
            errors["NW2"] = f"{type(error).__name__}: {error}"
    if "data" in needs and held is not None:
        try:
            subject.dynamics = Dynamics.of(model, data, held, forward)
        except NormwiseError:
            raise
        except Exception as error:
            raise InputError(
                message(
                    "the model must run on the data",
                    f"{type(error).__name__}: {error}",
                    "batches as the model's forward takes them, or forward=",
                )
            ) from error


def _judge(subject: Subject, config: Config, errors: dict[str, str]) -> CheckReport:
    found: list[Finding] = []
    ran, skipped = [], {}
    for rule in all_rules():
        if not config.runs(rule):
            continue
        if not subject.has(rule.needs):
            skipped[rule.code] = NEEDS[rule.needs]
            continue
        ran.append(rule.code)
        found += [f for f in rule.check(subject) if config.keeps(f)]
    order = {norm.name: i for i, norm in enumerate(subject.norms)}
    found.sort(key=lambda f: (-f.rank, order.get(f.layer, len(order)), f.code))
    facts = {
        "source": subject.source,
        "norms": len(subject.norms),
        "rules": ran,
        "skipped": skipped,
        "errors": errors,
    }
    return CheckReport(found, facts)
