"""State that others use too, put back afterwards: of networks, and of random generators."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def in_eval_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """Return a context in eval mode, after which all training flags are as before."""
    return _in_mode(models, training=False)


def in_training_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """Return a context in training mode, after which all training flags are as before."""
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
    """Return a context after which the random generators of CPU and ``device`` are as before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the buffers of ``model`` to their present values."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore


def autocast_settings(device_type: str) -> dict[str, Any]:
    """Return the arguments with which torch.autocast does what it is doing now."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


class Condition:
    """Which modules are training, and the parameters and buffers that they have.

    Of each block that runs twice it is kept until backward, in few and flat containers: a tuple for
    each tensor would be tens of thousands of objects in a deep network, and Python's garbage
    collector looks through all that there are.

    Attributes:
        parameters: torch.func.functional_call may have put them in place for a while.
        buffers: The same.
    """

    __slots__ = ("_modules", "_names", "_places", "_training", "buffers", "parameters")

    def __init__(self, modules: Sequence[nn.Module], with_buffers: Iterable[nn.Module]) -> None:
        """Keep the condition of now, with the buffers of ``with_buffers``."""
        self._modules = modules
        self._training = tuple(module.training for module in modules)
        self._places: list[dict[str, Any]] = []  # of the parameters, then of the buffers
        self._names: tuple[str, ...] = ()
        self.parameters = self._find(module._parameters for module in modules)
        self.buffers: list[Tensor] = []
        self.add_buffers(with_buffers)

    def add_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Keep the buffers of further modules as well."""
        self.buffers += self._find(module._buffers for module in modules)

    def _find(self, places: Iterable[dict[str, Any]]) -> list[Tensor]:
        found = [
            (place, name, tensor)
            for place in places
            for name, tensor in place.items()
            if tensor is not None
        ]
        self._places += [place for place, _, _ in found]
        self._names += tuple(name for _, name, _ in found)
        return [tensor for _, _, tensor in found]

    @contextmanager
    def restored(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules are training as they were, and have these tensors.

        functional_call does it too, but slowly.
        """
        modes = zip(self._modules, self._training, strict=True)
        others = [module for module, training in modes if module.training != training]
        _switch(others)
        before = [place[name] for place, name in zip(self._places, self._names, strict=True)]
        self._put([*parameters, *buffers])
        try:
            yield
        finally:
            self._put(before)
            _switch(others)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for place, name, tensor in zip(self._places, self._names, tensors, strict=True):
            place[name] = tensor


def _switch(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = not module.training
