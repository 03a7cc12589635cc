"""A stage that keeps its input alone: backward computes its blocks' inputs again, then each block.

A block's input is needed until backward has done with the block, so at the beginning of the stage's
backward all but the last block run for the sake of the next one's input.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from momconv.momentum.replay import Enough, Replay, before_backward, evaluate

Call = Callable[..., Tensor]  # of a block, its input and further tensors


class Segment:
    """One pass through a stage."""

    def __init__(self, stage: Callable[[Tensor, Call], Tensor], *, in_parts: bool) -> None:
        """``stage`` computes the stage's output from its input, using the given Call for blocks."""
        self._stage = stage
        self._in_parts = in_parts
        self._replays: list[Replay] = []
        self._inputs: list[Tensor] = []

    def run(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        return self._stage(
            x, partial(self._first, x.detach()) if torch.is_grad_enabled() else evaluate
        )

    def _first(self, start: Tensor, block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        replay = Replay(block, in_parts=self._in_parts)
        self._replays.append(replay)
        action = partial(self._repeat, len(self._replays) - 1)
        return before_backward(replay.first(x, *args), action, start)

    def _repeat(self, n: int, start: Tensor) -> None:
        if len(self._inputs) <= n:
            self._find_inputs(n, start)
        del self._inputs[n + 1 :]  # of blocks that are not trained
        self._replays[n].repeat(self._inputs.pop())

    def _find_inputs(self, last: int, start: Tensor) -> None:
        """Compute the inputs of the blocks up to ``last`` again."""
        self._inputs.clear()

        def again(_block: nn.Module, x: Tensor, *_args: Tensor) -> Tensor:
            self._inputs.append(x)
            n = len(self._inputs) - 1
            if n == last:
                raise Enough
            return self._replays[n].rerun(x)

        with torch.no_grad(), suppress(Enough):
            self._stage(start, again)
