"""``convert``: the same function in another class, all that was learned kept, and the way back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.errors import InputError
from normwise.tools.convert import REASONS, TARGETS


class Net(nn.Module):
    """Every batch norm of torch.nn, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.again = nn.Sequential(nn.ReLU(), self.bn)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.untracked = nn.BatchNorm2d(8, track_running_stats=False)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.bn(self.conv(x)))
        x = self.untracked(self.plain(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def learned(model: nn.Module) -> nn.Module:
    """With statistics and parameters that are nobody's defaults."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {"ghost": {"ghost_size": 2}}
KEEPS_FUNCTION = ("normwise", "sync", "ghost", "renorm")


def same_state(a: nn.Module, b: nn.Module) -> bool:
    s, t = a.state_dict(), b.state_dict()
    return s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)


@pytest.mark.parametrize("to", KEEPS_FUNCTION)
def test_eval_is_the_same_function(to: str) -> None:
    net = learned(Net()).eval()
    if to == "ghost":  # without statistics it normalizes by the batch in eval, and ghosts differ
        net.untracked = nn.Identity()
    new, report = nw.convert(net, to, X, **OPTIONS.get(to, {}))
    assert report.facts["difference"] < 1e-5  # float32 rounding of two kernels
    left = {"untracked": "no-statistics"} if to == "renorm" else {}
    assert {e.name: e.reason for e in report if e.action == "left"} == left
    torch.testing.assert_close(new(X), net(X), rtol=1e-5, atol=1e-5)


def test_ghosts_without_statistics_are_another_function() -> None:
    _, report = nw.convert(learned(Net()).eval(), "ghost", X, ghost_size=2)
    assert [e.name for e in report if not e.facts["preserved"]] == ["untracked"]


def test_instance_norm_with_statistics_has_the_same_eval() -> None:
    net = learned(Net()).eval()
    new, report = nw.convert(net, "instance", X)
    assert report["head.1"].reason == "no-positions"
    assert not report["untracked"].facts["preserved"]
    net.untracked = new.untracked = nn.Identity()  # it normalizes by batch or sample in eval too
    torch.testing.assert_close(new(X), net(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["normwise", "sync", "ghost", "renorm"])
def test_state_dict_keys_and_values_stay(to: str) -> None:
    net = learned(Net())
    new, _ = nw.convert(net, to, **OPTIONS.get(to, {}))
    assert same_state(new, net)


def test_round_trip_is_the_same_to_the_last_bit() -> None:
    net = learned(Net())
    way: Any = net
    for to in ("normwise", "sync", "normwise", "torch"):
        way = nw.convert(way, to).model
    assert same_state(way, net)
    kinds = {path: type(m) for path, m in net.named_modules()}
    assert {path: type(m) for path, m in way.named_modules()} == kinds
    assert (way.bn.eps, way.bn.momentum, way.head[1].momentum) == (1e-3, 0.2, None)


@pytest.mark.parametrize("to", ["sync", "ghost", "renorm"])
def test_variants_go_back_to_the_class_they_came_from(to: str) -> None:
    new, _ = nw.convert(learned(Net()), to, **OPTIONS.get(to, {}))
    back, _ = nw.convert(new, "torch")
    assert type(back.bn) is nn.BatchNorm2d
    assert type(back.head[1]) is nn.BatchNorm1d


def test_frozen_has_no_parameters_and_the_same_eval() -> None:
    net = learned(Net()).eval()
    new, report = nw.convert(net, "frozen", X)
    assert report["bn"].into == "FrozenBatchNorm"
    assert report["untracked"].reason == "no-statistics"
    assert not list(new.bn.parameters())
    assert report.facts["difference"] < 1e-5


def test_group_keeps_scale_and_shift_and_says_that_the_function_changes() -> None:
    net = learned(Net()).eval()
    new, report = nw.convert(net, "group", X, num_groups=4)
    assert isinstance(new.bn, nn.GroupNorm)
    assert new.bn.num_groups == 4
    assert torch.equal(new.bn.weight, net.bn.weight)
    assert not report["bn"].facts["preserved"]
    assert report.facts["difference"] > 1e-2


def test_a_norm_in_two_places_stays_one() -> None:
    new, _ = nw.convert(Net(), "normwise")
    assert new.bn is new.again[1]
    assert isinstance(new.bn, nw.nn.BatchNorm2d)


def test_the_given_model_stays_as_it_was() -> None:
    net = learned(Net())
    before = copy.deepcopy(net)
    new, _ = nw.convert(net, "normwise", X)
    new.bn.weight.data.zero_()
    assert same_state(net, before)
    assert type(net.bn) is nn.BatchNorm2d
    assert net.training


def test_in_place_keeps_the_parameters_that_an_optimizer_holds() -> None:
    net = Net()
    weight = net.bn.weight
    new, _ = nw.convert(net, "normwise", inplace=True)
    assert new is net
    assert isinstance(net.bn, nw.nn.BatchNorm2d)
    assert net.bn.weight is weight


def test_options_modes_hooks_and_attributes_go_along() -> None:
    bn = nw.nn.BatchNorm2d(8, activation="relu", channel_dim=-1, nonfinite="skip").eval()
    bn.weight.requires_grad_(False)
    bn.tag = "mine"
    calls = []
    bn.register_forward_hook(lambda module, args, output: calls.append(1))
    new, _ = nw.convert(nn.Sequential(bn), "sync", inplace=True)
    sync: Any = new[0]
    assert isinstance(sync, nw.nn.SyncBatchNorm)
    options = (sync.activation, sync.channel_dim, sync.nonfinite, sync.tag, sync.training)
    assert options == ("relu", -1, "skip", "mine", False)
    assert not sync.weight.requires_grad
    new(torch.randn(2, 4, 4, 8))
    assert calls == [1]


def test_what_torch_cannot_express_stays() -> None:
    net = nn.Sequential(nw.nn.BatchNorm2d(3, activation="relu"), nw.nn.BatchNorm(3))
    _, report = nw.convert(net, "torch")
    assert [e.reason for e in report] == ["no-such-option", "rank-unknown"]
    new, report = nw.convert(net, "torch", X)
    assert report["1"].into == "BatchNorm2d"
    assert type(new[1]) is nn.BatchNorm2d


def test_torch_sync_becomes_plain_again() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    ours, report = nw.convert(net, "normwise")
    assert report["1"].into == "BatchNorm"
    assert same_state(ours, net)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (nn.LayerNorm((4, 6)), nw.nn.LayerNorm),
        (nn.RMSNorm(6), nw.nn.RMSNorm),
        (nn.GroupNorm(2, 4, affine=False), nw.nn.GroupNorm),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nw.nn.InstanceNorm1d),
        (nn.LayerNorm(6, bias=False), nw.nn.LayerNorm),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_whole_family_goes_and_comes_back(theirs: nn.Module, ours: type) -> None:
    net = nn.Sequential(learned(theirs)).eval()
    x = torch.randn(2, 4, 6)
    new, report = nw.convert(net, "normwise", x)
    assert type(new[0]) is ours
    assert report.facts["difference"] < 1e-5
    back, _ = nw.convert(new, "torch")
    assert type(back[0]) is type(theirs)
    assert same_state(back, net)


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_class_with_a_forward_of_its_own_stays() -> None:
    net = nn.Sequential(Own(3), nn.LazyBatchNorm2d())
    new, report = nw.convert(net, "normwise", inplace=True)  # torch copies no lazy buffers
    assert [e.reason for e in report] == ["custom-class", "uninitialized"]
    assert type(new[0]) is Own


def test_the_model_itself_may_be_a_norm() -> None:
    new, report = nw.convert(nn.BatchNorm1d(3), "normwise")
    assert type(new) is nw.nn.BatchNorm1d
    assert report[""].action == "converted"


def test_training_goes_on_as_before() -> None:
    net = learned(Net())
    new, _ = nw.convert(net, "normwise")
    cotangent = torch.randn(4, 4)
    for model in (net, new):
        model(X).backward(cotangent)
    for (name, p), q in zip(net.named_parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(new.bn.running_var, net.bn.running_var)


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("batch", {}, "kind that is known; got 'batch'"),
        ("ghost", {}, "ghost_size"),
        ("ghost", {"ghost_size": 0}, "ghost_size"),
        ("sync", {"groups": 2}, "groups=2"),
    ],
)
def test_wrong_targets_and_options(to: str, options: dict[str, Any], words: str) -> None:
    net = Net()
    with pytest.raises(InputError, match=words):
        nw.convert(net, to, **options)
    assert type(net.bn) is nn.BatchNorm2d


def test_inputs_that_the_model_rejects() -> None:
    with pytest.raises(InputError, match="run on the example inputs"):
        nw.convert(Net(), "normwise", torch.randn(2, 5))


def test_the_page_explains_every_reason_and_every_target() -> None:
    page = (Path(__file__).parent.parent / "docs" / "convert.md").read_text()
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))
    assert explained == set(REASONS)
    assert all(f"`'{to}'`" in page for to in TARGETS)


def test_the_targets_are_those_of_the_contract() -> None:
    assert set(TARGETS) == {
        "normwise", "torch", "sync", "frozen", "ghost", "renorm", "group", "instance"
    }  # fmt: skip


@pytest.mark.parametrize("to", ["normwise", "torch", "group", "instance", "ghost", "frozen"])
def test_an_option_that_the_target_has_not_is_refused(to: str) -> None:
    with pytest.raises(InputError, match="colour"):
        nw.convert(nn.Sequential(nn.BatchNorm2d(4)), to, colour="red")
