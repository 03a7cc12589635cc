"""Where a step is on its way through a network and back: in which stage, and at which block.

The stages are for saying where memory is. They are the children of the network, or of what is
nearly all of it, such as a vision transformer's encoder: "stem" is all before the first
``nn.Sequential`` among them, "head" all after the last one. That is coarser than what can be frozen
(zoo/stages.py), where each block of a transformer is one.

The spots, block by block, are what the memory and time of a step's parts are told apart by.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from momconv.momentum.sequential import MomentumSequential, momentum_stages

_TRUNK = 0.9  # of the modules


def assign_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Return the stage of each module that is one, or a part of one, in the order of ``model``."""
    children = list(_unfold(model))
    deep = [i for i, (_, child) in enumerate(children) if isinstance(child, nn.Sequential)]
    if not deep:
        return {child: name for name, child in children} or {model: "model"}
    return {
        child: "stem" if i < deep[0] else "head" if i > deep[-1] else name
        for i, (name, child) in enumerate(children)
    }


def _unfold(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the children by name; of one that is nearly all, its own, if some are sequences."""
    for name, child in module.named_children():
        share = len(list(child.modules())) / len(list(module.modules()))
        if share > _TRUNK and any(isinstance(part, nn.Sequential) for part in child.children()):
            yield from _unfold(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


@contextmanager
def marking(stages: dict[nn.Module, str], enter: Callable[[str], None]) -> Iterator[None]:
    """Call ``enter`` when the forward and backward pass enter a stage.

    The backward marks are hooks on the output's gradient: a full backward hook would make the
    output a view, which the in-place ReLU of a torchvision network could not change.
    """

    def mark(stage: str, *_: object) -> None:
        enter(stage)

    def mark_backward(stage: str, _module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(mark, stage))

    handles = []
    for module, stage in stages.items():
        handles.append(module.register_forward_pre_hook(partial(mark, stage)))
        handles.append(module.register_forward_hook(partial(mark_backward, stage)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Spot(NamedTuple):
    """A block of a momentum stage, by its number; without a stage, what is between stages."""

    stage: str | None
    number: int


class Spots:
    """Follows a step through the blocks of a network and back.

    Attributes:
        outputs: The bytes of what each block returned.
    """

    def __init__(self) -> None:
        self.outputs: dict[Spot, int] = {}
        self._current = Spot(None, 0)
        self._is_used = False  # whether anything has run here
        self._left = 0  # stages

    def note(self) -> Spot:
        """Return where the step is, and take notice that something runs there."""
        self._is_used = True
        return self._current

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, the step is followed through ``model``."""
        handles = []
        for name, stage in momentum_stages(model).items():
            handles.append(stage.register_forward_pre_hook(partial(self._arrive, name)))
            handles.append(stage.register_forward_hook(partial(self._leave, name)))
            for number, block in enumerate(stage._modules.values()):
                if block is not None and not momentum_stages(block):
                    spot = Spot(name, number)
                    handles.append(block.register_forward_pre_hook(partial(self._begin, spot)))
                    handles.append(block.register_forward_hook(partial(self._end, spot)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, spot: Spot, *_: object) -> None:
        if spot != self._current:
            self._current, self._is_used = spot, False

    def _enter_with_gradient(self, output: object, spot: Spot) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._enter, spot))

    def _arrive(self, name: str, _stage: nn.Module, args: tuple[object, ...]) -> None:
        """Enter a stage; what a run needs before its first block belongs to that."""
        if self._current.stage is None and self._is_used and args:
            self._enter_with_gradient(args[0], self._current)
        self._enter(Spot(name, 0))

    def _leave(self, name: str, stage: MomentumSequential, _args: object, output: object) -> None:
        self._enter_with_gradient(output, Spot(name, len(stage) - 1))
        self._left += 1
        self._enter(Spot(None, self._left))

    def _begin(self, spot: Spot, *_: object) -> None:
        self._enter(spot)

    def _end(self, spot: Spot, _block: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            self.outputs[spot] = output.nbytes
        self._enter_with_gradient(output, spot)
