"""State that others use too, put back afterwards: of networks, and of random generators."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def in_eval_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """Eval mode inside; the training flags as before afterwards, also those changed inside."""
    return _in_mode(models, training=False)


def in_training_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """The same in training mode."""
    return _in_mode(models, training=True)


@contextmanager
def _in_mode(models: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    before = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def keeping_random_state(device: torch.device) -> AbstractContextManager[None]:
    """The random generators of the CPU and of ``device`` are afterwards what they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """What gives the buffers of ``model`` the values of now again."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore
