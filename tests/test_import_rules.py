"""The layers of the house (ARCHITECTURE.md): who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "normwise"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "csrc").iterdir())

# Top to bottom: a layer imports from those below it. Packages on one line do not know each other.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"report", "plots", "explain"},
    {"doctor"},
    {"tools"},
    {"graph"},
    {"interop"},
    {"nn"},
    {"functional"},
    {"ops"},
    {"results"},
    {"pages"},
    {"moments", "layout", "activations", "files"},
    {"errors"},
)
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}
BACKENDS = ("reference", "cpu", "triton")
HEAVY = ("triton", "matplotlib", "plotly", "onnx", "onnxscript", "onnxruntime", "safetensors",
         "sklearn", "rich", "scipy", "pandas", "vl_convert", "pyarrow", "tensorboard")  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = list(path.relative_to(PACKAGE.parent).parent.parts)
            start = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            # `from normwise import nn` names normwise.nn.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """'nn' for normwise.nn.batchnorm; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "normwise" and len(parts) > 1 and parts[1] in LEVEL else None


def code_of(path: Path) -> str:
    """A file without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def files(*layers: str) -> list[Path]:
    found = [p for p in SOURCES if layer_of(module_name(p)) in layers]
    assert found
    return found


def test_every_module_belongs_to_a_layer() -> None:
    modules = {module_name(p).split(".")[1] for p in SOURCES if module_name(p) != "normwise"}
    assert modules <= LEVEL.keys()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = layer_of(module_name(path))
    if own is None:  # normwise/__init__.py shows what the layers hold
        return
    above = {
        m for m in imported(path) if (to := layer_of(m)) and to != own and LEVEL[to] >= LEVEL[own]
    }
    assert not above


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nobody_imports_the_command_line(path: Path) -> None:
    own = layer_of(module_name(path))
    assert own in ("cli", "__main__") or not any(layer_of(m) == "cli" for m in imported(path))


def test_moments_and_errors_import_torch_at_most() -> None:
    for path in files("moments", "errors"):
        others = {m.partition(".")[0] for m in imported(path)} - {"normwise", "torch", "__future__"}
        assert not {m for m in others if m not in sys.stdlib_module_names}


def test_no_backend_imports_another() -> None:
    for path in files("ops"):
        name = path.stem
        if name in BACKENDS:
            others = {f"normwise.ops.{b}" for b in BACKENDS if b != name}
            assert not others & set(imported(path))


def test_layers_call_neither_operators_nor_backends() -> None:
    for path in files("nn"):
        assert "torch.ops" not in code_of(path)
        assert not any(layer_of(m) == "ops" for m in imported(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_addresses_of_tensors_are_taken_in_one_file(path: Path) -> None:
    if path != PACKAGE / "ops" / "cpu.py":
        assert not re.search(r"data_ptr\(|__dlpack", code_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_the_cpu_backend_loads_the_extension(path: Path) -> None:
    if path != PACKAGE / "ops" / "cpu.py":
        assert "normwise._native" not in set(imported(path))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_neither_torch_nor_python(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    foreign = [h for h in included if re.match(r"(torch|ATen|c10|Python|nanobind|pybind11)\b", h)]
    assert path.name.startswith("binding") or not foreign


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_never_throw(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    assert path.name.startswith("binding") or not re.search(
        r"\b(throw|std::vector|new|malloc)\b", code
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_sum_of_squares_minus_squared_mean(path: Path) -> None:
    """With mean 1000 and variance 0.01 in float32 it returns garbage."""
    suspicious = r"mean\(\)?\s*\*\*\s*2|square\(\)\.mean\(.*-|mean\s*\*\s*mean\b"
    assert not re.search(suspicious, code_of(path))


# What `import normwise` does


PROBE = """
import json, os, random, sys
import numpy, torch
before = set(sys.modules)
torch.manual_seed(3); numpy.random.seed(3); random.seed(3)
def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print": str(torch._tensor_str.PRINT_OPTS),
        "rng": torch.get_rng_state().sum().item(),
        "numpy": str(numpy.random.get_state()[1][:5]) + str(numpy.geterr()),
        "python": str(random.getstate()[1][:5]),
        "environ": sorted(os.environ),
        "filters": len(__import__("warnings").filters),
        "excepthook": str(sys.excepthook),
        "dispatch": torch._C._len_torch_dispatch_stack(),
    }
first = state()
import normwise
second = state()
print(json.dumps([sorted(k for k in first if first[k] != second[k]),
                  sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def effects() -> tuple[list[str], set[str]]:
    """The global state that the import changed, and the modules that it loaded beside torch's."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    changed, loaded = json.loads(done.stdout)
    return changed, set(loaded)


def test_import_changes_no_global_state(effects: tuple[list[str], set[str]]) -> None:
    assert effects[0] == []


@pytest.mark.parametrize("package", HEAVY)
def test_import_loads_nothing_heavy(effects: tuple[list[str], set[str]], package: str) -> None:
    assert not {m for m in effects[1] if m.partition(".")[0] == package}


@pytest.mark.parametrize("layer", ["cli", "demo", "doctor", "tools", "report", "plots"])
def test_import_loads_no_upper_layer(effects: tuple[list[str], set[str]], layer: str) -> None:
    assert not {m for m in effects[1] if m.split(".")[:2] == ["normwise", layer]}


def test_import_loads_no_compiler(effects: tuple[list[str], set[str]]) -> None:
    """torch._dynamo takes a second to import; it waits until somebody compiles."""
    assert not {m for m in effects[1] if m.startswith(("torch._dynamo", "torch._inductor"))}
