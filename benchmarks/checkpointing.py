"""torch's own checkpointing, used as well as it can be used without changing a network's values."""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import ResNet

from benchmarks.stages import find_runs
from momconv.momentum.sequential import join_layers


def checkpoint_each_block(model: nn.Module) -> nn.Module:
    """torch.utils.checkpoint around every block."""
    return _checkpoint(model, lambda blocks: 1)


def checkpoint_sqrt(model: nn.Module) -> nn.Module:
    """torch.utils.checkpoint around √L blocks, the usual compromise."""
    return _checkpoint(model, lambda blocks: math.ceil(math.sqrt(blocks)))


class Checkpointed(nn.Sequential):
    """An ``nn.Sequential`` under torch's own checkpointing, ``length`` blocks a segment."""

    length: int

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in turn; torch's own checkpoint_sequential would store the last segment."""
        blocks = [*join_layers([*self])]
        for start in range(0, len(blocks), self.length):
            segment = nn.Sequential(*blocks[start : start + self.length])
            if any(isinstance(module, Checkpointed) for module in segment.modules()):
                x = segment(x)
            else:
                x = checkpoint(segment, x, use_reentrant=False)
        return x


class StemCheckpointed(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet with a checkpoint around its stem too."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        x = checkpoint(stem, x, use_reentrant=False)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _checkpoint(model: nn.Module, length: Callable[[int], int]) -> nn.Module:
    names = [*find_runs(model)]
    for name in names:
        stage = model.get_submodule(name)
        wrapped = Checkpointed(OrderedDict(stage.named_children())).train(stage.training)
        # What is around stages has but stems and transitions of its own.
        is_around = any(other.startswith(f"{name}.") for other in names)
        wrapped.length = 1 if is_around else length(len(wrapped))
        model.set_submodule(name, wrapped)
    if type(model) is ResNet:
        model.__class__ = StemCheckpointed
    return model
