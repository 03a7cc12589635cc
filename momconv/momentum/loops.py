"""A loop over the blocks of a stage, which becomes one call of the stage.

In ``for block in blocks: x = block(x)`` each block waits for the last one, with the arguments that
it has been called with, which may be others for each. Then the stage is called.
"""

from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from momconv.errors import UsageError
from momconv.momentum.arguments import Call, gather

_FIX = "call the whole stage, or take momconv.revert(model) for the plain network"


class Turn:
    """A block as a loop finds it: in all but its calls it is the block.

    So whoever looks for what is known of the block (FSDP2, for example) finds it under either.
    """

    __slots__ = ("__dict__", "__weakref__", "_block", "_is_differentiated", "_place", "_stage")

    def __init__(self, stage: Any, place: int, block: nn.Module) -> None:
        own = {
            "_stage": stage,
            "_place": place,
            "_block": block,
            "_is_differentiated": torch.is_grad_enabled(),
            "__dict__": vars(block),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the block's output, or the stage's if it is the last.

        Raises:
            UsageError: It is not this block's turn, or a checkpoint around each block would leave
                the stage without gradients.
        """
        waiting = x if type(x) is Waiting else Waiting(self._stage, x, ())
        if waiting.stage is not self._stage or len(waiting.calls) != self._place:
            raise UsageError(
                f"{self._block._get_name()} {self._place} of a momentum stage was called out of"
                " turn: its loop must call all blocks, each with what the one before returned",
                kind="usage.outside_stage",
                fix=_FIX,
            )
        calls = (*waiting.calls, (args, kwargs))
        if len(calls) < len(self._stage._modules):
            return Waiting(self._stage, waiting.x, calls)
        is_expected = self._is_differentiated and getattr(waiting.x, "grad_fn", None) is not None
        if is_expected and not torch.is_grad_enabled():
            raise UsageError(
                "a loop calls the blocks of a momentum stage without gradients, as reentrant"
                " checkpoints do, which would not see those of what is computed together",
                kind="usage.outside_stage",
                fix="torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)",
            )
        args, kwargs = gather(calls)
        return self._stage(waiting.x, *args, **kwargs)

    forward = __call__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)

    def __eq__(self, other: object) -> bool:
        return self._block is (other._block if type(other) is Turn else other)

    def __hash__(self) -> int:
        return hash(self._block)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self._block.__reduce_ex__(protocol)


class Waiting:
    """Stands for what a block returns that has not been computed yet, and never will be by itself.

    Within a run that begins the stage it has the shape and the type of the stage's input. All else
    that one does with a tensor is refused.

    Attributes:
        stage: The stage.
        x: Its input.
        calls: What its first blocks have been called with besides.
    """

    def __init__(self, stage: Any, x: Any, calls: tuple[Call, ...]) -> None:
        for name, value in {"stage": stage, "x": x, "calls": calls}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        first = next(iter(self.stage.runs or ()), None)
        if name in _KEPT and first and first.start == 0 and len(self.calls) <= first.stop:
            return getattr(self.x, name)
        _refuse()


def _refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Raise what is said wherever somebody makes use of what is waiting."""
    raise UsageError(
        "a loop over the blocks of a momentum stage used what one of them returned, which is"
        " computed together with the others",
        kind="usage.outside_stage",
        fix=_FIX,
    )


_KEPT = ("shape", "size", "ndim", "dim", "numel", "dtype", "device", "is_cuda")  # in a run
_OF_ANY_OBJECT = {
    *("__class__", "__dir__", "__getattribute__", "__getstate__", "__hash__", "__init__"),
    *("__init_subclass__", "__new__", "__repr__", "__sizeof__", "__subclasshook__"),
}
_ATTRIBUTES = {name: getattr(kind, name) for kind in (float, Tensor) for name in dir(kind)}
for _name in _ATTRIBUTES.keys() - _OF_ANY_OBJECT:
    if _name.startswith("__") and callable(_ATTRIBUTES[_name]):
        setattr(Waiting, _name, _refuse)
Waiting.__torch_function__ = classmethod(_refuse)  # type: ignore[attr-defined]
