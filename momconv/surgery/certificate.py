"""A self-test of a converted network: does reconstruction change anything?"""

import copy

import torch
from torch import Tensor, nn

from momconv.momentum.autograd import Strategy
from momconv.momentum.sequential import set_strategy


def gradients_are_exact(model: nn.Module, resolution: int) -> bool:
    """Whether "momentum" gives on two random images what "store" gives, bit for bit.

    Compared are the output, the gradients of the images and of every parameter, and the buffers
    after one training step, such as BatchNorm's statistics. The model stays as it is.

    Raises:
        UsageError: The model has no momentum stages, or none with γ > 0.
        InversionError: Reconstruction noticed by itself that it failed.
    """
    stored = _results(model, resolution, "store")
    reconstructed = _results(model, resolution, "momentum")
    return all(map(torch.equal, stored, reconstructed))


def _results(model: nn.Module, resolution: int, strategy: Strategy) -> list[Tensor]:
    model = copy.deepcopy(model).train()
    set_strategy(model, strategy)
    model.zero_grad()
    parameters = list(model.parameters())
    device = parameters[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        images = torch.randn(2, 3, resolution, resolution, device=device, dtype=parameters[0].dtype)
        output = model(images.requires_grad_())
    output.square().sum().backward()
    gradients = [tensor.grad for tensor in (images, *parameters) if tensor.grad is not None]
    return [output.detach(), *gradients, *model.buffers()]
