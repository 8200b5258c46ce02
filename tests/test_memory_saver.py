"""memory_saver(): the same gradients bit for bit, and outputs that are really gone."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import normwise as nw
from examples.memory_saver import main as example
from normwise.functional.observer import LISTENERS
from normwise.tools import memory
from normwise.tools.memory import memory_saver


def bn(channels: int, activation: str | None = "relu") -> nn.Module:
    norm = nw.nn.BatchNorm2d(channels, activation=activation)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class Residual(nn.Module):
    """A stage: a shortcut with a norm, then blocks whose outputs are each the next's residual."""

    def __init__(self, blocks: int, activation: str = "relu") -> None:
        super().__init__()
        self.first, self.shortcut = conv(), nn.Sequential(conv(), bn(4, None))
        self.convs = nn.ModuleList(conv() for _ in range(blocks))
        self.norms = nn.ModuleList(bn(4, activation) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        residual = self.shortcut(x)
        for c, norm in zip(self.convs, self.norms, strict=True):
            x = norm(c(x), residual=residual)
            residual = x
        return x


class Views(nn.Module):
    """The next layer keeps views of the output: flattened, sliced, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = bn(4), nn.Linear(6, 6), nn.Linear(2 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        part = self.inner(y[:, 1:3].transpose(2, 3))
        return self.outer(part.flatten(1)) + self.outer(y[:, 2:].flatten(1)) * y.mean()


class InPlace(nn.Module):
    """y is written to before the convolution reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = bn(4, None), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).add_(1))


