"""``MomentumSequential``: an ``nn.Sequential`` whose runs of residual blocks follow (2)."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # imports the compiler only where it is at work

from momconv.errors import UsageError
from momconv.momentum.arguments import bind
from momconv.momentum.autograd import Strategy, run
from momconv.momentum.equations import Rule, Velocity, coefficients, weights
from momconv.momentum.replay import checkpoint, evaluate, without_autocast_cache
from momconv.momentum.segment import Call, Segment
from momconv.tracing.runs import find_runs

SMALLEST_GAMMA = 1e-6  # below it one step's remainder would not fit an exact float


def check_gamma(gamma: float) -> float:
    """γ itself.

    Raises:
        UsageError: It cannot be the γ of a stage.
    """
    if gamma != 0 and not SMALLEST_GAMMA <= gamma <= 1:
        raise UsageError(
            f"gamma is {gamma}, which is neither 0 (the plain network) nor in"
            f" [{SMALLEST_GAMMA}, 1]",
            kind="usage.gamma",
            fix="--gamma 0.9",
        )
    return float(gamma)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(
            f"unknown {name} {value!r}",
            kind="usage.bad_value",
            fix=f"one of {', '.join(known)}",
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``start`` to ``stop`` (exclusive) of a Sequential, with a gain for each."""

    start: int
    stop: int
    gains: tuple[float, ...]

    def __len__(self) -> int:
        return self.stop - self.start


def check_runs(runs: Sequence[Run], blocks: int) -> None:
    """Do nothing if these can be the runs among so many blocks.

    Raises:
        UsageError: One overlaps another, goes beyond the blocks, or lacks a gain, or a gain is 0.
    """
    position = 0
    for one in runs:
        fits = position <= one.start < one.stop <= blocks and len(one.gains) == len(one)
        if not fits or 0 in one.gains:
            raise UsageError(f"there are {blocks} blocks, and no run {one}", kind="usage.bad_run")
        position = one.stop


