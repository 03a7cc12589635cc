"""RevNet couplings (Gomez et al. 2017), which memcnn and revtorch invert, for residual blocks.

A coupling splits its channels in two halves: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁). It cannot compute
what a residual block computes, so such a network cannot take over pretrained weights, and there is
no like-for-like comparison. Here each residual block of a run (see ``benchmarks.stages``) becomes
one coupling of the same channels, whose F and G are the block's own layers at half of its widths,
without the shortcut. Width and length of a stage stay; the layers in sequence double, and their
multiplications and weights are half of the block's. That flatters the couplings: a working set of
half the size, and half of the work. Stems and blocks that change the shape stay as they are and
store their activations.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.stages import find_runs


class Coupling(nn.Module):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁) under ordinary autograd, which stores everything."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """The output, of the shape of ``x``: (B, C, …) with C even. F and G also get ``args``."""
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2, *args)
        return torch.cat([y1, x2 + self.g(y1, *args)], dim=1)


def make_coupling(block: nn.Module) -> Coupling:
    """The coupling of the channels of a ResNet's ``block``, with weights of its own."""
    return Coupling(_halve(block), _halve(block))


def store_couplings(model: nn.Module) -> nn.Module:
    """The network with couplings in place of its residual blocks, every activation kept."""
    return _replace_runs(model, lambda couplings: nn.Sequential(*couplings))


def memcnn(model: nn.Module) -> nn.Module:
    """memcnn, which frees the input of each coupling and restores it from the output."""
    return _replace_runs(model, invert_with_memcnn)


def revtorch(model: nn.Module) -> nn.Module:
    """RevTorch, which inverts a sequence of couplings in one autograd function."""
    return _replace_runs(model, invert_with_revtorch)


def invert_with_memcnn(couplings: Sequence[Coupling]) -> nn.Module:
    """The same functions under memcnn."""
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    # The layer before the run may have saved the run's first input, so that one is not freed.
    return nn.Sequential(
        *(
            InvertibleModuleWrapper(AdditiveCoupling(c.f, c.g), keep_input=c is couplings[0])
            for c in couplings
        )
    )


def invert_with_revtorch(couplings: Sequence[Coupling]) -> nn.Module:
    """The same functions under RevTorch."""
    from revtorch.revtorch import ReversibleBlock, ReversibleSequence

    sequence: nn.Module = ReversibleSequence(
        nn.ModuleList(ReversibleBlock(coupling.f, coupling.g) for coupling in couplings)
    )
    return sequence


def _replace_runs(model: nn.Module, wrap: Callable[[Sequence[Coupling]], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, runs in find_runs(model).items():
        blocks = list(model.get_submodule(name).children())
        for run in reversed(runs):
            couplings = [make_coupling(block) for block in blocks[run.start : run.stop]]
            blocks[run.start : run.stop] = [wrap(couplings)]
        model.set_submodule(name, nn.Sequential(*blocks))
    return model.train()


def _halve(block: nn.Module) -> nn.Sequential:
    """The layers of a ResNet's residual branch at half width: convolutions, BatchNorms, ReLUs."""
    layers: list[nn.Module] = []
    for layer in block.children():
        if isinstance(layer, nn.Conv2d):
            layers.append(_halve_convolution(layer))
        elif isinstance(layer, nn.BatchNorm2d):
            layers += [nn.BatchNorm2d(layer.num_features // 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])  # the branch ends before the block's last ReLU


def _halve_convolution(layer: nn.Conv2d) -> nn.Conv2d:
    halved = nn.Conv2d(
        layer.in_channels // 2,
        layer.out_channels // 2,
        layer.kernel_size[0],
        padding="same",
        bias=layer.bias is not None,
    )
    nn.init.kaiming_normal_(halved.weight, nonlinearity="relu")  # as the networks do
    return halved