class Twice(nn.Module):
    """Two readers of one output, and the same layer again on its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = bn(4), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.two(self.norm(self.one(y) * self.two(y)))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = bn(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x, mask=x[:, :1] > -1))


STACKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Each with the number of outputs that are dropped.
    "stack": (
        lambda: nn.Sequential(conv(), bn(4), conv(), bn(4, "silu"), conv(), bn(4), conv()),
        3,
    ),
    "no activation": (lambda: nn.Sequential(conv(), bn(4, None), conv()), 1),
    "norm of norm": (lambda: nn.Sequential(bn(4, None), bn(4, "gelu"), conv()), 2),
    "pooled": (lambda: nn.Sequential(conv(), bn(4), nn.MaxPool2d(2), conv()), 1),
    "short chain": (lambda: nn.Sequential(Residual(3), conv()), 3),
    # Outputs 4 and 9 are kept: see LIMIT. The shortcut's norm is the first link.
    "long chain": (lambda: nn.Sequential(Residual(11), conv()), 9),
    "silu chain": (lambda: nn.Sequential(Residual(5, "silu"), conv()), 5),
    "views": (Views, 1),
    "in place": (InPlace, 0),
    "twice": (Twice, 2),
    "masked": (Masked, 1),
}


def gradients(model: nn.Module, x: Tensor, save: bool) -> tuple[list[Tensor], memory.Saved | None]:
    """The loss, the gradients and the buffers of one step; the model stays as it was."""
    model, x = copy.deepcopy(model), x.detach().clone().requires_grad_()
    g = torch.Generator().manual_seed(5)
    saved = None
    if save:
        with memory_saver() as saved:
            y = model(x)
            loss = (y * torch.randn(y.shape, generator=g).to(y)).sum()
    else:
        y = model(x)
        loss = (y * torch.randn(y.shape, generator=g).to(y)).sum()
    loss.backward()
    results = [loss.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    return [t for t in results if t is not None], saved


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_are_the_same_bit_for_bit(name: str, training: bool) -> None:
    make, dropped = STACKS[name]
    model, x = make().train(training), torch.randn(3, 4, 6, 6) + 2
    expected, _ = gradients(model, x, False)
    actual, saved = gradients(model, x, True)
    assert_same(actual, expected)
    assert saved is not None
    assert saved.tensors == dropped
    assert saved.bytes == dropped * x.numel() * 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["stack", "short chain"])
def test_layouts_and_dtypes(
    name: str, dtype: torch.dtype, layout: torch.memory_format, backend: str
) -> None:
    model = STACKS[name][0]().to(dtype=dtype, memory_format=layout)
    x = torch.randn(3, 4, 7, 5).to(dtype=dtype, memory_format=layout)
    expected, _ = gradients(model, x, False)
    actual, saved = gradients(model, x, True)
    assert_same(actual, expected)
    assert saved is not None
    assert saved.tensors == STACKS[name][1]


def test_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nw.nn.BatchNorm1d(6, activation="relu"), nn.Linear(6, 3))
    x = torch.randn(16, 8)
    actual, saved = gradients(model, x, True)
    assert_same(actual, gradients(model, x, False)[0])
    assert saved is not None
    assert (saved.tensors, saved.bytes) == (1, 16 * 6 * 4)


def test_autocast() -> None:
    model, x = STACKS["stack"][0](), torch.randn(3, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = gradients(model, x, False)[0], gradients(model, x, True)[0]
    assert_same(actual, expected)


def alive(storages: list[StorageWeakRef]) -> list[bool]:
    gc.collect()
    return [not s.expired() for s in storages]


@pytest.mark.parametrize("save", [True, False])
def test_outputs_are_gone_after_the_forward_and_inputs_after_the_backward(save: bool) -> None:
    model = nn.Sequential(conv(), bn(4), conv(), bn(4, None), conv())
    inputs: list[StorageWeakRef] = []
    outputs: list[StorageWeakRef] = []
    for layer in model:
        if isinstance(layer, nw.nn.BatchNorm2d):

            def hook(m: nn.Module, args: Any, y: Tensor) -> None:
                inputs.append(StorageWeakRef(args[0].untyped_storage()))
                outputs.append(StorageWeakRef(y.untyped_storage()))

            layer.register_forward_hook(hook)
    if save:
        with memory_saver():
            loss = model(torch.randn(2, 4, 6, 6)).square().mean()
            assert alive(outputs) == [False, False]
            loss.backward()
            # Inside the block too: a loop of training steps in one block holds nothing back.
            assert alive(inputs) == [False, False]
    else:
        loss = model(torch.randn(2, 4, 6, 6)).square().mean()
        assert alive(outputs) == [True, True]
        loss.backward()
        assert alive(inputs) == [False, False]
    assert alive(outputs) == [False, False]


def test_discarded_graphs_leave_nothing() -> None:
    model, refs = nn.Sequential(conv(), bn(4), conv()), []
    with memory_saver():
        for _ in range(3):
            x = model[0](torch.randn(2, 4, 6, 6))
            refs.append(StorageWeakRef(x.untyped_storage()))
            y = model[2](model[1](x))
            del x, y
        del model
        assert alive(refs) == [False] * 3


def test_readers_share_one_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    original = memory._Recipe._recompute

    def counting(self: Any) -> Tensor:
        nonlocal count
        count += 1
        return original(self)

    monkeypatch.setattr(memory._Recipe, "_recompute", counting)
    for name, expected in (("twice", 2), ("short chain", 4), ("long chain", 10)):
        count = 0
        gradients(STACKS[name][0](), torch.randn(3, 4, 6, 6), True)
        assert count == expected, name  # in chains one more than dropped: the shortcut's norm


def test_residual_that_nobody_else_keeps() -> None:
    """To keep the shortcut instead of the output would save nothing."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.norm = conv(), conv(), conv(), bn(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.a(x), residual=self.b(x)))

    model, x = Block(), torch.randn(2, 4, 6, 6)
    actual, saved = gradients(model, x, True)
    assert_same(actual, gradients(model, x, False)[0])
    assert saved is not None
    assert saved.tensors == 0


