"""torch.compile, whose partitioner may recompute activations to stay within a budget.

``torch._functorch.config.activation_memory_budget`` is the share of the activations that may be
kept between the forward and the backward pass: 1 keeps what the partitioner likes, 0 only the
inputs. It bounds what is held, not the peak. The network is compiled whole, by Inductor.
"""

import torch
from torch import Tensor, nn
from torch._functorch import config


class Compiled(nn.Module):
    """A network whose whole forward pass is compiled under a budget, on its first call."""

    def __init__(self, network: nn.Module, budget: float) -> None:
        super().__init__()
        self.network = network
        self.budget = budget
        # The method, not the module: hooks on the module then stay outside what is compiled.
        network.forward = torch.compile(network.forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """The network's output."""
        # The partitioner reads the budget when the graph is made, and that is in a first call.
        with config.patch(activation_memory_budget=self.budget):
            outputs: Tensor = self.network(images)
        return outputs


def compile_within(budget: float, model: nn.Module) -> nn.Module:
    """``model`` compiled to keep at most the share ``budget`` of its activations."""
    return Compiled(model, budget)
