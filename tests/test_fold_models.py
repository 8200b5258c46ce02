"""``fold`` on whole networks of different families: where each norm goes, and that nothing else
changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from networks import NETWORKS, Network, randomise
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normwise as nw

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)


@pytest.fixture
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def made(network: Network, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.default_generator.manual_seed(0)
    model = randomise(network.make()).to(dtype)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in network.inputs()]
    return model, inputs


def off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@families
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_norm_goes_where_it_can(network: Network, dtype: torch.dtype, limit: float) -> None:
    model, inputs = made(network, dtype)
    folded, report = nw.fold(model, tuple(inputs), seconds=0)
    actions = Counter(e.action for e in report)
    assert actions["folded"] + actions["merged"] == network.folded, report
    assert actions["multiply-add"] == network.multiply_adds, report
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    with torch.no_grad():
        wanted = model(*inputs)
        assert off(folded(*inputs), wanted) <= limit
        # On other data of the same kind too, fewer samples among them.
        others = [t[:1] * 1.5 if t.is_floating_point() else t[:1] for t in inputs]
        assert off(folded(*others), model(*others)) <= limit


@families
def test_a_folded_model_trains(network: Network) -> None:
    model, inputs = made(network)
    folded = nw.fold(model, tuple(inputs), seconds=0).model
    folded.train()
    y = folded(*inputs)
    before = y.detach()
    y.backward(torch.randn_like(y))
    assert all(p.grad is not None for p in folded.parameters())
    torch.optim.SGD(folded.parameters(), lr=1e-3).step()
    assert not torch.equal(folded(*inputs).detach(), before)


# torch.export says so of every LSTM, folded or not.
@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights:UserWarning")
@families
def test_a_folded_model_exports(network: Network) -> None:
    model, inputs = made(network)
    folded = nw.fold(model, tuple(inputs), seconds=0).model
    program = torch.export.export(folded, tuple(inputs))
    assert not any("batch_norm" in str(n.target) for n in program.graph.nodes)
    with torch.no_grad():
        assert off(program.module()(*inputs), model(*inputs)) <= 1e-5


@families
def test_the_model_is_left_as_it_was(network: Network) -> None:
    model, inputs = made(network)
    before = copy.deepcopy(model.state_dict())
    nw.fold(model, tuple(inputs), seconds=0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_what_a_norm_called_on_its_result_stays() -> None:
    """The modules of a norm with a forward of its own: alone, or after the multiply-add."""
    network = next(n for n in NETWORKS if n.name == "norms with activations")
    model, inputs = made(network)
    folded, report = nw.fold(model, tuple(inputs), seconds=0)
    assert isinstance(folded.bn1, nn.ReLU)
    assert [type(m).__name__ for m in folded.bn2] == ["ChannelAffine", "ReLU"]
    assert [e.action for e in report] == ["folded", "multiply-add"]


def test_a_dense_block_is_planned_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each norm there has all layers before it above it: what they reach is asked for as long as
    nothing refuses, not for all of them."""
    from normwise.graph import upward

    asked = Counter[str]()
    reach = upward.reach
    monkeypatch.setattr(upward, "reach", lambda *args: (asked.update(["reach"]), reach(*args))[1])
    network = next(n for n in NETWORKS if n.name == "dense")
    model, inputs = made(network)
    report = nw.fold(model, tuple(inputs), seconds=0).report
    assert asked["reach"] <= 4 * len(report)


class Rows(nn.Module):
    """LeViT's linear layer (Graham et al. 2021): rows are normalized, the shape is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        zero = torch.zeros_like(y)
        return self.bn(y.flatten(0, 1)).reshape_as(y) + zero


def test_who_asks_for_a_shape_reads_no_numbers() -> None:
    model, x = randomise(Rows()), torch.randn(2, 5, 6)
    folded, report = nw.fold(model, x, seconds=0)
    assert (report["bn"].action, report["bn"].into) == ("folded", "linear")
    with torch.no_grad():
        assert off(folded(x), model(x)) <= 1e-5
