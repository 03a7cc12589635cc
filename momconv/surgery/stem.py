"""The stem of a network, all that it does before its first stage, recomputed in backward.

At high resolution the stem's activations weigh as much as a block of the first stage. Whatever the
network's class is, its forward pass is run again as far as its first stage.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from momconv.momentum.replay import Enough, Replay, require_unchanged, version_of
from momconv.momentum.sequential import MomentumSequential, momentum_stages


def make_stem_recomputable(model: nn.Module) -> None:
    """Let what comes before the first stage of ``model`` follow that stage's strategy."""
    stages = momentum_stages(model)
    if "" in stages:  # the model itself
        return
    outer = [
        stage
        for name, stage in stages.items()
        if not any(name.startswith(f"{other}.") for other in stages)
    ]
    stem = Stem(model, outer)
    model.register_forward_pre_hook(stem.begin, with_kwargs=True)
    model.register_forward_hook(stem.end, always_call=True)
    for stage in outer:
        stage.register_forward_pre_hook(stem.reach)


def restore_stem(model: nn.Module) -> None:
    """Undo :func:`make_stem_recomputable`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _stem_of(hook)]:
                del hooks[key]


def leave_stem(model: nn.Module) -> None:
    """After a KeyboardInterrupt in ``model``, of which PyTorch tells no hook."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if stem := _stem_of(hook):
                stem.end(module, None, None)


def _stem_of(hook: object) -> "Stem | None":
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Stem) else None


class Stem(nn.Module):
    """The beginning of ``model``, which is not a part of it but has its parameters and buffers."""

    def __init__(self, model: nn.Module, stages: Sequence[MomentumSequential]) -> None:
        super().__init__()
        self.model = model
        self._stages = [*stages]
        self._replay: Replay | None = None
        self._context: AbstractContextManager[None] | None = None  # in the stem, the first time
        self._images: tuple[Tensor, int] | None = None  # and their version
        self._is_repeated = False

    def forward(self, *images: Tensor) -> None:
        """Run the model until it calls a stage, which raises Enough."""
        self._is_repeated = True
        try:
            self.model.forward(*images)
        finally:
            self._is_repeated = False

    def begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: forget what the stem saves, unless it is to be stored."""
        if self._context is not None:  # a KeyboardInterrupt ended the last pass
            self._close()
        is_plain = args and not kwargs and all(isinstance(arg, Tensor) for arg in args)
        is_wanted = any(stage.strategy != "store" for stage in self._stages)
        is_eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not (is_plain and is_wanted and is_eager):
            return
        self._images = args[0], version_of(args[0])
        self._replay = Replay(self)
        self._context = self._replay.forgetting(*args)
        self._context.__enter__()

    def reach(self, _stage: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a stage: the stem ends here."""
        if self._is_repeated:
            raise Enough
        if self._context is not None:
            self._finish(args[:1])

    def end(self, _model: nn.Module, _args: object, output: object) -> None:
        """After the model, which may have failed in the stem, or come to no stage."""
        if self._context is not None and output is None:
            self._close()
        elif self._context is not None:
            self._finish([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
        self._replay = self._images = None

    def _finish(self, outputs: Sequence[Tensor]) -> None:
        """All that these were computed with is the stem."""
        assert self._replay is not None
        assert self._images is not None
        require_unchanged(self.model, *self._images)
        self._close()
        images = self._images[0].detach()
        self._replay.postpone(images)
        self._replay.watch([images, *_find_leaves(outputs, self._images[0])])

    def _close(self) -> None:
        context, self._context = self._context, None
        assert context is not None
        context.__exit__(None, None, None)


def _find_leaves(outputs: Iterable[Tensor], images: Tensor) -> list[Tensor]:
    """The parameters with which these were computed from the images, those that are trained.

    The others of the network may change before the stem is repeated: an optimiser may step while
    backward is under way.
    """
    waiting = [output.grad_fn for output in outputs]
    leaves, seen = [], {images.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return leaves
