"""The stem of a network, all that it does before its first stage, recomputed in backward.

At high resolution the stem's activations weigh as much as a block of the first stage. Whatever the
network's class is, its forward pass is run again as far as its first stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from momconv.momentum.replay import Enough, Replay, require_unchanged
from momconv.momentum.sequential import momentum_stages
from momconv.states import is_graph_made, version_of


def make_stem_recomputable(model: nn.Module) -> None:
    """Let what comes before the first stage of ``model`` be recomputed where any stage is."""
    stages = momentum_stages(model)
    if "" in stages:  # the model itself
        return
    stem = Stem()
    model.register_forward_pre_hook(stem.begin, with_kwargs=True)
    model.register_forward_hook(stem.end, always_call=True)
    for name, stage in stages.items():
        if not any(name.startswith(f"{other}.") for other in stages):
            stage.register_forward_pre_hook(stem.reach)


def restore_stem(model: nn.Module) -> None:
    """Undo :func:`make_stem_recomputable`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _stem_of(hook)]:
                del hooks[key]


def leave_stem(model: nn.Module) -> None:
    """End the pass that a KeyboardInterrupt broke off in ``model``: PyTorch tells no hook of it."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if stem := _stem_of(hook):
                stem.abandon()


def _stem_of(hook: object) -> "Stem | None":
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Stem) else None


@dataclass(frozen=True, slots=True)
class _Pass:
    """A forward pass that is in the stem."""

    model: nn.Module
    replay: Replay
    forgetting: AbstractContextManager[None]
    images: Tensor
    version: int  # of the images, at the beginning

    def leave(self) -> None:
        """Let autograd save tensors again."""
        self.forgetting.__exit__(None, None, None)


class _Beginning(nn.Module):
    """What a model does until it calls a stage."""

    def __init__(self, model: nn.Module, repeating: set[int]) -> None:
        super().__init__()
        self.model = model
        self._repeating = repeating

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:  # noqa: FBT001
        """Yield the modules outside the stages, as the others are not called."""
        stages: set[nn.Module] = {*momentum_stages(self.model).values()}
        yield self
        for _, module in self.model.named_modules(stages, remove_duplicate=remove_duplicate):
            yield module

    def forward(self, *images: Tensor) -> None:
        """Run the model up to its first stage, which raises Enough."""
        self._repeating.add(get_ident())
        try:
            self.model.forward(*images)
        finally:
            self._repeating.remove(get_ident())


class Stem:
    """The hooks of one model. They do not hold it: it is to be freed when its user lets it go.

    Threads may share it, as they share any network. A stem that is compiled is stored.
    """

    def __init__(self) -> None:
        self._passes: dict[int, _Pass] = {}  # by thread
        self._repeating: set[int] = set()  # threads

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the model: let autograd save nothing in a stem that is to be repeated."""
        if torch.compiler.is_compiling():
            return
        self.abandon()  # a KeyboardInterrupt may have ended the last pass
        is_plain = args and not kwargs and all(isinstance(arg, Tensor) for arg in args)
        is_replica = getattr(model, "_is_replica", False)  # of DataParallel
        is_wanted = torch.is_grad_enabled() and not is_replica and _is_recomputed(model)
        is_wanted = is_wanted and not is_graph_made()
        # A hook that comes later may change the images.
        is_last = _stem_of(next(reversed(model._forward_pre_hooks.values()), None)) is self
        if not (is_plain and is_wanted and is_last):
            return
        replay = Replay(_Beginning(model, self._repeating), is_open=True)
        forgetting = replay.forgetting(*args)
        self._passes[get_ident()] = _Pass(model, replay, forgetting, args[0], version_of(args[0]))
        forgetting.__enter__()

    def reach(self, _stage: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook before a stage: end the stem, or its repetition.

        Raises:
            Enough: It is being repeated, and that was all of it.
        """
        if torch.compiler.is_compiling():
            return
        if get_ident() in self._repeating:
            raise Enough
        self._finish(args[:1])

    def end(self, _model: nn.Module, _args: object, output: object) -> None:
        """Hook after the model: end a stem in which it failed, or which was all of it."""
        if torch.compiler.is_compiling():
            return
        if output is None:
            self.abandon()
        else:
            self._finish([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])

    def abandon(self) -> None:
        """End a pass that did not get out of the stem, if there is one."""
        if ended := self._passes.pop(get_ident(), None):
            ended.leave()

    def _finish(self, outputs: Sequence[Tensor]) -> None:
        """End the stem at ``outputs``, if this pass has not left it before."""
        ended = self._passes.get(get_ident())
        if ended is None:
            return
        require_unchanged(ended.model, ended.images, ended.version)
        del self._passes[get_ident()]
        ended.leave()
        images = ended.images.detach()
        ended.replay.postpone(images)
        ended.replay.watch([images, *_find_leaves(outputs, ended.images)])


def _is_recomputed(model: nn.Module) -> bool:
    return any(stage.strategy != "store" for stage in momentum_stages(model).values())


def _find_leaves(outputs: Iterable[Tensor], images: Tensor) -> list[Tensor]:
    """Return the trained parameters on which what backward needs of the stem may depend.

    The others of the network may change before the stem is repeated: an optimiser may step while
    backward is under way. So may those whose gradient needs nothing of the stem, such as an
    embedding that is added at its end.
    """
    waiting = [(output.grad_fn, False) for output in outputs]
    leaves, seen = [], {(images.grad_fn, False), (images.grad_fn, True)}
    while waiting:
        node, is_needed = waiting.pop()
        if node is not None and (node, is_needed) not in seen:
            seen.add((node, is_needed))
            leaves += [node.variable] if is_needed and hasattr(node, "variable") else []
            is_needed = is_needed or any(name.startswith("_raw_saved_") for name in dir(node))
            waiting += [(following, is_needed) for following, _ in node.next_functions]
    return leaves
