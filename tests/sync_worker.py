"""One rank of a gloo group: runs the problems of test_sync.py and leaves the results in a file.

python sync_worker.py RANK RANKS DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normwise as nw

F64 = torch.float64

# name: (how many samples each rank holds, the shape of one, options of the layer, of the call)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "unequal": ((2, 5, 3), (4, 3, 5), {}, {}),
    "empty": ((3, 0, 2), (4, 6), {}, {}),
    "first empty": ((0, 4, 1), (4,), {"activation": "relu"}, {}),
    "one value each": ((1, 1, 1), (4,), {}, {}),
    "offset": ((2, 3, 4), (4, 7), {}, {"offset": 1e6}),
    "mask": ((2, 4, 3), (4, 6), {"activation": "silu"}, {"mask": True, "residual": True}),
    "masked rank": ((2, 4, 3), (4, 6), {}, {"mask": "rank 1"}),
    "all masked": ((2, 4, 3), (4, 6), {"momentum": None}, {"mask": "all"}),
    "residual": ((3, 1, 2), (4, 5, 2), {"activation": "relu"}, {"residual": True}),
    "channels_last": ((2, 1, 3), (4, 3, 5), {}, {"channels_last": True}),
    "channel-last": ((2, 1, 3), (6, 4), {"channel_dim": -1, "activation": "gelu"}, {}),
    "five axes": ((1, 2, 2), (4, 2, 3, 2), {"affine": False}, {}),
    "cumulative": ((2, 3, 1), (4, 3), {"momentum": None, "bias": False}, {}),
    "untracked": ((2, 3, 1), (4, 3), {"track_running_stats": False}, {}),
}


def draw(name: str, ranks: int) -> dict[str, Any]:
    """The whole batch of a case, on every rank the same."""
    counts, shape, options, call = CASES[name]
    counts = counts[:ranks]
    g = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    whole = (sum(counts), *shape)
    axis = options.get("channel_dim", 1) % len(whole)
    x, residual, dy = torch.randn((3, *whole), generator=g, dtype=F64)
    parameters = torch.randn((2, whole[axis]), generator=g, dtype=F64)
    flat = tuple(1 if d == axis else n for d, n in enumerate(whole))
    mask = torch.rand(flat, generator=g) < 0.6
    if call.get("mask") == "rank 1":
        mask[counts[0] : counts[0] + counts[1]] = False
    if call.get("mask") == "all":
        mask[:] = False
    return {
        "x": x * 2 + call.get("offset", 1.0),
        "residual": residual if call.get("residual") else None,
        "dy": dy,
        "mask": mask if call.get("mask") else None,
        "weight": parameters[0],
        "bias": parameters[1],
        "counts": counts,
    }


def layer_of(name: str, process_group: Any = None, dtype: torch.dtype = F64) -> nn.Module:
    ranks = dist.get_world_size()
    data = draw(name, ranks)
    layer = nw.nn.SyncBatchNorm(
        len(data["weight"]), process_group=process_group, dtype=dtype, **CASES[name][2]
    )
    with torch.no_grad():
        for parameter, value in ((layer.weight, data["weight"]), (layer.bias, data["bias"])):
            if parameter is not None:
                parameter.copy_(value)
    return layer


def own(data: dict[str, Any], key: str, rank: int) -> Tensor | None:
    start = sum(data["counts"][:rank])
    value = data[key]
    return None if value is None else value[start : start + data["counts"][rank]].clone()


def run(name: str, rank: int, layer: nn.Module | None = None) -> dict[str, Any]:
    data = draw(name, dist.get_world_size())
    layer = layer_of(name) if layer is None else layer
    x, residual, dy, mask = (own(data, k, rank) for k in ("x", "residual", "dy", "mask"))
    assert x is not None
    if CASES[name][3].get("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, residual) if t is not None]
    y = layer(x, residual=residual, mask=mask)
    y.backward(dy)
    result = {"y": y, "dx": x.grad, "dresidual": leaves[-1].grad if residual is not None else None}
    result |= {f"d{n}": p.grad for n, p in layer.named_parameters()}
    result |= dict(layer.named_buffers())
    assert y.stride() == x.stride() or y.numel() == 0
    return {k: None if t is None else t.detach().clone() for k, t in result.items()}


def cases(rank: int) -> dict[str, Any]:
    return {name: run(name, rank) for name in CASES}


def half(rank: int) -> dict[str, Tensor]:
    """bfloat16 in, with float32 parameters: nothing but the output is rounded to it."""
    data = draw("unequal", dist.get_world_size())
    layer = layer_of("unequal", dtype=torch.float32)
    x = own(data, "x", rank)
    assert x is not None
    y = layer(x.bfloat16())
    return {"y": y.detach(), "running_var": layer.running_var}


def wire(rank: int) -> dict[str, Any]:
    """How many numbers of which dtype each collective sends, in the order of the calls."""
    seen: list[tuple[str, int, str]] = []
    names = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[1] if name.startswith("all_gather") else args[0]
            seen.append(("gather" if "gather" in name else name, sent.numel(), str(sent.dtype)))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        run("unequal", rank)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"seen": seen}


def second(rank: int) -> dict[str, Tensor]:
    """The gradient of a gradient penalty, through the collectives twice."""
    data = draw("residual", dist.get_world_size())
    layer = layer_of("unequal")
    x, dy = own(data, "x", rank), own(data, "dy", rank)
    assert x is not None
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sin(), x, dy, create_graph=True)
    slope.cos().sum().backward()
    return {"dx": x.grad, "dweight": layer.weight.grad}


def parallel(rank: int) -> dict[str, Any]:
    """DistributedDataParallel with two forward passes before the backward (pytorch 175024)."""
    data = draw("unequal", dist.get_world_size())
    model = DistributedDataParallel(layer_of("unequal"))
    x, dy = own(data, "x", rank), own(data, "dy", rank)
    y = model(x) + model(2 * x)
    y.backward(dy)
    layer = model.module
    return {"y": y.detach(), "dweight": layer.weight.grad, "mean": layer.running_mean}


def held(rank: int) -> dict[str, Any]:
    """Accumulated over two micro-batches and merged over the ranks; moved, normalizing by them."""
    data = draw("unequal", dist.get_world_size())
    layer, x = layer_of("unequal"), own(data, "x", rank)
    assert x is not None
    with nw.accumulate_statistics():
        layer(x)
        layer(2 * x)
    accumulated = layer.running_var.clone()
    other = layer_of("unequal")
    other.normalize_with = "running"
    y = other(x)
    return {"accumulated": accumulated, "var": other.running_var.clone(), "y": y.detach()}


def compiled(rank: int) -> dict[str, Any]:
    """In one graph, forward and backward, collectives included."""
    layer = layer_of("unequal")
    return run("unequal", rank, torch.compile(layer, backend="aot_eager", fullgraph=True))


def subgroups(rank: int) -> dict[str, Any]:
    """Ranks 0 and the last are one group; the others are not in it."""
    ranks = [0, dist.get_world_size() - 1]
    group = dist.new_group(ranks)
    data = draw("unequal", dist.get_world_size())
    layer, x = layer_of("unequal", group), own(data, "x", rank)
    try:
        y = layer(x)
    except nw.errors.InputError as error:
        return {"error": str(error), "eval": layer.eval()(x).detach()}
    return {"y": y.detach(), "running_mean": layer.running_mean}


def failing(rank: int) -> dict[str, Any]:
    """Rank 1 does not come to a layer of rank 0; then it leaves during the backward."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    errors: dict[str, Any] = {}
    model = nn.Sequential(nn.Identity(), nw.nn.SyncBatchNorm(3, process_group=group))
    x = torch.randn(4, 3, requires_grad=True)
    y = model(x) if rank < 2 else None
    if rank == 0:
        assert y is not None
        try:
            y.sum().backward()
        except nw.errors.CollectiveError as error:
            errors["backward"] = str(error)
    dist.barrier()
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    model[1].process_group = group
    if rank == 0:
        try:
            model(x)
        except nw.errors.CollectiveError as error:
            errors["forward"] = str(error)
    dist.barrier()
    return errors


JOBS = (cases, half, wire, second, parallel, held, compiled, subgroups, failing)


def main(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    results = {job.__name__: job(rank) for job in JOBS}
    torch.save(results, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
