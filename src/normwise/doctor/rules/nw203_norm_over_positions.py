from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.calls import is_linear
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["NormOverPositions"]

_LAST_AXIS = frozenset({"layer_norm", "rms_norm", "embedding", "scaled_dot_product_attention"})


class NormOverPositions(Rule):
    """## What it finds
    A batch norm that takes axis 1 of a rank-3 tensor for its channels, where the layer before it
    made them the last one: a linear layer, an embedding or a layer norm on (N, L, C).

    ## Why it is bad
    torch.nn's batch norms have their channels on axis 1: each *position* gets a mean over the batch
    and the features, and a γ and β of its own. It runs, if L happens to be num_features, and it
    learns; sequences of another length stop it. Folding such a norm into the linear layer scales
    the wrong axis.

    ## Example
    ```python
    x = torch.nn.Linear(16, 32)(torch.randn(8, 32, 16))  # (N, L, C) = (8, 32, 32)
    torch.nn.BatchNorm1d(32)(x)                          # normalizes the 32 positions
    ```

    ## Remedy
    ``nw.nn.BatchNorm(32, channel_dim=-1)``, or ``bn(x.transpose(1, 2)).transpose(1, 2)``.

    ## Sources
    ``torch.nn.BatchNorm1d``: "input (N, C, L)"; Ioffe & Szegedy 2015, section 3.2.
    """

    code = "NW203"
    name = "norm-over-positions"
    severity = "warning"
    needs = "graph"

    def check(self, subject: Subject) -> Iterator[Finding]:
        structure = subject.structure
        assert structure is not None
        told = set()
        for norm, site in structure.sites():
            before = site.x.maker
            if before is None or norm.name in told or len(site.x.shape) != 3 or site.axis != 1:
                continue
            if not (is_linear(before) or before.name in _LAST_AXIS):
                continue
            told.add(norm.name)
            n, positions, channels = site.x.shape
            yield self.finding(
                norm.name,
                f"its input ({n}, {positions}, {channels}) comes from {before.name}, which has the "
                f"channels last: the {positions} positions are normalized",
                "nw.nn.BatchNorm(num_features, channel_dim=-1)",
                shape=[n, positions, channels],
                before=before.name,
                same_size=positions == channels,
            )
