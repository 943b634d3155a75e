"""What the bundled networks are built of: convolutions with batch norm and ReLU, no more."""

from __future__ import annotations

from torch import Tensor, nn


def conv(cin: int, cout: int, *, stride: int = 1, size: int = 3, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width // 2, size=1), conv(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
