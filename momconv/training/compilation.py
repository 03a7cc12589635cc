"""torch.compile for the residual blocks of a network.

What runs them stays as it is, so momentum is as exact as before: both runs of a block are the same
compiled program. It is made for each shape of its input, since kernels for any shape may round
differently, and which ones there are would depend on where a run was resumed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_PROGRAMS = 1024  # for all shapes of all blocks, which share their code
_BACKEND = "inductor"


@contextmanager
def compiling(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Inside, the residual blocks of ``model`` are compiled when they are called, if ``wanted``."""
    if not wanted:
        yield
        return
    from torch._dynamo import config  # takes a second

    for block in _blocks(model):
        block.compile(backend=_BACKEND, dynamic=False)
    # Dynamo alone would give up after a few shapes.
    with config.patch(recompile_limit=_PROGRAMS, accumulated_recompile_limit=_PROGRAMS):
        yield


@contextmanager
def uncompiled(*, wanted: bool) -> Iterator[None]:
    """Inside, all blocks run as they would without compilation, if ``wanted``."""
    if wanted:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.Sequential):
            inner = [block for block in child if isinstance(block, nn.Sequential)]
            yield from _blocks(child) if inner else child
