from __future__ import annotations

import copy
from typing import Any

from doctor import Case, Cases, net, norm


def sorted_data() -> Case:
    """(1.5 - -1.0) / 7 apart in mean, on channel 0 of variance 0.5."""
    here, there = net(bn=norm()), net(bn=norm())
    there.bn.running_mean += 0.5
    figures = {"mean_gap": 0.5 / (0.5 + 1e-5) ** 0.5, "log_variance_ratio": 0.0, "peers": 1}
    return Case(here, {"peers": [there]}, {("bn", "warning")}, figures)


def variances() -> Case:
    here, there = net(bn=norm()), net(bn=norm())
    there.bn.running_mean += 1e-6
    there.bn.running_var *= 4
    kwargs = {"peers": {"rank 1": there.state_dict(), "rank 2": here.state_dict()}}
    return Case(here, kwargs, {("bn", "warning")}, {"log_variance_ratio": 1.386, "peer": "rank 1"})


def last_batch() -> Case:
    """What one update after the last broadcast leaves."""
    here, there = net(bn=norm()), net(bn=norm())
    there.bn.running_mean += 0.02
    return Case(here, {"peers": [there]}, {("bn", "info")}, {"mean_gap": 0.02828})


def another_step() -> Case:
    here, there = net(bn1=norm(), bn2=norm()), net(bn1=norm(), bn2=norm())
    there.bn1.running_mean += 1
    there.bn2.weight[0] += 1e-3
    return Case(here, {"peers": [there]})


def biased() -> Case:
    here, there = net(bn=norm()), net(bn=norm())
    there.bn.running_var *= 16 / 15
    return Case(here, {"peers": [there]})


FIRES: Cases = {"sorted data": sorted_data, "variances": variances, "the last batch": last_batch}
QUIET: Cases = {
    "the same": lambda: Case(net(bn=norm()), {"peers": [net(bn=norm())]}),
    "another step": another_step,
    "another convention": biased,
    "another model": lambda: Case(net(bn=norm()), {"peers": [net(other=norm(running_mean=9.0))]}),
}


def digits(model: Any, data: Any) -> Case:
    """Two ranks, the second with the zeros and ones alone: the data are sorted."""
    other = copy.deepcopy(model).train()
    images, classes = data.dataset.tensors
    for _ in range(12):
        for x in images[classes < 2].split(64)[:-1]:
            other(x)
    expect = {(name, "warning") for name in ("bn1", "bn2", "bn3")}
    return Case(model, {"peers": [other.eval()]}, expect, {"peer": "peer 1"})
