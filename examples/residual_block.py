"""A residual block with fused norms: bn + relu and bn + add + relu are one pass each.

Run: python examples/residual_block.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normwise as nw


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nw.nn.BatchNorm2d(channels, activation="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nw.nn.BatchNorm2d(channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), residual=x)


class TorchBlock(Block):
    """The same block as torch.nn users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


def main() -> float:
    """Train both blocks for five steps; the largest difference between their losses."""
    torch.manual_seed(0)
    fused, plain = Block(8), TorchBlock(8)
    plain.load_state_dict(fused.state_dict())
    x, target = torch.randn(16, 8, 12, 12), torch.randn(16, 8, 12, 12)
    worst = 0.0
    for _ in range(5):
        losses = []
        for block in (fused, plain):
            loss = nn.functional.mse_loss(block(x), target)
            block.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in block.parameters():
                    p -= 0.1 * p.grad
            losses.append(loss.item())
        print(f"fused {losses[0]:.6f}   torch.nn {losses[1]:.6f}")
        worst = max(worst, abs(losses[0] - losses[1]))
    return worst


if __name__ == "__main__":
    main()
