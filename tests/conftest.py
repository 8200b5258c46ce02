"""What every test file shares: seeds, the backends in turn, hypothesis without chance."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from normwise.ops import cpu

with warnings.catch_warnings():
    # Torch imports this on the first use of forward mode, and trips over its own deprecation.
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp

hypothesis.settings.register_profile("normwise", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("normwise")

# The reference, then every instruction set that was built and that this processor has.
BACKENDS = ("reference", *cpu.instruction_sets())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend in turn; the value is its name."""
    name: str = request.param
    with cpu.force(None if name == "reference" else name):
        yield name


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """One thread, for small batches; and what is alive now is nothing to collect: each recorded run
    collects garbage, which takes 0.2 s with all that pytest holds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)
