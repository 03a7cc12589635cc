"""The state of networks that others use too: training flags and buffers, put back afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; the training flags as before afterwards, also those changed inside."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """What gives the buffers of ``model`` the values of now again."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore
