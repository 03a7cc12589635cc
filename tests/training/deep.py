"""A narrow network of one long run, for which inversion needs less than checkpoints."""

from torch import Tensor, nn
from torch.nn import functional as F

DEPTH, WIDTH = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return x + y


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.layers(self.stem(x)).mean((2, 3)))
        return y


def make() -> nn.Module:
    """As the name of a network: ``deep.py:make``."""
    return Deep()


def make_with_spare() -> nn.Module:
    """With a layer that the output does not depend on."""
    model = Deep()
    model.stem.spare = nn.Linear(100, 100)
    return model
