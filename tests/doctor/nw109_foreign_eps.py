from __future__ import annotations

from typing import Any

from torch import nn

from doctor import Case, Cases, net, norm


def keras() -> Case:
    """sqrt((0.001 + 0.001) / (0.001 + 0.00001)) = 1.407."""
    bn = norm(running_var=0.001)
    expect, figures = {("bn", "warning")}, {"difference": 0.4072, "expected": 1e-3}
    return Case(net(bn=bn), {"framework": "Keras"}, expect, figures)


def flax() -> Case:
    bn = norm(running_var=0.01, eps=1e-3)
    return Case(net(bn=bn), {"framework": "flax"}, {("bn", "warning")}, {"expected": 1e-5})


def harmless() -> Case:
    bn = norm(running_var=10.0)
    return Case(net(bn=bn), {"framework": "tf-slim"}, {("bn", "info")}, {"difference": 4.95e-5})


FIRES: Cases = {"Keras": keras, "Flax": flax, "large variances": harmless}
QUIET: Cases = {
    "no framework": lambda: Case(net(bn=norm(eps=1e-3))),
    "its eps": lambda: Case(net(bn=norm(eps=1e-3)), {"framework": "keras"}),
    "keras.applications' 1.001e-5": lambda: Case(net(bn=norm(eps=1.001e-5)), {"framework": "flax"}),
    "a checkpoint does not say": lambda: Case(net(bn=norm()).state_dict(), {"framework": "keras"}),
    "NaN": lambda: Case(net(bn=norm(running_var=float("nan"))), {"framework": "keras"}),
    "not a batch norm": lambda: Case(net(ln=nn.LayerNorm(4)), {"framework": "keras"}),
}


def digits(model: Any, data: Any) -> Case:
    """The first layers have channels of a variance around 0.1, the last only larger ones."""
    expect = {("bn1", "warning"), ("bn2", "warning"), ("bn3", "info")}
    return Case(model, {"framework": "keras"}, expect, {"framework": "keras", "eps": 1e-5})