def test_second_order() -> None:
    model = nn.Sequential(conv(), bn(4, "silu"), conv(), bn(4, None), conv()).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for save in (False, True):
        with memory_saver() if save else torch.enable_grad():
            loss = model(x).square().mean()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.square().sum(), [x, *model.parameters()])])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_gradgradcheck() -> None:
    norm, weight = bn(2, "silu").double(), torch.randn(2, 2, 1, 1, dtype=torch.float64)

    def function(x: Tensor, w: Tensor) -> Tensor:
        with memory_saver():
            return nn.functional.conv2d(norm(x), w)

    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weight.requires_grad_()))
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_two_backwards_of_one_graph() -> None:
    model, x = STACKS["short chain"][0](), torch.randn(3, 4, 6, 6)
    with memory_saver():
        loss = model(x).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_same(list(torch.autograd.grad(loss, parameters)), list(first))


def test_two_forwards_in_one_block() -> None:
    model, inputs = STACKS["stack"][0](), [torch.randn(3, 4, 6, 6) for _ in range(2)]
    results = []
    for save in (False, True):
        own = copy.deepcopy(model)
        with memory_saver() if save else torch.enable_grad():
            losses = [own(x).square().mean() for x in inputs]
        (losses[0] - 3 * losses[1]).backward()
        results.append([p.grad for p in own.parameters()])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("layer", [0, 1, 2], ids=["convolution", "norm", "next convolution"])
def test_parameters_written_to_before_the_backward(layer: int) -> None:
    model = nn.Sequential(conv(), bn(4), conv())
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for save in (False, True):
        with memory_saver() if save else torch.enable_grad():
            loss = model(x).square().mean()
        with torch.no_grad():
            model[layer].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version"):
            loss.backward()


def test_input_written_to_before_the_backward() -> None:
    norm, after = bn(4), conv()
    x = torch.randn(2, 4, 6, 6)
    with memory_saver():
        loss = after(norm(x)).square().mean()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_written_to_after_it_was_read() -> None:
    """Plain autograd refuses; here the values that were read are made again."""
    norm, after, x = bn(4), conv(), torch.randn(2, 4, 6, 6)
    after(norm(x)).square().mean().backward()
    expected = after.weight.grad.clone()
    after.weight.grad = None
    with memory_saver():
        y = norm(x)
        loss = after(y).square().mean()
        y.detach().zero_()
    loss.backward()
    assert torch.equal(after.weight.grad, expected)


def test_detached_output() -> None:
    norm, after, x = bn(4), conv(), torch.randn(2, 4, 6, 6)
    after(norm(x).detach()).square().mean().backward()
    expected = after.weight.grad.clone()
    after.weight.grad = None
    with memory_saver():
        loss = after(norm(x).detach()).square().mean()
    loss.backward()
    assert torch.equal(after.weight.grad, expected)


def test_memory_of_the_output_used_again() -> None:
    """A view that outlives the norm's graph keeps its own values, whatever sits at an address."""
    norm, after = bn(4), conv()
    with memory_saver():
        for _ in range(20):
            y = norm(torch.randn(2, 4, 6, 6)).detach()
            other = torch.randn(2, 4, 6, 6)
            loss = (after(y) * after(other)).sum()
            (grad,) = torch.autograd.grad(loss, after.weight)
            (want,) = torch.autograd.grad((after(y.clone()) * after(other)).sum(), after.weight)
            assert torch.equal(grad, want)
            del y, other, loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_inside(reentrant: bool) -> None:
    inner, outer = nn.Sequential(bn(4), conv(), bn(4)), conv()
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    results = []
    for save in (False, True):
        inner_copy, outer_copy = copy.deepcopy(inner), copy.deepcopy(outer)
        with memory_saver() if save else torch.enable_grad():
            y = checkpoint(inner_copy, x * 1, use_reentrant=reentrant)
            loss = outer_copy(y).square().mean()
        loss.backward()
        parameters = [*inner_copy.parameters(), *outer_copy.parameters()]
        results.append([p.grad for p in parameters])
    assert_same(results[1], results[0])


def test_inside_a_checkpoint() -> None:
    model, x = STACKS["stack"][0](), torch.randn(3, 4, 6, 6, requires_grad=True)

    def saving(x: Tensor) -> Tensor:
        with memory_saver():
            return model(x)

    results = []
    for function in (model, saving):
        loss = checkpoint(function, x, use_reentrant=False).square().mean()
        results.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    assert_same(results[1], results[0])


