"""Small real networks, and what one training step of them leaves behind."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from momconv import MomentumSequential, set_strategy
from momconv.vocabulary import Strategies

BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}


class Dropping(nn.Module):
    """A residual block that draws random numbers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.dropout(self.conv(x)))


class Scaled(nn.Module):
    """The smallest residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(x * self.scale)


def stack(
    depth: int, *, kind: str = "BasicBlock", channels: int = 8, seed: int = 0, **options: Any
) -> MomentumSequential:
    """``depth`` torchvision blocks that keep their shape, with a BatchNorm that does something."""
    torch.manual_seed(seed)
    block = BLOCKS[kind]
    net = MomentumSequential(
        *(block(channels, channels // block.expansion) for _ in range(depth)), **options
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.2)
    return net


def images(*, channels: int = 8, side: int = 5, count: int = 3, seed: int = 1) -> Tensor:
    """A batch with gaps between pixels' values that no grid point hits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=generator)


def gradient_of(tensor: Tensor) -> Tensor:
    """The gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def square(y: Tensor) -> Tensor:
    """A loss whose gradient depends on y."""
    return y.float().square().mean()


def under_bf16_autocast(net: nn.Module, x: Tensor) -> Tensor:
    """A loss in mixed precision."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return square(net(x))


def aftermath(
    net: nn.Module,
    x: Tensor,
    strategy: Strategies,
    step: Callable[[nn.Module, Tensor], Tensor] = lambda net, x: square(net(x)),
) -> dict[str, Tensor]:
    """The loss, all gradients and all buffers after ``step`` and backward on a copy of ``net``."""
    net = copy.deepcopy(net)
    set_strategy(net, strategy)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(2)
    loss = step(net, x)
    if loss.requires_grad:
        loss.backward()
    left = {f"buffer {name}": buffer for name, buffer in net.named_buffers()}
    left |= {f"grad {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    left["loss"] = loss.detach()
    left["random"] = torch.get_rng_state()
    if x.grad is not None:
        left["grad x"] = x.grad
    return left


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    names = ours.keys() | theirs.keys()
    return sorted(
        name
        for name in names
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    )
