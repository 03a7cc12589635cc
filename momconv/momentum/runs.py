"""Finding the runs of residual blocks in a sequence of modules."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call

from momconv.momentum.replay import autocast_settings


def find_runs(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...]) -> list[range]:
    """Two or more consecutive blocks of one class, each of which keeps the shape of its input.

    The blocks are traced from x on fake tensors: nothing is computed, no memory is taken, and no
    buffer or random state changes.
    """
    keeps = _keeps_shape(blocks, x, args)
    groups = groupby(range(len(blocks)), key=lambda n: (keeps[n], type(blocks[n])))
    runs = [[*members] for (keeps_shape, _), members in groups if keeps_shape]
    return [range(run[0], run[-1] + 1) for run in runs if len(run) > 1]


def _keeps_shape(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...]) -> list[bool]:
    mode = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode()
    inputs = [_imitate(tensor, mode) for tensor in (x, *args)]
    keeps = []
    kind = x.device.type
    settings = autocast_settings(kind if torch.amp.is_autocast_available(kind) else "cpu")  # meta
    # Without autocast's cache of cast weights, which would keep fake ones for the real pass.
    with torch.autocast(**settings | {"cache_enabled": False}):
        for block in blocks:
            y = call_on_fakes(block, inputs, mode)
            keeps.append(y.shape == inputs[0].shape)
            inputs[0] = y
    return keeps


def call_on_fakes(module: nn.Module, inputs: Sequence[Tensor], mode: FakeTensorMode) -> Any:
    """module(*inputs) with fake parameters and buffers: real buffers would be written to."""
    state = [*module.named_parameters(), *module.named_buffers()]
    fakes = {name: _imitate(tensor, mode) for name, tensor in state}
    with mode, torch.no_grad():
        return functional_call(module, fakes, tuple(inputs))


def _imitate(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor.detach())
