from __future__ import annotations

from typing import Any

from torch import nn

from doctor import Case, Cases, net, norm


def counts(**tracked: int) -> nn.Module:
    return net(**{name: norm(num_batches_tracked=n) for name, n in tracked.items()})


def shared() -> Case:
    model = counts(bn1=1000, bn2=1000, bn3=3000, bn4=1000)
    return Case(model, {}, {("bn3", "warning")}, {"times": 3, "usual": 1000})


def nearly() -> Case:
    model = counts(bn1=1003, bn2=1000, bn3=2002, bn4=1000)
    return Case(model, {}, {("bn3", "warning")}, {"times": 2})


def checkpointed() -> Case:
    """All but the stem is recomputed in the backward."""
    model = counts(stem=500, bn1=1000, bn2=1000, bn3=1000)
    return Case(model, {}, {("", "warning")}, {"times": 2, "layers": ["stem"]})


FIRES: Cases = {"shared": shared, "nearly a multiple": nearly, "checkpointed": checkpointed}
QUIET: Cases = {
    "all alike": lambda: Case(counts(bn1=1000, bn2=1000, bn3=1000)),
    "a few batches more": lambda: Case(counts(bn1=1000, bn2=1001, bn3=1012)),
    "frozen for a time": lambda: Case(counts(bn1=410, bn2=1000, bn3=1000, bn4=1640)),
    "two": lambda: Case(counts(bn1=1000, bn2=2000)),
    "no counters": lambda: Case(
        {k: v for k, v in counts(a=1, b=1, c=2).state_dict().items() if "tracked" not in k}
    ),
    "untouched": lambda: Case(counts(bn1=0, bn2=0, bn3=0)),
}


def digits(model: Any, data: Any) -> Case:
    """The second norm is called twice in each forward of a short training."""
    for bn in (model.bn1, model.bn2, model.bn3):
        bn.reset_running_stats()
    model.train()
    for x, _ in data:
        h = model.bn1(model.conv1(x)).relu()
        model.bn2(model.conv2(h.flip(0)))
        model(x)
        model.bn1.num_batches_tracked -= 1
    return Case(model.eval(), {}, {("bn2", "warning")}, {"times": 2, "num_batches_tracked": 44})
