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

from momconv.momentum.equations import Rule, step, to_grid, unstep
from momconv.momentum.measures import note_magnitudes
from momconv.momentum.storage import State

_FASTER = "momconv.momentum.faster"


def _advance(state: State, y: Tensor, largest: Tensor, rule: Rule, n: int) -> Tensor:
    """Return x[n+1], and take low, v and r from n to n+1 in place.

    ``largest`` takes note of |x[n+1]| and |v[n+1]|: see ``note_magnitudes`` in measures.py.
    """
    x, v, r = step(*state.unpack(rule), lambda _: y, rule, n)
    note_magnitudes(largest, x.to(rule.dtype), v * rule.ulp)
    return state.pack(x, v, r, rule)


def _retreat(state: State, rule: Rule) -> Tensor:
    """Return x[n], and take low from n+1 to n in place; v and r stay at n+1."""
    x, v, r = state.unpack(rule)
    return state.pack(x - to_grid(v * rule.v_ulp, rule.ulp), v, r, rule)


def _undo(state: State, y: Tensor, rule: Rule, n: int) -> None:
    """Take v and r from n+1 to n in place, where x and low are at n and y = block(x[n])."""
    x, v, r = state.unpack(rule)
    state.pack(*unstep(x + to_grid(v * rule.v_ulp, rule.ulp), v, r, lambda _: y, rule, n), rule)


class PlainNorms:
    """The norms of a block that runs twice, which compute everything both times.

    Attributes:
        others: The block's modules that need their buffers when they are repeated.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.others = modules

    def finish(self) -> list[nn.Module]:
        """Return, after the first run, further modules that need their buffers."""
        return []

    def own(self, tensor: Tensor) -> bool:
        """Return whether a norm saves this for backward, and does without it in its second run."""
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
        """Take notice of the tensor that is saved next."""

    def find_middle(self, little: int) -> int:
        """Return how many tensors are saved before the cut, 0 for none."""
        return 0


def _choose(name: str, plain: Any) -> Any:
    """Return what momentum/faster/ has under this name, or else the plain form."""
    try:
        return getattr(import_module(_FASTER), name)
    except ModuleNotFoundError as error:
        if error.name != _FASTER:  # something else is missing, which must not pass for that
            raise
        return plain


advance: Callable[[State, Tensor, Tensor, Rule, int], Tensor] = _choose("advance", _advance)
retreat: Callable[[State, Rule], Tensor] = _choose("retreat", _retreat)
undo: Callable[[State, Tensor, Rule, int], None] = _choose("undo", _undo)
find_obstacle: Callable[[torch.device], str | None] = _choose(
    "find_obstacle", lambda gpu: "momentum/faster/ is missing"
)
NEEDED: str = _choose("NEEDED", "the folder")  # for steps on a GPU
Norms: type[PlainNorms] = _choose("Norms", PlainNorms)
Cut: type[PlainCut] = _choose("Cut", PlainCut)
