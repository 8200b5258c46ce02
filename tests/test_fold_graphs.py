"""``fold`` on small hard graphs: never wrong, never a crash, and all that is exactly foldable."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fold_graphs import GRAPHS, NORMS, Graph, randomise
from fold_graphs.base import Net
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

import normwise as nw
from normwise.graph import REASONS
from normwise.graph.modules import ChannelAffine

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
         "_forward_hooks_with_kwargs", "_state_dict_hooks")  # fmt: skip


pytestmark = pytest.mark.usefixtures("alone")


def leaves(tree: Any) -> list[Any]:
    """Tensors and numbers of any output, dataclasses and dicts opened."""
    if hasattr(tree, "__dataclass_fields__"):
        tree = vars(tree)
    if isinstance(tree, dict):
        return [x for v in tree.values() for x in leaves(v)]
    if isinstance(tree, (list, tuple)):
        return [x for v in tree for x in leaves(v)]
    return [tree]


def call(model: nn.Module, inputs: Any, dtype: torch.dtype | None) -> list[Any]:
    def own(t: Tensor) -> Tensor:
        return t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype, copy=True)

    inputs = tree_map_only(Tensor, own, inputs)
    torch.default_generator.manual_seed(0)
    if isinstance(inputs, dict):
        return leaves(model(**inputs))
    return leaves(model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs))


def state(model: nn.Module) -> tuple[Any, ...]:
    """All that fold may not change."""
    return (
        {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)},
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()],
        [list(getattr(m, h)) for m in model.modules() for h in HOOKS if hasattr(m, h)],
    )


def assert_same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[0].keys() == after[0].keys()
    for name, t in before[0].items():
        assert torch.equal(t.nan_to_num(), after[0][name].nan_to_num()), name
    assert before[1:] == after[1:]


def assert_same(got: list[Any], want: list[Any], tolerance: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        if not isinstance(w, Tensor):
            assert g == w
            continue
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if not w.numel():
            continue
        g, w = g.detach(), w.detach()
        size = float(w.abs().max()) or 1.0
        assert float((g - w).abs().max()) <= tolerance * size


def built(graph: Graph, dtype: torch.dtype) -> nn.Module:
    torch.default_generator.manual_seed(7)
    model = graph.make()
    randomise(model, graph.positive)
    if graph.dtype is None:
        model = model.to(dtype)
    model.eval()
    if graph.prepare is not None:
        graph.prepare(model)
    return model


def assert_reported(graph: Graph, folded: nn.Module, report: Any) -> None:
    got = {e.name: e for e in report.entries}
    seen = {n: e.action if e.reason is None else f"{e.action}: {e.reason}" for n, e in got.items()}
    assert seen.keys() == graph.expect.keys()
    for name, expected in graph.expect.items():
        assert seen[name].startswith(expected), (
            f"{name}: {seen[name]}, expected {expected}; {got[name].facts}"
        )
        assert got[name].reason is None or got[name].reason in REASONS
        try:
            there: Any = folded.get_submodule(name)
        except AttributeError:
            continue  # written as a function
        action = got[name].action
        if action in ("folded", "merged"):
            if type(there).forward in (_BatchNorm.forward, nw.nn.BatchNorm2d.forward):
                pytest.fail(f"{name} is said to be {action}, and is there")
        elif action == "multiply-add":
            assert isinstance(there, ChannelAffine)
    assert report.facts["found"] == len(graph.expect)


# In float64 a wrong fold cannot hide behind rounding; the norms' own forms in float32 too.
CASES = [
    *(pytest.param(g, g.dtype or torch.float64, id=g.name) for g in GRAPHS),
    *(pytest.param(g, torch.float32, id=f"{g.name}, float32") for g in NORMS if g.dtype is None),
]


# torch's own, when a copy of a scripted module is cast.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("graph", "dtype"), CASES)
def test_folds_exactly(graph: Graph, dtype: torch.dtype) -> None:
    tolerance = graph.tolerance or (1e-10 if dtype is torch.float64 else 2e-4)
    cast = dtype if graph.dtype is None else graph.dtype
    model = built(graph, dtype)
    given = graph.inputs()
    outputs = [call(model, x, cast) for x in given]
    before = state(model)
    example = tree_map_only(Tensor, lambda t: t.to(cast) if t.is_floating_point() else t, given[0])

    folded, report = nw.fold(model, example, seconds=0)

    assert_same_state(before, state(model))
    assert [n for n, m in model.named_modules() if m.training] == [
        n for n, m in folded.named_modules() if m.training
    ] or model.training
    for x, want in zip(given, outputs, strict=True):
        assert_same(call(model, x, cast), want, 0.0)
        assert_same(call(folded, x, cast), want, tolerance)
    assert_reported(graph, folded, report)


def test_in_place_a_view_of_the_folded_weight_keeps_its_numbers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)).double()
    randomise(net)
    both = torch.cat([net[0].weight.detach()] * 2)
    net[0].weight, net[2].weight = nn.Parameter(both[:3]), nn.Parameter(both[1:4])
    net.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = call(net, x, None)
    nw.fold(net, x, inplace=True, seconds=0)
    assert_same(call(net, x, None), want, 1e-10)


def test_fold_does_not_move_random_numbers_of_cuda() -> None:
    """Before CUDA is up, torch.manual_seed leaves a seed for it: that of the user must stand."""
    from torch.cuda import _queued_calls

    before = len(_queued_calls)
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    nw.fold(net, torch.randn(1, 3, 4, 4), seconds=0)
    assert len(_queued_calls) == before


class _Standardized(nn.Conv2d):
    """Weight standardization as BiT writes it: a batch norm of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = torch.nn.functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        ).reshape_as(self.weight)
        return self._conv_forward(input, weight, self.bias)


def test_a_batch_norm_of_weights_is_no_norm_of_the_model() -> None:
    model = nn.Sequential(_Standardized(3, 4, 3), nn.BatchNorm2d(4)).eval()
    _, report = nw.fold(model, torch.randn(2, 3, 6, 6), seconds=0)
    assert [(e.name, e.reason) for e in report] == [("1", "parametrized")]


class _Restless(nn.Module):
    """Other numbers at each call, also in each copy."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        _Restless.calls += 1
        y: Tensor = self.bn(self.c(x)) * _Restless.calls
        return y


def test_a_model_that_differs_from_itself_stays() -> None:
    _, report = nw.fold(_Restless().eval(), torch.randn(2, 3, 6, 6), seconds=0)
    assert [e.action for e in report.entries] == ["left"]
    assert report.entries[0].reason == "differs"


def test_pythons_random_numbers_are_the_same_in_each_run() -> None:
    net = Net(lambda m, x: m.bn(m.c(x)) * random.random(), c=nn.Conv2d(3, 4, 3),
              bn=nn.BatchNorm2d(4)).eval()  # fmt: skip
    state = random.getstate()
    _, report = nw.fold(net, torch.randn(2, 3, 6, 6), seconds=0)
    assert report["bn"].action == "folded"
    assert random.getstate() == state


@pytest.mark.parametrize("name", ["norm, zero-padded convolution, norm", "residual block",
                                  "norm → norm → norm", "dense block"])  # fmt: skip
def test_what_is_folded_trains_and_exports(name: str) -> None:
    graph = next(g for g in GRAPHS if g.name == name)
    model = built(graph, torch.float64)
    x = graph.inputs()[0]
    folded, _ = nw.fold(model, x, seconds=0)
    want = folded(x)
    (want * torch.randn_like(want)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in folded.parameters())
    exported = torch.export.export(folded, (x,)).module()
    assert_same(leaves(exported(x)), leaves(want), 1e-12)
