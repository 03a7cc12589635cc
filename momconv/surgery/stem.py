"""A torchvision ResNet whose stem, the layers before its stages, can be recomputed in backward.

At high resolution the stem's activations weigh as much as a block of the first stage.
"""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from momconv.momentum.replay import checkpoint
from momconv.momentum.sequential import MomentumSequential


class StemmedResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """The same modules, keys and values as torchvision's class."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        recompute = any(
            isinstance(stage, MomentumSequential) and stage.strategy != "store" for stage in stages
        )
        x = checkpoint(stem, x) if recompute else stem(x)
        for stage in stages:
            x = stage(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def make_stem_recomputable(model: nn.Module) -> None:
    """Let a torchvision ResNet follow the strategy of its stages from the first layer on."""
    if type(model) is ResNet:
        model.__class__ = StemmedResNet


def restore_stem(model: nn.Module) -> None:
    """Give a torchvision ResNet its own class back."""
    if type(model) is StemmedResNet:
        model.__class__ = ResNet
