"""The ways to train one network that the benchmarks compare."""

import math
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model
from torchvision.models.resnet import ResNet

from momconv import convert, set_strategy
from momconv.momentum.sequential import momentum_stages
from momconv.zoo.networks import build, names

Method = Callable[[nn.Module], nn.Module]


def make_network(name: str) -> nn.Module:
    """Any network of momconv or torchvision, with random weights, in training mode."""
    torch.manual_seed(0)
    model: nn.Module = build(name) if name in names() else get_model(name)
    return model.train()


def store(model: nn.Module) -> nn.Module:
    """The plain network, which keeps every activation."""
    return model


def checkpoint_each_block(model: nn.Module) -> nn.Module:
    """torch.utils.checkpoint around every block."""
    return _checkpointed(model, lambda blocks: 1)


def checkpoint_sqrt(model: nn.Module) -> nn.Module:
    """torch.utils.checkpoint around √L blocks, the usual compromise."""
    return _checkpointed(model, lambda blocks: math.ceil(math.sqrt(blocks)))


def store_momentum(model: nn.Module) -> nn.Module:
    """The momentum network with every activation kept."""
    model = convert(model)
    set_strategy(model, "store")
    return model


def momconv(model: nn.Module) -> nn.Module:
    """The momentum network with the strategy that momconv chooses."""
    return convert(model)


def momentumnet(model: nn.Module) -> nn.Module:
    """The package of the paper's authors."""
    from momentumnet import transform_to_momentumnet

    # is_residual=False: the blocks end in x + f(x), so the package subtracts x.
    converted: nn.Module = transform_to_momentumnet(
        model, sub_layers=_stage_names(model), gamma=0.9, use_backprop=False, is_residual=False
    )
    return converted


METHODS: dict[str, Method] = {
    "store all": store,
    "checkpoint each block": checkpoint_each_block,
    "checkpoint √L blocks": checkpoint_sqrt,
    **({"momentumnet": momentumnet} if find_spec("momentumnet") else {}),
    "momconv": momconv,
}


class Checkpointed(nn.Sequential):
    """An ``nn.Sequential`` under torch's own checkpointing, ``length`` blocks a segment."""

    length: int

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in turn; torch's own checkpoint_sequential would store the last segment."""
        for start in range(0, len(self), self.length):
            segment = nn.Sequential(*list(self)[start : start + self.length])
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


def _checkpointed(model: nn.Module, length: Callable[[int], int]) -> nn.Module:
    for name in _stage_names(model):
        stage = model.get_submodule(name)
        wrapped = Checkpointed(OrderedDict(stage.named_children())).train(stage.training)
        wrapped.length = length(len(wrapped))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapped)
    if type(model) is ResNet:
        model.__class__ = StemCheckpointed
    return model


def _stage_names(model: nn.Module) -> list[str]:
    """What momconv takes for stages, so that every method treats the same blocks."""
    return list(momentum_stages(convert(model, stages="all")))
