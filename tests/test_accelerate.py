"""``accelerate`` on whole networks: the same training, copies, files, compilers, other tools."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, Network, conv_bn, randomise
from torch import Tensor, nn

import normwise as nw
from normwise.errors import InputError
from normwise.tools.accelerate import REASONS
from normwise.tools.accelerate.classes import PLANS, is_accelerated

# Networks whose norms are followed by nothing that a norm can carry.
NOTHING_TO_FUSE = {"speech"}


def small() -> nn.Module:
    """Two blocks with an activation, and one without."""
    return randomise(nn.Sequential(conv_bn(3, 4, 3), conv_bn(4, 4, 3, act=False))).double()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def in_float64(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def trained(model: nn.Module, inputs: tuple[Tensor, ...], training: bool = True) -> list[Tensor]:
    """Outputs and gradients of three steps, and the state after them."""
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    g = torch.Generator().manual_seed(3)
    seen: list[Tensor] = []
    for _ in range(3):
        y = model(*inputs)
        optimizer.zero_grad()
        y.backward(torch.randn(y.shape, generator=g, dtype=y.dtype))
        seen += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return seen + [t.clone() for t in model.state_dict().values()]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def runs_of(model: nn.Module) -> list[bool]:
    """For each accelerated module whether its last call was a fused one."""
    return [
        vars(m)[PLANS].plans[0].run is not None
        for m in model.modules()
        if PLANS in vars(m) and vars(m)[PLANS].plans
    ]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_networks_train_as_before(network: Network, training: bool) -> None:
    torch.manual_seed(4)
    net = randomise(network.make()).double()
    inputs = in_float64(network.inputs())
    fast, report = nw.accelerate(net)
    fused = [e for e in report if e.action == "fused"]
    assert bool(fused) == (network.name not in NOTHING_TO_FUSE)
    assert list(fast.state_dict()) == list(net.state_dict())
    assert_same(trained(fast, inputs, training), trained(net, inputs, training))
    assert all(runs_of(fast))


def test_the_given_model_stays_as_it_was() -> None:
    net = small()
    before = {path: (type(m), set(vars(m))) for path, m in net.named_modules()}
    nw.accelerate(net)
    assert {path: (type(m), set(vars(m))) for path, m in net.named_modules()} == before


def test_in_place_keeps_the_parameters() -> None:
    net = small()
    parameters = list(net.parameters())
    fast, _ = nw.accelerate(net, inplace=True)
    assert fast is net
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "accelerated again": lambda m: nw.accelerate(m).model,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_fused_and_independent(way: str) -> None:
    net = small()
    fast, _ = nw.accelerate(net)
    other = COPIES[way](fast)
    assert all(a is not b for a, b in zip(fast.parameters(), other.parameters(), strict=True))
    assert_same(trained(other, (X,)), trained(copy.deepcopy(net), (X,)))
    assert any(runs_of(other))
    assert_same(trained(fast, (X,)), trained(copy.deepcopy(net), (X,)))


def test_a_shallow_copy_calls_its_own_children() -> None:
    fast, _ = nw.accelerate(small())
    other = copy.copy(fast[0])
    other._modules = dict(other._modules)
    other[1] = nn.Identity()
    y = other(X)
    assert torch.equal(y, fast[0][2](fast[0][0](X)))


def test_replicas_of_data_parallel_use_their_own_parameters() -> None:
    fast, _ = nw.accelerate(small())
    replica: Any = fast[0]._replicate_for_data_parallel()
    replica._modules = {n: copy.deepcopy(m) for n, m in fast[0]._modules.items()}
    with torch.no_grad():
        replica._modules["0"].weight.zero_()
    assert not torch.equal(replica(X), fast[0](X))


def test_classes_and_names_stay() -> None:
    net = small()
    fast, _ = nw.accelerate(net)
    assert is_accelerated(fast[0])
    assert isinstance(fast[0], nn.Sequential)
    assert type(fast[0]).__name__ == "Sequential"
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in net.named_modules()]
    assert fast[0][:2](X).shape == (2, 4, 6, 6)  # a slice is made by the class


def test_a_slice_of_a_container_works() -> None:
    net = small()
    fast, _ = nw.accelerate(net)
    torch.testing.assert_close(fast[0][0:3](X), net[0][0:3](X))


def test_example_inputs_measure_the_difference() -> None:
    _, report = nw.accelerate(small(), X)
    assert report.facts["difference"] < 1e-12


def test_inputs_that_the_model_rejects() -> None:
    with pytest.raises(InputError, match="run on the example inputs"):
        nw.accelerate(small(), torch.randn(2, 5))


def test_norms_of_every_kind_are_swapped() -> None:
    net = nn.Sequential(
        nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.RMSNorm(4),
        nn.BatchNorm1d(4), nw.nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(),
    )  # fmt: skip
    _, report = nw.accelerate(net, inplace=True)  # lazy ones cannot be copied
    told = [(e.action, e.reason) for e in report]
    assert told[:4] == [("swapped", "kind")] * 4
    assert told[4:] == [
        ("swapped", "no-activation"), ("left", "no-activation"), ("left", "synchronised"),
        ("left", "uninitialized"),
    ]  # fmt: skip


def test_the_report_prints_and_saves(tmp_path: Path) -> None:
    _, report = nw.accelerate(small())
    assert "2 norms: 1 fused, 1 swapped" in str(report)
    report.save_html(tmp_path / "report.html")
    assert "relu" in (tmp_path / "report.html").read_text()
    assert report["0.1"].into == "relu"


def test_the_page_explains_every_reason() -> None:
    page = (Path(__file__).parent.parent / "docs" / "accelerate.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == set(REASONS)


def test_other_tools_see_the_model_as_written() -> None:
    net = small()
    fast, _ = nw.accelerate(net)
    folded, report = nw.fold(fast.eval(), X)
    assert [e.action for e in report] == ["folded", "folded"]
    torch.testing.assert_close(folded(X), net(X))
    back, _ = nw.convert(fast, "torch")
    torch.testing.assert_close(back(X), net(X))
    with nw.memory_saver():
        y = fast.train()(X)
    torch.testing.assert_close(y, net.train()(X))


def test_autograd_keeps_less() -> None:
    def kept(model: nn.Module) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(X)
        del y
        return sum(seen.values())

    net = nn.Sequential(conv_bn(3, 8, 3), conv_bn(8, 8, 3)).double()
    net[0][2] = nn.SiLU()
    fast, _ = nw.accelerate(net)
    assert kept(fast) < 0.8 * kept(net)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_by_the_backend(training: bool) -> None:
    torch._dynamo.reset()
    net = randomise(NETWORKS[0].make()).double()
    inputs = in_float64(NETWORKS[0].inputs())
    compiled = torch.compile(copy.deepcopy(net), backend="normwise")
    assert_same(trained(compiled, inputs, training), trained(net, inputs, training))


def test_captured_graphs_hold_the_fused_calls() -> None:
    from normwise.tools.accelerate.compiler import normwise

    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        run = normwise(module, inputs)
        graphs.append(module.graph)
        return run

    torch._dynamo.reset()
    net = randomise(NETWORKS[0].make()).train()
    torch.compile(net, backend=backend)(*NETWORKS[0].inputs())
    names = [getattr(n.target, "__name__", "") for n in graphs[0].nodes]
    assert names.count("function_norm_add") == 2
    assert names.count("function_norm") == 6
    assert "batch_norm" not in names
    assert "relu" not in names


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_an_accelerated_model_is_compiled_as_written() -> None:
    torch._dynamo.reset()
    net = small()
    fast, _ = nw.accelerate(net)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert_same(trained(compiled, (X,)), trained(net, (X,)))


def test_exported_and_transformed() -> None:
    net = small().eval()
    fast, _ = nw.accelerate(net)
    program = torch.export.export(fast, (X,))
    torch.testing.assert_close(program.module()(X), net(X))
    parameters = dict(fast.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(fast, p, (X,)).square().sum())(
        parameters
    )
    net(X).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad)
