from __future__ import annotations

import torch
from torch import nn

import normwise as nw
from doctor import Case, Cases, norm

X = torch.ones(2, 8, 6, 6)


def check_on(*modules: nn.Module, **expected: object) -> Case:
    return Case(nn.Sequential(*modules), {"example_inputs": X}, **expected)


FIRES: Cases = {
    "at the input": lambda: check_on(
        norm(),
        nn.Conv2d(8, 8, 5, padding=2),
        expect={("0", "info")},
        figures={"after": "1", "padding": 2},
    ),
    "said 'same'": lambda: check_on(
        norm(),
        nn.Conv2d(8, 8, 3, padding="same"),
        expect={("0", "info")},
        figures={"padding": 1},
    ),
    "after an activation": lambda: check_on(
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        norm(),
        nn.Conv2d(8, 8, 3, padding=(0, 1)),
        expect={("2", "info")},
        figures={"after": "3", "padding": 1},
    ),
}
QUIET: Cases = {
    "no padding": lambda: check_on(norm(), nn.Conv2d(8, 8, 3)),
    "reflected": lambda: check_on(norm(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "folds upward": lambda: check_on(nn.Conv2d(8, 8, 3), norm(), nn.Conv2d(8, 8, 3, padding=1)),
    "activation between": lambda: check_on(norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "activation inside": lambda: check_on(
        norm(8, lambda n: nw.nn.BatchNorm2d(n, activation="relu")), nn.Conv2d(8, 8, 3, padding=1)
    ),
}


def digits(model: nn.Module, data: object) -> Case:
    return Case(
        nn.Sequential(norm(1), model),
        {"example_inputs": next(iter(data))[0]},
        {("0", "info")},
        {"after": "1.conv1", "padding": 1},
    )
