"""Which backends there are, how one is forced, and what is left where the kernels are not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case

import normwise as nw
from normwise import ops
from normwise.errors import InputError
from normwise.ops import cpu

ROOT = Path(__file__).parent.parent

needs_kernels = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="normwise was installed without its C++ kernels"
)


def python(code: str, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environ,
    )


TRAIN = """
import torch, normwise as nw
torch.manual_seed(0)
x = torch.randn(6, 5, requires_grad=True)
y = nw.nn.BatchNorm1d(5, activation="relu")(x)
y.backward(torch.randn(6, 5))
print("trained", bool(x.grad.abs().max() > 0))
print(nw.backends())
"""


# Telling


def test_backends_tells_what_serves() -> None:
    backends = nw.backends()
    assert list(backends) == ["cpu", "reference"]
    assert backends["reference"].available
    assert all(status.name == name for name, status in backends.items())
    assert str(backends).splitlines()[-1].startswith("reference  yes")
    assert repr(backends) == str(backends)


@needs_kernels
def test_backends_tells_the_instruction_set_in_use() -> None:
    best = cpu.instruction_sets()[-1]
    available, detail = nw.backends()["cpu"][1:]
    assert available
    assert f"{best} of {', '.join(cpu.instruction_sets())}" in detail
    with cpu.force("generic"):
        assert "generic of" in nw.backends()["cpu"].detail


@needs_kernels
def test_kernels_use_torchs_threads() -> None:
    assert "torch's threads" in nw.backends()["cpu"].detail


@needs_kernels
def test_instruction_sets_are_those_of_the_processor() -> None:
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists():
        pytest.skip("reads the flags that Linux lists for an x86 processor")
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].split("\n")[0].split())
    expected = ["generic"]
    if flags >= {"avx2", "fma", "f16c"}:
        expected.append("avx2")
    if flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq"}:
        expected.append("avx512")
    assert list(cpu.instruction_sets()) == expected


# Forcing


@needs_kernels
@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_force_selects_and_gives_back(name: str) -> None:
    before = nw.backends()["cpu"].detail
    with cpu.force(name):
        assert f"{name} of" in nw.backends()["cpu"].detail
    assert nw.backends()["cpu"].detail == before


@needs_kernels
def test_force_gives_back_after_an_error() -> None:
    before = nw.backends()["cpu"].detail
    for name in (None, "generic"):
        with pytest.raises(KeyError), cpu.force(name):
            raise KeyError
    assert nw.backends()["cpu"].detail == before


def test_forcing_the_reference() -> None:
    with cpu.force(None):
        assert not nw.backends()["cpu"].available
        assert nw.nn.BatchNorm1d(5)(torch.randn(6, 5)).isfinite().all()


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=f"got {name!r}. Try: one of"), cpu.force(name):
        pass


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_are_what_serves(layout: str, dtype: torch.dtype) -> None:
    """Else every test of a forced instruction set would test the reference."""
    p = Case((4, 5, 3, 3), layout=layout, dtype=dtype, residual="contiguous").tensors()
    parameters, end = (p.weight, p.bias, p.residual), (1, 1e-5, "gelu")
    m = cpu.moments(p.x, None, 1)
    constants, sums = (p.mean, p.var, *parameters), torch.zeros(2, 5, dtype=torch.float64)
    results = {
        "moments": m,
        "normalize": cpu.normalize(p.x, *constants, None, *end),
        "train_forward": cpu.train_forward(p.x, *parameters, None, *end),
        "update_running": cpu.update_running(
            p.mean, p.var, torch.tensor(0), None, m, None, "propagate"
        ),
        "backward_reduce": cpu.backward_reduce(p.dy, p.x, *constants, None, None, *end),
        "backward_input": cpu.backward_input(
            p.dy, p.x, *constants, None, None, sums, torch.tensor(36), *end, True
        ),
        "train_backward": cpu.train_backward(p.dy, p.x, m, *parameters, None, None, *end, True),
        "eval_backward": cpu.eval_backward(p.dy, p.x, *constants, None, None, *end, True),
    }
    # The operators of sets are not of this module: ops/sets.py has them.
    assert results.keys() == {n for n in ops.OPERATORS if not n.startswith("sets_")}
    assert [name for name, r in results.items() if r is NotImplemented] == []


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_are_what_serves_with_a_mask(layout: str) -> None:
    p = Case((16, 5, 40), layout=layout, mask=True).tensors()
    parameters, end = (p.weight, p.bias, None), (1, 1e-5, "relu")
    m = cpu.moments(p.x, p.mask, 1)
    constants = (p.mean, p.var, *parameters)
    results = [
        m,
        cpu.normalize(p.x, *constants, p.mask, *end),
        cpu.train_forward(p.x, *parameters, p.mask, *end),
        cpu.backward_reduce(p.dy, p.x, *constants, None, p.mask, *end),
        cpu.train_backward(p.dy, p.x, m, *parameters, None, p.mask, *end, False),
        cpu.eval_backward(p.dy, p.x, *constants, None, p.mask, *end, False),
    ]
    assert all(r is not NotImplemented for r in results)


# Without the kernels


def test_the_environment_switches_the_kernels_off() -> None:
    done = python(TRAIN, "-W", "error", NORMWISE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "trained True" in done.stdout
    assert "NORMWISE_BACKEND=reference" in done.stdout
    assert done.stderr == ""


def test_without_the_extension_it_warns_once_and_works() -> None:
    hide = "import sys; sys.modules['normwise._native'] = None\n"
    done = python(hide + TRAIN + TRAIN, "-W", "always")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained True") == 2
    assert "cpu        no" in done.stdout
    assert done.stderr.count("the C++ kernels are not available") == 1
    assert "NORMWISE_BACKEND=reference to silence this" in done.stderr


def test_the_reference_trains_as_the_kernels_do() -> None:
    results = []
    for name in (None, *cpu.instruction_sets()):
        torch.manual_seed(4)
        layer = nw.nn.BatchNorm2d(5, momentum=None, activation="silu")
        with cpu.force(name):
            for _ in range(3):
                x = torch.randn(4, 5, 6, 6, requires_grad=True)
                layer(x).backward(torch.randn(x.shape))
        results.append([x.grad, layer.weight.grad, *layer.buffers()])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """The wheel is built with no C++ compiler to be found, unpacked, and imported."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet"]
    build += ["--disable-pip-version-check", "--no-cache-dir", "-C", f"build-dir={tmp_path}/build"]
    nothing = {"CXX": "/nonexistent-compiler", "CC": "/nonexistent-compiler"}
    made = subprocess.run(
        [*build, "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | nothing,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("normwise-*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", ".pyd"))]
        archive.extractall(unpacked)
    # -S: no site, whose editable install would be found first; torch's folder by hand.
    paths = [str(unpacked), *(p for p in sys.path if p.endswith("site-packages"))]
    code = f"import sys; sys.path[:0] = {paths!r}\n{TRAIN}"
    done = python(code + "print(nw.__file__)", "-S", "-E")
    assert done.returncode == 0, done.stderr
    assert "trained True" in done.stdout
    assert str(unpacked) in done.stdout
    assert done.stderr.count("the C++ kernels are not available") == 1