def test_other_hooks_inside() -> None:
    model, x = STACKS["stack"][0](), torch.randn(3, 4, 6, 6)
    expected, _ = gradients(model, x, False)
    with memory_saver(), save_on_cpu():
        actual, _ = gradients(model, x, False)
    assert_same(actual, expected)


def test_nested_blocks() -> None:
    first, second = nn.Sequential(conv(), bn(4)), nn.Sequential(conv(), bn(4))
    last, x = conv(), torch.randn(3, 4, 6, 6)
    with memory_saver() as outer:
        y = first(x)
        with memory_saver() as inner:
            z = second(y)  # keeps y, which was made outside
        loss = last(z).square().mean()
    assert (outer.tensors, inner.tensors) == (2, 1)
    parameters = [*first.parameters(), *second.parameters(), *last.parameters()]
    actual = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(last(second(first(x))).square().mean(), parameters)
    assert_same(list(actual), list(expected))


def test_an_exception_ends_the_block() -> None:
    model = nn.Sequential(conv(), bn(4), conv())
    reports = []

    def failing() -> None:
        with memory_saver() as saved:
            reports.append(saved)
            model(torch.randn(2, 4, 6, 6))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert not LISTENERS
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert reports[0].tensors == 1


def test_other_threads_do_not_take_part() -> None:
    model, x = nn.Sequential(conv(), bn(4), conv()), torch.randn(2, 4, 6, 6)
    with memory_saver() as saved:
        thread = threading.Thread(target=lambda: model(x).sum().backward())
        thread.start()
        thread.join()
    assert saved.tensors == 0
    assert model[0].weight.grad is not None


def test_backward_in_another_thread() -> None:
    model, x = nn.Sequential(conv(), bn(4), conv()), torch.randn(2, 4, 6, 6)
    with memory_saver():
        loss = model(x).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same([p.grad for p in model.parameters() if p.grad is not None], list(expected))


def test_without_a_gradient_there_is_nothing_to_save() -> None:
    model = nn.Sequential(conv(), bn(4), conv())
    with memory_saver() as saved, torch.no_grad():
        model(torch.randn(2, 4, 6, 6))
    with memory_saver() as frozen:
        model.eval().requires_grad_(False)(torch.randn(2, 4, 6, 6))
    assert saved.tensors == frozen.tensors == 0


def test_as_a_decorator() -> None:
    model, x = nn.Sequential(conv(), bn(4), conv()), torch.randn(2, 4, 6, 6)

    @memory_saver()
    def forward() -> Tensor:
        assert LISTENERS
        return model(x)

    for _ in range(2):
        forward().sum().backward()
        assert not LISTENERS


def test_report() -> None:
    saved = memory.Saved()
    assert repr(saved) == "0.0 MB in 0 outputs recomputed instead of kept"
    saved.bytes, saved.tensors = 12_345_678, 1
    assert str(saved) == "12.3 MB in 1 output recomputed instead of kept"


def test_tensors_without_a_storage_pass_through() -> None:
    """Sparse matrices and the like are kept as they are."""
    norm = nw.nn.BatchNorm1d(3, activation="relu")
    matrix = torch.eye(4).to_sparse()
    with memory_saver():
        loss = torch.sparse.mm(matrix, norm(torch.randn(4, 3, requires_grad=True))).square().sum()
    loss.backward()
    assert norm.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_compiled_calls_ignore_it() -> None:
    """One graph with and without the block, and the same gradients."""
    torch._dynamo.reset()
    model, x = nn.Sequential(conv(), bn(4), conv()), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(compiled(x).square().mean(), parameters)
    with memory_saver() as saved, torch._dynamo.config.patch(error_on_recompile=True):
        loss = compiled(x).square().mean()
    assert_same(list(torch.autograd.grad(loss, parameters)), list(expected))
    assert saved.tensors == 0
    torch._dynamo.reset()


def test_example() -> None:
    result = example(["--batch", "2", "--size", "32", "--width", "8", "--rounds", "0"])
    assert result["equal"]
    assert result["forward"] < 0.7
