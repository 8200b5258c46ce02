"""Every rule of the doctor: what it must find, what it must not, and a real trained network."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

import doctor
import numpy as np
import pytest
import torch
from digits import CLASSES, IMAGES
from networks import NETWORKS, Network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.doctor import CheckReport, Finding, Rule, all_rules

MODULES = doctor.modules()
RULES = {rule.code: rule for rule in all_rules()}
FIRES = [(code, name) for code, m in MODULES.items() for name in m.FIRES]
QUIET = [(code, name) for code, m in MODULES.items() for name in m.QUIET]
SECTIONS = ["What it finds", "Why it is bad", "Example", "Remedy", "Sources"]


class Digits(nn.Module):
    """Two convolutions and two linear layers, a batch norm after all but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(512, 32, bias=False)
        self.bn3 = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(torch.relu(self.bn3(self.fc(x.flatten(1)))))


def decaying(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with weight decay on all matrices, and on nothing else."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.SGD(
        [{"params": matrices, "weight_decay": 1e-4}, {"params": vectors}], lr=0.1, momentum=0.9
    )


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Module, Any]:
    """The network after 154 steps on the digits (98 % right on images it never saw), and its
    data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Digits()
        dataset = TensorDataset(IMAGES[:1408].float(), CLASSES[:1408])
        shuffled = DataLoader(dataset, 64, shuffle=True, drop_last=True)
        optimizer = decaying(model)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 7 * len(shuffled))
        for _ in range(7):
            for x, y in shuffled:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                plan.step()
    return model.eval(), DataLoader(dataset, 64, drop_last=True)


@torch.no_grad()
def made(case: Callable[..., doctor.Case], *args: Any) -> doctor.Case:
    """The case, whose weights are set by hand."""
    return case(*args)


def findings(code: str, case: doctor.Case) -> list[Finding]:
    report = nw.check(case.subject, **case.kwargs)
    return [f for f in report.findings if f.code == code]


def assert_says(code: str, case: doctor.Case) -> None:
    """The findings that the case expects, and the figures."""
    found = findings(code, case)
    assert {(f.layer, f.severity) for f in found} == set(case.expect)
    for name, value in case.figures.items():
        want = pytest.approx(value, rel=1e-3) if isinstance(value, (int, float)) else value
        assert any(f.evidence.get(name) == want for f in found), [dict(f.evidence) for f in found]


# Form


@pytest.mark.parametrize("code", RULES)
def test_a_rule_has_cases(code: str) -> None:
    cases = MODULES[code]
    assert len(cases.FIRES) >= 2
    assert len(cases.QUIET) >= 2
    assert callable(cases.digits)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.code)
def test_a_page_has_its_sections(rule: Rule) -> None:
    heads = [line[3:] for line in rule.page().splitlines() if line.startswith("## ")]
    assert heads == SECTIONS


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.code)
def test_a_file_is_named_after_its_rule(rule: Rule) -> None:
    file = type(rule).__module__.rpartition(".")[2]
    assert file == f"{rule.code}_{rule.name}".lower().replace("-", "_")
    assert MODULES[rule.code].__name__ == f"doctor.{file}"


class Recorder:
    """``normwise``, whose checks are kept."""

    def __init__(self) -> None:
        self.reports: list[CheckReport] = []

    def check(self, *args: Any, **kwargs: Any) -> CheckReport:
        self.reports.append(nw.check(*args, **kwargs))
        return self.reports[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(nw, name)


@pytest.mark.parametrize("rule", [r for r in all_rules() if "nw.check(" in r.page()])
def test_the_example_of_a_page_is_found(rule: Rule) -> None:
    recorder = Recorder()
    for block in re.findall(r"```python\n(.*?)```", rule.page(), re.DOTALL):
        exec(compile(block, rule.code, "exec"), {"torch": torch, "nw": recorder})
    assert rule.code in {f.code for report in recorder.reports for f in report.findings}


def test_codes_and_names_are_unique() -> None:
    assert len({r.code for r in all_rules()}) == len({r.name for r in all_rules()}) == len(RULES)


# Findings


@pytest.mark.parametrize(("code", "name"), FIRES)
def test_fires(code: str, name: str) -> None:
    case = made(MODULES[code].FIRES[name])
    assert case.expect
    assert case.figures
    assert_says(code, case)


@pytest.mark.parametrize(("code", "name"), QUIET)
def test_quiet(code: str, name: str) -> None:
    assert findings(code, made(MODULES[code].QUIET[name])) == []


@pytest.mark.parametrize("code", MODULES)
def test_fires_on_the_doctored_network(code: str, trained: tuple[nn.Module, Any]) -> None:
    model, data = trained
    case = made(MODULES[code].digits, copy.deepcopy(model), data)
    assert case.expect
    assert_says(code, case)


def test_the_network_is_trained(trained: tuple[nn.Module, Any]) -> None:
    right = trained[0](IMAGES[1408:].float()).argmax(1) == CLASSES[1408:]
    assert right.double().mean() > 0.9


def test_a_sound_network_has_no_warning(trained: tuple[nn.Module, Any]) -> None:
    model, data = trained
    report = nw.check(
        model, data, example_inputs=IMAGES[:8].float(), optimizer=decaying(model), batches=22
    )
    assert [str(f) for f in report.at_least("warning")] == []
    assert report.facts["errors"] == {}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_nothing_is_wrong_with_a_fresh_network(network: Network) -> None:
    report = nw.check(network.make(), example_inputs=network.inputs(), select="NW1")
    assert [str(f) for f in report.at_least("warning")] == []
    # What is true of them: norms that have their activation inside.
    expected = {"NW117"} if network.name == "norms with activations" else set()
    assert {f.code for f in report.findings} == expected


# What check leaves as it was


def everything(model: nn.Module) -> dict[str, Any]:
    """Modes, attributes, hooks, and which tensors stand where."""
    hooks = [k for k in vars(nn.Module()) if "hooks" in k]
    return {
        "modes": [(n, m.training) for n, m in model.named_modules()],
        "hooks": [list(getattr(m, h)) for m in model.modules() for h in hooks],
        "plain": [
            {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, type(None)))}
            for m in model.modules()
        ],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
    }


@pytest.mark.parametrize("code", MODULES)
def test_check_changes_nothing(code: str, trained: tuple[nn.Module, Any]) -> None:
    model, data = trained
    case = made(MODULES[code].digits, copy.deepcopy(model), data)
    subject = case.subject
    if isinstance(subject, nn.Module):
        list(subject.modules())[-1].train()  # a mixture of modes is left as it was too
    state = subject.state_dict() if isinstance(subject, nn.Module) else dict(subject)
    before = {k: v.clone() for k, v in state.items()}
    held = everything(subject) if isinstance(subject, nn.Module) else None
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()  # noqa: NPY002 the global state
    nw.check(subject, **case.kwargs)
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in before.items())
    assert held == (everything(subject) if isinstance(subject, nn.Module) else None)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.random.get_state()[1].sum() == random_states[2]  # noqa: NPY002 the global state


@pytest.mark.parametrize("code", MODULES)
def test_findings_are_json(code: str) -> None:
    case = made(next(iter(MODULES[code].FIRES.values())))
    report: CheckReport = nw.check(case.subject, **case.kwargs)
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [f["code"] for f in read["findings"]] == [f.code for f in report.findings]