class MomentumSequential(nn.Sequential):
    """An ``nn.Sequential`` that replaces its residual updates by momentum, and can be inverted.

    Two or more consecutive residual blocks that keep the shape of their input are a run, and follow
    equation (2) of Sander et al. 2021; the other blocks stay as they are. State-dict keys
    are those of the ``nn.Sequential``. Backward under ``strategy="momentum"`` needs, for each run,
    x, v and log2(1/γ) bits a block instead of the blocks' activations, and gives the gradients of
    ``strategy="store"`` bit for bit. Threads may share it in inference, but not in training:
    backward puts copies of its blocks' buffers in their place for a while.

    Attributes:
        gamma: γ in (0, 1]; 0 makes it the plain network.
        velocity: v[0] is 0 ("zero") or f(x[0]) ("residual").
        strategy: how backward gets its activations; see momconv.momentum.autograd.
        in_parts: whether blocks that are computed again may be so in two parts, one after the
            other, which takes less memory and more time; see faster/parts.py.
        fraction_bits: the grid is 2^-fraction_bits in single precision, which leaves activations a
            range of ±2^(22 - fraction_bits). Double precision has 29 more.
        runs: found on the first forward pass, unless given.
        kind: the plain class whose place it takes.

    Raises:
        UsageError: γ is not in [0, 1], or another argument is none of those that there are. In the
            forward pass: a block writes into its input; a block of a run changes its shape; runs
            are to be found, but what blocks do depends on values, or torch.func is at work.
        InversionError: in backward, what it starts from was written to, or backward comes twice.
        RangeOverflow: in backward, an activation was too large for exact sums.
        NotReproducible: in backward, a block computed something else when it was run again.

    >>> class Block(nn.Linear):
    ...     def forward(self, x):
    ...         return x + super().forward(x).tanh()
    >>> net = MomentumSequential(*(Block(4, 4) for _ in range(3)))
    >>> net(torch.ones(1, 4)).shape, net.runs
    (torch.Size([1, 4]), (Run(start=0, stop=3, gains=(1.0, 1.0, 1.0)),))
    """

    gamma: float
    velocity: Velocity
    strategy: Strategy
    in_parts: bool
    fraction_bits: int
    runs: tuple[Run, ...] | None
    kind: type[nn.Module] = nn.Sequential

    def __init__(
        self,
        *blocks: Any,
        gamma: float = 0.9,
        velocity: Velocity = "zero",
        strategy: Strategy = "momentum",
        in_parts: bool = False,
        fraction_bits: int = 14,
        runs: Sequence[Run] | None = None,
    ) -> None:
        super().__init__(*blocks)
        _check_choice("velocity", velocity, get_args(Velocity))
        _check_choice("strategy", strategy, get_args(Strategy))
        if blocks and runs:
            check_runs(runs, len(self))
        self.gamma = check_gamma(gamma)
        self.velocity = velocity
        self.strategy = "store" if gamma == 0 and strategy == "momentum" else strategy
        self.in_parts = in_parts
        self.fraction_bits = fraction_bits
        self.runs = None if runs is None else tuple(runs)

    def forward(  # type: ignore[override]  # x is called input there
        self, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The blocks in turn, each called with x and the same further arguments.

        Tensors among these may require gradients. In a network that is compiled as a whole, a stage
        runs as it is: backward runs its blocks again, which must be the same program both times.
        """
        # The flag itself: PyTorch 2.11's compiler takes is_exporting() for true in all it compiles.
        is_exporting = torch.compiler._is_exporting_flag
        if torch.compiler.is_dynamo_compiling() and not is_exporting:
            return _uncompiled(self, x, *args, **kwargs)
        self.find_runs(x, *args, **kwargs)
        blocks, tensors = bind([*self._modules.values()], args, kwargs)
        walk = partial(self._walk, blocks, tensors, self.strategy)
        with without_autocast_cache(x.device.type):
            if self.strategy == "segment":
                return Segment(walk, in_parts=self.in_parts).run(x)
            if self.strategy == "store":
                return walk(x, evaluate)
            return walk(x, partial(checkpoint, in_parts=self.in_parts))

    def _walk(
        self,
        blocks: list[nn.Module],
        args: tuple[Tensor, ...],
        strategy: Strategy,
        x: Tensor,
        call: Call,
    ) -> Tensor:
        """:meth:`forward` with the blocks bound to what is no tensor; ``call`` calls them.

        Backward may come here again, when the stage has another strategy already.
        """
        is_reversible = strategy == "momentum" and torch.is_grad_enabled()

        def plain(x: Tensor, start: int, stop: int | None) -> Tensor:
            """Blocks outside the runs; one with a stage inside has a strategy already."""
            between = blocks[start:stop]
            for block in between if strategy == "store" else join_layers(between):
                has_own = strategy != "segment" and momentum_stages(block)
                x = block(x, *args) if strategy == "store" or has_own else call(block, x, *args)
            return x

        position = 0
        for part in (self.runs or ()) if self.gamma else ():
            x = plain(x, position, part.start)
            members, rule = blocks[part.start : part.stop], self.rule(part, x.dtype)
            in_run = None if is_reversible else call
            x = run(members, x, args, rule, in_run, in_parts=self.in_parts)
            position = part.stop
        return plain(x, position, None)

    def find_runs(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Run, ...]:
        """The runs, which are found by tracing shapes from x if they are not known yet.

        There is a warning where there are none; γ = 0 needs none.

        Raises:
            UsageError: What the blocks do depends on values: they need to be given ``runs``. Or
                this is inside a transform of torch.func, where nothing can be traced.
        """
        if self.runs is None and self.gamma:
            if torch._C._functorch.maybe_current_level() is not None:
                raise UsageError(
                    "runs cannot be found inside torch.func.grad, vmap and the like",
                    kind="model.functorch",
                    fix="call the network once before, or give it runs=[…]",
                )
            blocks, tensors = bind([*self._modules.values()], args, kwargs)
            found = find_runs(blocks, x, tensors)
            self.runs = tuple(Run(run.start, run.stop, (1.0,) * len(run)) for run in found)
        return self.runs or ()

    def rule(self, part: Run, dtype: torch.dtype) -> Rule:
        """The constants of a run that is kept in ``dtype``."""
        steps = coefficients(self.gamma, part.gains, self.velocity)
        # Where blocks count more than once (γ = 1 without gains: up to k times), x grows with it.
        growth = math.ceil(math.log2(max(1.0, *map(abs, weights(self.gamma, steps)))))
        bits = self.fraction_bits - growth + (29 if dtype == torch.float64 else 0)
        return Rule(self.gamma, steps, 2.0**-bits)

    def __getitem__(self, index: Any) -> Any:
        """A block or, for a slice, a plain ``nn.Sequential``: momentum belongs to whole runs."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self.named_children()][index]))
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        """γ, the strategy and the runs, for ``print(model)``."""
        spans = ", ".join(f"{run.start}-{run.stop - 1}" for run in self.runs or ())
        return f"gamma={self.gamma}, strategy={self.strategy}, momentum blocks: {spans or 'none'}"


@_disable_dynamo
def _uncompiled(stage: MomentumSequential, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return stage.forward(x, *args, **kwargs)


def join_layers(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The blocks, each with the single layers that follow it: a ReLU may write into its output."""
    group: list[nn.Module] = []
    for block in blocks:
        is_layer = next(block.children(), None) is None
        if group and (not is_layer or momentum_stages(group[0])):
            yield _join(group)
            group = []
        group.append(block)
    if group:
        yield _join(group)


def _join(group: list[nn.Module]) -> nn.Module:
    return group[0] if len(group) == 1 else nn.Sequential(*group)


class MomentumList(MomentumSequential):
    """Takes the place of an ``nn.ModuleList`` in a network that calls its blocks in turn.

    Iterating over it gives one module, itself: ``for block in blocks: x = block(x)`` does all.
    """

    def __iter__(self) -> Iterator[nn.Module]:
        yield self


class MomentumDict(MomentumSequential):
    """Takes the place of a module dictionary whose ``forward`` calls its items in turn.

    That may hand out what some of them return, as torchvision's ``IntermediateLayerGetter`` does,
    but nothing from inside a run.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dictionary would do."""
        return self.kind.forward(self, *args, **kwargs)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """The runs, each under the name of its last block, and all other blocks."""
        for n, (name, block) in enumerate(self._modules.items()):
            member_of = [part for part in self.runs or () if part.start <= n < part.stop]
            for part in member_of:
                if n == part.stop - 1:
                    yield name, self._take(part)
            if not member_of:
                is_layer = next(block.children(), None) is None
                yield name, block if is_layer else self._take(Run(n, n + 1, ()))

    def _take(self, part: Run) -> MomentumSequential:
        """Some blocks as a stage for themselves."""
        return MomentumSequential(
            *[*self._modules.values()][part.start : part.stop],
            gamma=self.gamma,
            velocity=self.velocity,
            strategy=self.strategy,
            in_parts=self.in_parts,
            fraction_bits=self.fraction_bits,
            runs=[Run(0, len(part), part.gains)] if part.gains else [],
        )


def momentum_stages(model: nn.Module) -> dict[str, MomentumSequential]:
    """The MomentumSequentials of a model by name, in the order of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MomentumSequential)
    }


def set_strategy(model: nn.Module, strategy: Strategy | Literal["auto"]) -> None:
    """Choose how backward gets its activations in every MomentumSequential of ``model``.

    Values and gradients stay the same, bit for bit; memory and time change. A forward pass that
    waits for its backward pass is not to be given another strategy. "auto" is momentum
    where a stage has runs and checkpoints elsewhere. Activations are largest in the first stage:
    there it computes blocks in parts and, if the stage has no runs, keeps its input alone.

    Raises:
        UsageError: an unknown strategy; a model without momentum stages; "momentum" for γ = 0.
    """
    _check_choice("strategy", strategy, [*get_args(Strategy), "auto"])
    stages = list(momentum_stages(model).values())
    if not stages:
        raise UsageError(
            f"this {type(model).__name__} has no momentum stages",
            kind="usage.not_converted",
            fix="model = momconv.convert(model)",
        )
    if strategy == "momentum" and all(stage.gamma == 0 for stage in stages):
        raise UsageError(
            "gamma is 0, the plain network, which cannot be inverted",
            kind="usage.gamma",
            fix='momconv.set_strategy(model, "checkpoint")',
        )
    innermost = [stage for stage in stages if len(momentum_stages(stage)) == 1]
    for stage in stages:
        is_first, has_runs = stage is innermost[0], bool(stage.gamma) and stage.runs != ()
        stage.in_parts = strategy == "auto" and is_first
        if strategy == "auto":
            stage.strategy = "momentum" if has_runs else "segment" if is_first else "checkpoint"
        elif strategy == "segment" and stage not in innermost:
            stage.strategy = "checkpoint"
        else:
            stage.strategy = strategy
