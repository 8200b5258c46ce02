from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["NeverUpdated"]


def _varied(t: Tensor | None) -> bool:
    """Whether the channels differ; a single one, whether it is not 0."""
    return t is not None and t.numel() > 0 and bool((t != (t[0] if t.numel() > 1 else 0)).any())


def _trained(norm: NormState) -> bool:
    """Whether an optimizer moved the parameters. Constructors draw weights at random here and there
    (DCGAN: N(1, 0.02)) but biases never, so a bias tells if there is one."""
    return _varied(norm.bias) if norm.bias is not None else _varied(norm.weight)


class NeverUpdated(Rule):
    """## What it finds
    Running statistics that are still the constructor's, mean 0 and variance 1, although the
    parameters were trained (error); or although other norms of the model moved (info). With
    ``momentum=None``: statistics that moved while ``num_batches_tracked`` is 0 (warning).

    ## Why it is bad
    In eval mode such a layer does not normalize: it computes γ·x + β of whatever comes in, while
    every layer after it was trained on normalized values. Training looks healthy, eval is noise.
    It happens when the norm trained in eval mode or with ``momentum=0``, when buffers were left out
    of a checkpoint or of ``load_state_dict(strict=False)``, and when a port copied only parameters.
    A count of 0 under statistics that moved (they come from another framework, or from a checkpoint
    older than the counter) is harmless to an exponential average; with ``momentum=None`` the next
    batch replaces them altogether, since its weight is 1 / (0 + 1).

    ## Example
    ```python
    trained, loaded = torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)
    torch.nn.init.normal_(trained.bias)
    trained(torch.randn(4, 8, 5, 5) + 3)
    loaded.load_state_dict(dict(trained.named_parameters()), strict=False)  # the buffers are lost
    nw.check(loaded)
    ```

    ## Remedy
    Load the buffers too, or recalibrate (``nw.recalibrate(model, data)``). If the layer is meant to
    be affine only (statistics absorbed into γ and β), say so: ``nw.convert(model, "frozen")`` makes
    it a layer of constants, or ignore the rule for it.

    ## Sources
    ``torch.nn.BatchNorm2d``: buffers, ``num_batches_tracked`` (state dict version 2).
    """

    code = "NW103"
    name = "never-updated"
    severity = "error"

    def check(self, subject: Subject) -> Iterator[Finding]:
        # A layer of constants (FrozenBatchNorm) has its statistics absorbed, if they are 0 and 1.
        norms = [n for n in subject.batch_norms() if isinstance(n.module, (_BatchNorm, type(None)))]
        moved = sum(not n.untouched for n in norms)
        for norm in norms:
            n = norm.num_batches_tracked
            if not norm.untouched:
                if n == 0 and norm.cumulative:
                    yield self._uncounted(norm)
            elif _trained(norm):
                yield self.finding(
                    norm.name,
                    "the running statistics are the constructor's, 0 and 1, under trained "
                    "parameters: in eval mode the layer does not normalize",
                    "load the buffers, or recalibrate on the data",
                    # Without the counter it may be a port with statistics absorbed into γ and β,
                    # as of detectron2's models from Caffe2.
                    severity="error" if n is not None else "warning",
                    confidence="high" if n is not None else "medium",
                    repair=Repair(False, "takes the running statistics anew", recalibrate=True),
                    num_batches_tracked=n,
                    channels=norm.num_features,
                )
            elif moved:
                yield self.finding(
                    norm.name,
                    "the running statistics are the constructor's, 0 and 1, while those of "
                    f"{moved} other norms moved: the layer never ran in training mode",
                    "if it is used, train it; if it is not, remove it",
                    severity="info",
                    confidence="medium",
                    num_batches_tracked=n,
                    moved=moved,
                )

    def _uncounted(self, norm: NormState) -> Finding:
        return self.finding(
            norm.name,
            "num_batches_tracked is 0, but the running statistics are not 0 and 1: with "
            "momentum=None the next batch replaces them",
            "set num_batches_tracked to the batches that the statistics stand for",
            severity="warning",
            num_batches_tracked=0,
        )
