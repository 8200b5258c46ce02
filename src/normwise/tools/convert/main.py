"""All norms of a model, one by one, in place or in a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.errors import InputError, message
from normwise.graph.run import Call, copy_of, on_examples, same_random_numbers, tensors_in
from normwise.graph.verify import distance
from normwise.pages import Axis, Chart
from normwise.results import Entry, Report, Result
from normwise.tools.convert.specs import Spec, is_norm, spec_of
from normwise.tools.convert.targets import OPTIONS_OF, REASONS, TARGETS, Made, Stay

__all__ = ["ConvertReport", "convert", "convert_all"]

M = TypeVar("M", bound=nn.Module)

# What nn.Module keeps about a module's hooks: they go on watching the place.
_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks",
)  # fmt: skip
# Attributes that the classes themselves set; any other one is the user's and goes along.
_OWN = frozenset(
    {
        "num_features", "eps", "momentum", "affine", "track_running_stats", "training", "weight",
        "process_group", "num_groups", "num_channels", "normalized_shape", "elementwise_affine",
        "activation", "channel_dim", "nonfinite", "ghost_size", "rmax",
        "dmax", "schedule",
    }
)  # fmt: skip


class ConvertReport(Report):
    """Each norm: ``action`` 'converted' (``into`` the new class) or 'left' (``reason``).

    ``facts['preserved']``: whether the new norm computes in eval what the old one did. Of the
    whole, with example inputs: ``facts['difference']``, the largest difference of the model's
    outputs in eval, relative to the largest value.
    """

    title: ClassVar[str] = "convert"
    columns: ClassVar[tuple[str, ...]] = ("from", "preserved", "note")

    def summary(self) -> list[str]:
        lines = super().summary()
        if self.facts.get("difference") is not None:
            lines.append(f"outputs in eval differ by {self.facts['difference']:.1e} of the largest")
        used = sorted({e.reason for e in self.entries if e.reason is not None})
        return lines + [f"{reason}: {REASONS[reason]}" for reason in used]

    def charts(self) -> list[Chart]:
        counts = Counter(
            (str(e.facts.get("from")), e.into or "left as it was") for e in self.entries
        )
        if len(counts) < 2:
            return []
        return [
            Chart(
                "bar",
                "From which kind to which",
                "How many norms of each class became what.",
                [{"from": a, "to": b, "norms": n} for (a, b), n in counts.items()],
                x=Axis("from", "from", "category"),
                y=Axis("norms", "norms", format="~d"),
                color=Axis("to", "to", "category"),
            )
        ]


def _ranks(model: nn.Module, call: Call) -> dict[nn.Module, int]:
    """How many axes the input of each norm has beside batch and channels."""
    seen: dict[nn.Module, int] = {}

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            seen[module] = output.dim() - 2

    handles = [m.register_forward_hook(look) for m in model.modules() if is_norm(m)]
    try:
        with torch.no_grad(), same_random_numbers():
            call.copy().run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad(), same_random_numbers():
        return tensors_in(call.copy().run(model))


def _converted(old: nn.Module, spec: Spec, to: str, options: dict[str, Any]) -> Made:
    if any(t is not None and is_lazy(t) for t in spec.tensors.values()):
        raise Stay("uninitialized")
    made = TARGETS[to](old, spec, options)
    new = made.module
    new.training = old.training
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    for name, value in old.__dict__.items():
        if not name.startswith("_") and name not in _OWN and name not in new.__dict__:
            new.__dict__[name] = value
    return made


def convert(
    model: M,
    to: str,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    **options: Any,
) -> Result[M, ConvertReport]:
    """Every norm of a model as another kind of norm, and back, with what it has learned.

    Args:
        model: any module; left as it was unless ``inplace``.
        to: ``'normwise'`` or ``'torch'`` (the plain layers of normwise or torch.nn, for norms of
            every kind); from batch norms ``'sync'``, ``'ghost'``, ``'renorm'``, ``'frozen'``
            (normwise's variants), ``'group'``, ``'instance'``.
        example_inputs: what the model is called with (a tensor, a tuple, a dict of keyword
            arguments). With them the outputs before and after are compared in eval, and norms that
            take any rank learn which they see.
        inplace: change ``model`` itself. Parameters and buffers are shared with the old norms, so
            an optimizer goes on training those in use.
        options: of the target's class: ``process_group`` ('sync'), ``ghost_size`` ('ghost'),
            ``num_groups`` ('group', default 32 or the largest common divisor), … .

    Kept: parameters (the objects themselves), buffers, eps, momentum, activation, channel_dim and
    the other options, mode, requires_grad, hooks, attributes of the user; a norm that stands in
    several places stays one. Where a target cannot express a norm, that stays as it is and the
    report says why. State dict keys do not change among the kinds of batch norm.

    Returns:
        Result: ``model`` and ``report``, a :class:`ConvertReport`; unpacks as ``model, report``.

    Raises:
        InputError: an unknown target, a wrong option, a model that cannot be copied or does not run
            on the example inputs.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import convert
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> ours, report = convert(net, to="normwise")
        >>> type(ours[1]).__module__, report["1"].into
        ('normwise.nn.batchnorm', 'BatchNorm1d')
    """
    if to not in TARGETS:
        raise InputError(
            message(
                "a norm is converted into a kind that is known",
                repr(to),
                f"one of {', '.join(map(repr, TARGETS))}",
            )
        )
    strange = set(options) - OPTIONS_OF.get(to, set(options))
    if strange:
        raise InputError(
            message(
                f"the options are those of the target {to!r}",
                ", ".join(sorted(strange)),
                ", ".join(sorted(OPTIONS_OF[to])) or "none at all",
            )
        )
    call = None if example_inputs is None else Call.of(example_inputs)
    target = model if inplace else copy_of(model)
    before: list[Tensor] = []
    ranks: dict[nn.Module, int] = {}
    if call is not None:
        twin, probe = copy_of(model).eval(), copy_of(model).eval()
        with on_examples():
            before = _outputs(twin, call)
            seen = _ranks(probe, call)
        by_path = {m: p for p, m in probe.named_modules()}
        ranks = {target.get_submodule(by_path[m]): r for m, r in seen.items()}
    entries, new = convert_all(target, to, options, ranks)
    facts: dict[str, Any] = {"to": to}
    if call is not None:
        facts["difference"] = distance(_outputs(copy_of(new).eval(), call), before)
    result: Result[Any, ConvertReport] = Result(new, ConvertReport(entries, facts))
    return result


def convert_all(
    model: nn.Module,
    to: str,
    options: dict[str, Any],
    ranks: Mapping[nn.Module, int],
    stays: Callable[[nn.Module], str | None] = lambda module: None,
) -> tuple[list[Entry], nn.Module]:
    """Every norm of ``model``, in place; ``stays`` tells the reason why one is left, or None."""
    made: dict[nn.Module, Made] = {}
    entries = []
    for path, module in list(model.named_modules()):
        if not is_norm(module):
            continue
        spec = spec_of(module)
        name = type(module).__name__
        if spec is None:
            reason = "uninitialized" if "Lazy" in name else "custom-class"
            entries.append(Entry(path, "left", reason=reason, facts={"from": name}))
            continue
        own_reason = stays(module)
        if own_reason is not None:
            entries.append(Entry(path, "left", reason=own_reason, facts={"from": name}))
            continue
        spec.axes = ranks.get(module)
        if not spec.rank and spec.axes is not None:
            spec.rank = max(spec.axes, 1)
        try:
            one = _converted(module, spec, to, options)
        except Stay as stay:
            why: dict[str, Any] = {"from": name, "note": stay.detail or None}
            entries.append(Entry(path, "left", reason=stay.reason, facts=why))
            continue
        except TypeError as error:
            raise InputError(
                message(
                    f"the options are those of the target {to!r}",
                    f"{', '.join(f'{k}={v!r}' for k, v in options.items())} ({error})",
                    "the arguments of its class in normwise.nn",
                )
            ) from error
        made[module] = one
        facts: dict[str, Any] = {"from": name, "preserved": one.preserved, "note": one.note}
        entries.append(Entry(path, "converted", type(one.module).__name__, None, facts))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child].module
    return entries, made[model].module if model in made else model
