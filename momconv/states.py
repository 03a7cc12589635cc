"""State that others use too, put back afterwards: of networks, random generators, Python."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


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


def keep_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that restores the buffers of ``modules`` to their present values.

    They are the same tensors then, whatever has been put in their place. Those of modules that are
    inside of these do not count, nor do new ones, which a module may make in its first call.
    """
    places = [(module._buffers, {**module._buffers}) for module in modules]
    buffers = [buffer for _, before in places for buffer in before.values() if buffer is not None]
    # Of a sparse one, which is hardly ever written to, PyTorch has no comparison.
    kept = [(buffer, buffer.clone()) for buffer in buffers if buffer.layout == torch.strided]

    @torch.no_grad()
    def restore() -> None:
        for place, before in places:
            place.update(before)
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # not counted as written to by graphs that hold it

    return restore


@contextmanager
def keeping_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After it, modules have the attributes of now, and dictionaries and lists among these as well.

    A block may keep what it computes in its first call, such as the angles of all positions. But
    its parameters are left to FSDP2, which exchanges them and knows what is in place.
    """
    own: list[Any] = [vars(module) for module in modules]
    own += [
        value
        for attributes in own
        for name, value in attributes.items()
        if type(value) in _HOLDERS and name != "_parameters"
    ]
    kept = [copy(holder) for holder in own]
    try:
        yield
    finally:
        for holder, before in zip(own, kept, strict=True):
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(before)


_HOLDERS = (dict, OrderedDict, list, set)


def are_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether hooks bring together what these compute with, as FSDP2's do."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return any(map(is_traceable_wrapper_subclass, parameters))


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, calls of these and of what is in them are nobody's business: no hook learns of them.

    Nor do those of all modules that there are. But those that these need in order to compute
    anything stay: see :func:`are_sharded`.
    """
    if are_sharded(modules):
        yield
        return
    inner = {inner for module in modules for inner in module.modules()}
    kept = [(one, one._forward_pre_hooks, one._forward_hooks) for one in inner]
    of_all = (_global_forward_pre_hooks, _global_forward_hooks)
    kept_of_all = [hooks.copy() for hooks in of_all]
    for one, _, _ in kept:
        one._forward_pre_hooks, one._forward_hooks = OrderedDict(), OrderedDict()
    for hooks in of_all:
        hooks.clear()
    try:
        yield
    finally:
        for one, before, after in kept:
            one._forward_pre_hooks, one._forward_hooks = before, after
        for hooks, before in zip(of_all, kept_of_all, strict=True):
            hooks.update(before)


def version_of(tensor: Tensor) -> int:
    """Return a number that changes when somebody writes into ``tensor``, but in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def is_graph_made() -> bool:
    """Return whether PyTorch makes a program or derivatives of the operations as they come.

    It then sees nothing but operations, and no values.
    """
    return (
        torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    )


def is_fake(tensor: Tensor) -> bool:
    """Return whether it has a shape and no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def autocast_settings(device_type: str) -> dict[str, Any]:
    """Return the arguments with which torch.autocast does what it is doing now.

    Without autocast of their own, tensors without memory ("meta") are as on a CPU.
    """
    if not torch.amp.is_autocast_available(device_type):
        device_type = "cpu"
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

    __slots__ = ("_absent", "_modules", "_names", "_places", "_training", "buffers", "parameters")

    def __init__(self, modules: Sequence[nn.Module], with_buffers: Iterable[nn.Module]) -> None:
        """Keep the condition of now, with the buffers of ``with_buffers``."""
        self._modules = modules
        self._training = tuple(module.training for module in modules)
        # Of the parameters, of the buffers that are None, and then of the others.
        self._places: list[dict[str, Any]] = []
        self._names: tuple[str, ...] = ()
        self.parameters = self._find(module._parameters for module in modules)
        buffers = [module._buffers for module in with_buffers]
        self._absent = self._find(buffers, absent=True)
        self.buffers: list[Tensor] = self._find(buffers)

    def add_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Keep the buffers of further modules as well."""
        self.buffers += self._find(module._buffers for module in modules)

    def _find(self, places: Iterable[dict[str, Any]], *, absent: bool = False) -> list[Any]:
        found = [
            (place, name, tensor)
            for place in places
            for name, tensor in place.items()
            # FSDP2 puts its parameters, which are DTensors, into place by itself.
            if (tensor is None) == absent and not is_traceable_wrapper_subclass(tensor)
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
        self._put([*parameters, *self._absent, *buffers])
        try:
            yield
        finally:
            self._put(before)
            _switch(others)

    def _put(self, tensors: Sequence[Tensor | None]) -> None:
        for place, name, tensor in zip(self._places, self._names, tensors, strict=True):
            place[name] = tensor


def _switch(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = not module.training


@contextmanager
def pausing_search_for_cycles() -> Iterator[None]:
    """Inside, Python looks for no cyclic garbage.

    While millions of objects are made, that takes as long as making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
