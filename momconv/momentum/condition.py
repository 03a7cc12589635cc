"""The condition that a block's modules are in, and putting them into it again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
        """The condition of now; the buffers are those of ``with_buffers``."""
        self._modules = modules
        self._training = tuple(module.training for module in modules)
        self._places: list[dict[str, Any]] = []  # of the parameters, then of the buffers
        self._names: tuple[str, ...] = ()
        self.parameters = self._find(module._parameters for module in modules)
        self.buffers: list[Tensor] = []
        self.add_buffers(with_buffers)

    def add_buffers(self, modules: Iterable[nn.Module]) -> None:
        """The buffers of further modules as well."""
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
