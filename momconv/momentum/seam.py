"""Where the core asks momentum/faster/ for help; without that folder it does without.

What stands here is all that there is to it, in its plainest form: the steps of equations.py out of
place, a block that is repeated whole, and with all it computes. The folder does the same in less
memory and time, and changes no bit.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from momconv.momentum.equations import Rule, step, unstep
from momconv.momentum.measures import magnitude

_FASTER = "momconv.momentum.faster"


def _advance(  # noqa: PLR0913 (the state, what changes it, and by which rule)
    x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, largest: Tensor, rule: Rule, n: int
) -> Tensor:
    """Return x[n+1], and take v and r from n to n+1 in place. γ = 1 has no r.

    ``largest``, a scalar, becomes the largest |x[n+1]| if that is larger.
    """
    x_next, v_next, r_next = step(x, v, _widen(r, v), lambda _: y, rule, n)
    _keep(v, v_next, r, r_next)
    torch.maximum(largest, magnitude(x_next), out=largest)
    return x_next


def _undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, rule: Rule, n: int) -> None:
    """Take v and r from n+1 to n in place, where x is x[n] and y = block(x[n])."""
    _, v_before, r_before = unstep(x + v * rule.ulp, v, _widen(r, v), lambda _: y, rule, n)
    _keep(v, v_before, r, r_before)


def _widen(r: Tensor | None, v: Tensor) -> Tensor:
    return torch.zeros_like(v) if r is None else r.to(v.dtype)


def _keep(v: Tensor, v_new: Tensor, r: Tensor | None, r_new: Tensor) -> None:
    v.copy_(v_new)
    if r is not None:
        r.copy_(r_new)


class PlainNorms:
    """The norms of a block that runs twice, which compute everything both times.

    Attributes:
        others: The block's modules that need their buffers when they are repeated.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.others = modules

    def finish(self) -> list[nn.Module]:
        """After the first run: further modules that need their buffers."""
        return []

    def own(self, tensor: Tensor) -> bool:
        """Whether autograd saves this for a norm, and need not be given it in the second run."""
        return False

    def remembering(self) -> AbstractContextManager[None]:
        """Inside, norms are called for the first time."""
        return nullcontext()

    def recalling(self) -> AbstractContextManager[None]:
        """Inside, they are called again, in the same order."""
        return nullcontext()


class PlainCut:
    """Where a block that may be repeated in two parts is cut: nowhere."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        pass

    def note(self, tensor: Tensor) -> None:
        """This is saved next."""

    def find_middle(self, little: int) -> int:
        """How many tensors are saved before the cut, 0 for none."""
        return 0


def _choose(name: str, plain: Any) -> Any:
    """What momentum/faster/ has under this name, or else the plain thing."""
    try:
        return getattr(import_module(_FASTER), name)
    except ModuleNotFoundError as error:
        if error.name != _FASTER:  # something else is missing, which must not pass for that
            raise
        return plain


advance: Callable[..., Tensor] = _choose("advance", _advance)
undo: Callable[..., None] = _choose("undo", _undo)
find_obstacle: Callable[[torch.device], str | None] = _choose(
    "find_obstacle", lambda gpu: "momentum/faster/ is missing"
)
NEEDED: str = _choose("NEEDED", "the folder")  # for steps on a GPU
Norms: type[PlainNorms] = _choose("Norms", PlainNorms)
Cut: type[PlainCut] = _choose("Cut", PlainCut)
