"""The stages of a network as a step runs through them, for saying where its memory is.

They are the children of the network, or of what is nearly all of it, such as a vision transformer's
encoder: "stem" is all before the first ``nn.Sequential`` among them, "head" all after the last one.
That is coarser than what can be frozen (zoo/stages.py), where each block of a transformer is one.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

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


@contextlib.contextmanager
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
