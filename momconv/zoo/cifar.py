"""The residual networks for 32×32 images of He et al. 2016 (arXiv:1512.03385), section 4.2.

A 3×3 stem, three stages of n basic blocks with 16, 32 and 64 channels, average pooling and a
linear layer: 6n + 2 layers. Shortcuts have no parameters (the paper's option A). The names of the
parameters are those of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {f"cifar_resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)}


class CifarBlock(nn.Module):
    """ReLU(shortcut(x) + g(x)), where g is conv-bn-relu-conv-bn with 3×3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return every ``stride``-th pixel of ``x``, with channels of zeros on both sides."""
        if self.stride == 1 and self.extra_channels == 0:
            return x
        before = self.extra_channels // 2
        after = self.extra_channels - before
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of shape (B, channels, H / stride, W / stride)."""
        # In place, because neither BatchNorm nor the addition keeps its output for backward.
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu_(out)


class CifarResNet(nn.Module):
    """Stem, three stages of ``blocks_per_stage`` blocks, and a linear head."""

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks_per_stage)
        self.layer2 = _stage(16, 32, 2, blocks_per_stage)
        self.layer3 = _stage(32, 64, 2, blocks_per_stage)
        self.linear = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, num_classes) for images of shape (B, 3, H, W)."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """Return the network with ``depth`` = 6n + 2 layers, freshly initialised."""
    return CifarResNet((depth - 2) // 6, num_classes)


def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = CifarBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    """He et al. 2015: the variance of a layer's input survives its convolution and ReLU."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
