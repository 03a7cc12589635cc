"""``MomentumSequential``: an ``nn.Sequential`` whose runs of residual blocks follow (2)."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, chain, groupby, repeat
from typing import Any, NoReturn, Self, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # imports the compiler only where it is at work
from torch.fx import Proxy

from momconv.errors import ModelFileError, UsageError
from momconv.momentum.arguments import bind
from momconv.momentum.autograd import Strategy, run
from momconv.momentum.equations import HIGHEST, LOWEST, Rule, Velocity, coefficients
from momconv.momentum.inversion import EndState, follow, read_state, walk_back
from momconv.momentum.loops import Turn
from momconv.momentum.members import call_block, claim, mark, unmark
from momconv.momentum.ranging import (
    Misfit,
    ask_to_repeat,
    find_fitting,
    find_range,
    has_values,
    keep_state,
    one_pass,
    survey,
)
from momconv.momentum.replay import (
    checkpoint,
    evaluate,
    require_tensor,
    without_autocast_cache,
)
from momconv.momentum.segment import Call, Segment
from momconv.momentum.ways import Way
from momconv.states import are_sharded, is_graph_made
from momconv.tracing.runs import find_runs
from momconv.vocabulary import Strategies

_UNKNOWN = LOWEST  # the exponent where nothing can be seen, as in fake tensors

SMALLEST_GAMMA = 1e-6  # below it one step's remainder would not fit an exact float


def check_gamma(gamma: float) -> float:
    """Return γ as a float.

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
    """Blocks ``start`` to ``stop`` (exclusive) of a Sequential, with a gain for each.

    Attributes:
        start: The first block.
        stop: The block after the last.
        gains: What each residual is multiplied by, beside 1 − γ.
        exponent: Activations below 2^exponent are exact, on a grid as fine as 31 bits make it (51
            in double precision). None: the first pass finds it.
    """

    start: int
    stop: int
    gains: tuple[float, ...]
    exponent: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> range:
        """The places of its blocks."""
        return range(self.start, self.stop)


def _without(run: Run, gone: int) -> Run:
    """Return the run once the block at this place is gone."""
    start = run.start - (gone < run.start)
    gains = tuple(g for n, g in zip(run.blocks, run.gains, strict=True) if n != gone)
    return replace(run, start=start, stop=start + len(gains), gains=gains)


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
        way: how backward gets its activations: a strategy, and how it divides the blocks.
        runs: found on the first forward pass, unless given, and so is each run's range. A pass that
            does not fit that is done again, hooks included; one with gradients changes it.
        kind: the plain class whose place it takes.
        nests: whether an ``nn.TransformerEncoder`` gave nested tensors to what was in its place.

    Raises:
        UsageError: γ is not in [0, 1], or another argument is none of those that there are. In the
            forward pass: a block writes into its input; a block of a run changes its shape; runs
            are to be found, but what blocks do depends on values, or torch.func is at work; x is
            complex.
            Outside it: a block of a run is called with what another one has returned, or one that
            is a whole run is called at all, which is the plain network. It is so without an error
            if ``block.forward(x)`` is called, or something else done to x between two blocks, such
            as ``1.5 * x`` or dropout.
        InversionError: in backward, what it starts from was written to, or backward comes twice.
        RangeOverflow: in a forward pass that cannot be done again alone (several processes, a
            checkpoint around the stage), an activation outgrew the range, which has become wider:
            the next pass succeeds.
        NotReproducible: in backward, a block computed something else when it was run again. Its
            output is compared, not what it saves for backward alone, and nothing where a value of
            the run was NaN or infinite.

    >>> class Block(nn.Linear):
    ...     def forward(self, x):
    ...         return x + super().forward(x).tanh()
    >>> net = MomentumSequential(*(Block(4, 4) for _ in range(3)))
    >>> net(torch.ones(1, 4)).shape, net.runs
    (torch.Size([1, 4]), (Run(start=0, stop=3, gains=(1.0, 1.0, 1.0), exponent=3),))
    """

    velocity: Velocity
    way: Way
    _gamma: float
    _runs: tuple[Run, ...] | None
    _members: frozenset[nn.Module | None]  # of runs, as far as is known
    kind: type[nn.Module] = nn.Sequential
    nests: bool = False

    def __init__(
        self,
        *blocks: Any,
        gamma: float = 0.9,
        velocity: Velocity = "zero",
        strategy: Strategy = "momentum",
        in_parts: bool = False,
        runs: Sequence[Run] | None = None,
    ) -> None:
        super().__init__(*blocks)
        _check_choice("velocity", velocity, get_args(Velocity))
        _check_choice("strategy", strategy, get_args(Strategy))
        self._gamma = check_gamma(gamma)
        self.velocity = velocity
        self._members = frozenset()
        is_plain = gamma == 0 and strategy == "momentum"
        self.way = Way("store" if is_plain else strategy, in_parts=in_parts)
        self.runs = runs

    @property
    def gamma(self) -> float:
        """γ of equation (1); 0 makes it the plain network."""
        return self._gamma

    @gamma.setter
    def gamma(self, gamma: float) -> None:
        self._gamma = check_gamma(gamma)
        self.runs = self.runs

    @property
    def runs(self) -> tuple[Run, ...] | None:
        """Which blocks follow the momentum rule; None as long as nobody knows."""
        return self._runs

    @runs.setter
    def runs(self, runs: Sequence[Run] | None) -> None:
        blocks = [*self._modules.values()]
        if blocks and runs:
            check_runs(runs, len(self))
        self._runs = None if runs is None else tuple(runs)
        possible = [range(len(blocks))] if runs is None else [part.blocks for part in runs]
        places = {n for part in possible if self.gamma for n in part}
        members = frozenset(block for n, block in enumerate(blocks) if n in places)
        plain = [part.start for part in self.followed if self._begins_plain(part)]
        single = {part.start for part in self.followed if len(part) == 1} - {*plain}
        second = [block for n, block in enumerate(blocks) if n - 1 in plain]
        mark(self, members, second, [blocks[n] for n in single if n < len(blocks)])
        unmark(self, ({*blocks} | self._members) - members)  # one may be at several places
        self._members = members

    def forward(  # type: ignore[override]  # x is called input there
        self, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Call the blocks in turn, each with x and the same further arguments.

        Tensors among these may require gradients. In a network that is compiled as a whole, a stage
        runs as it is: backward runs its blocks again, which must be the same program both times.
        """
        if isinstance(x, Proxy):  # of torch.fx, for which a stage with runs is one operation
            return _trace(self, x, args, kwargs)
        # The flag itself: PyTorch 2.11's compiler takes is_exporting() for true in all it compiles.
        is_exporting = torch.compiler._is_exporting_flag
        if torch.compiler.is_dynamo_compiling() and not is_exporting:
            return _uncompiled(self, x, *args, **kwargs)
        check_runs(self.find_runs(x, *args, **kwargs), len(self))
        blocks, tensors = bind([*self._modules.values()], args, kwargs)
        if is_graph_made() or not self.gamma:
            return self._pass(_Pass(blocks, tensors, self.way), x)
        proposed: dict[int, int] = {}
        restore = keep_state([self], x.device)
        while True:
            try:
                with one_pass() as is_inside:
                    return self._pass(_Pass(blocks, tensors, self.way, proposed), x)
            except Misfit:
                if is_inside and torch.is_grad_enabled():
                    raise  # the whole pass is done again, with all that it saves
            restore()

    def _pass(self, this: "_Pass", x: Tensor) -> Tensor:
        """Go through all blocks once, of which backward makes what it needs.

        Raises:
            Misfit: Of a run, for which the pass proposes another range.
        """
        blocks, walk = this.blocks, partial(self._walk, this)
        with without_autocast_cache(x.device.type):
            if self.strategy == "store" or is_graph_made():
                return walk(range(len(blocks)), x, evaluate)
            if self.strategy == "segment":
                for piece in self._list_pieces(blocks):
                    x = Segment(partial(walk, piece), in_parts=self.in_parts).run(x)
                return x
            call = partial(checkpoint, in_parts=self.in_parts)
            return walk(range(len(blocks)), x, call)

    @property
    def strategy(self) -> Strategy:
        """The strategy of its way; setting it, none of its blocks has another."""
        return self.way.strategy

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        self.way = Way(strategy, in_parts=self.in_parts)

    @property
    def in_parts(self) -> bool:
        """Whether blocks that are computed again may be so in two parts."""
        return self.way.in_parts

    @in_parts.setter
    def in_parts(self, in_parts: bool) -> None:
        self.way = replace(self.way, in_parts=in_parts)

    @property
    def followed(self) -> tuple[Run, ...]:
        """The runs that follow (2)."""
        return (self.runs or ()) if self.gamma else ()

    def _list_pieces(self, blocks: list[nn.Module]) -> Iterator[range]:
        """Yield the blocks that are a segment together: so many as asked for, a run, or all."""
        if not self.way.length:
            yield range(len(blocks))
            return
        position = 0
        for part in (*self.followed, Run(len(blocks), len(blocks), ())):
            for units in _batched(split_units(blocks[position : part.start]), self.way.length):
                yield range(position, position := position + sum(map(len, units)))
            if len(part):
                yield range(part.start, position := part.stop)

    def _walk(self, this: "_Pass", piece: range, x: Tensor, call: Call) -> Tensor:
        """Go through the blocks of ``piece``; ``call`` calls those that are not stored.

        Backward may come here again, when the stage has another way or range already.
        """
        reversing = this.way.strategy == "momentum" and torch.is_grad_enabled()
        position = piece.start
        for part in self.followed:
            if part.start not in piece:
                continue
            x = this.walk_plain(range(position, part.start), x, call)
            calls = [
                evaluate if n >= this.border else None if reversing else call
                for n in range(part.start, part.stop)
            ]
            x = self._follow(this, part, calls, x)
            position = part.stop
        return this.walk_plain(range(position, piece.stop), x, call)

    def _follow(self, this: "_Pass", part: Run, calls: Sequence[Call | None], x: Tensor) -> Tensor:
        """Go through a run, whose range is known if this pass has been here before."""
        blocks, ranges = this.blocks[part.start : part.stop], this.ranges

        def follow(exponent: int) -> tuple[Tensor, Tensor]:
            rule = self.rule(replace(part, exponent=exponent), x.dtype)
            return run(blocks, x, this.args, rule, calls, in_parts=this.way.in_parts)

        known = ranges.get(part.start)
        exponent = this.proposed.get(part.start, part.exponent) if known is None else known
        if known is not None or not has_values(x):
            return follow(_UNKNOWN if exponent is None else exponent)[0]
        measure = partial(survey, blocks, x, this.args, self.rule(part, x.dtype))
        if exponent is None:
            exponent, is_seen = find_range(measure, x)
            if is_seen:
                self.set_range(part.start, exponent)
        y, largest = follow(exponent)
        seen, other = largest.tolist()
        fitting = find_fitting(measure, (seen, math.isfinite(other)), y, exponent)
        if fitting != exponent:
            this.proposed[part.start] = fitting
            if torch.is_grad_enabled():
                self.set_range(part.start, fitting)
            ask_to_repeat(seen, exponent)
        ranges[part.start] = exponent
        return y

    def set_range(self, start: int, exponent: int | None) -> None:
        """Let the run from block ``start`` on be exact below 2^exponent; None: to be found."""
        self.runs = tuple(
            replace(one, exponent=exponent) if one.start == start else one
            for one in self.runs or ()
        )

    def find_runs(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Run, ...]:
        """Return the runs, found by tracing shapes from x if they are not known yet.

        There is a warning where there are none; γ = 0 needs none.

        Raises:
            UsageError: What the blocks do depends on values: they need to be given ``runs``. Or
                nothing can be traced, as inside a transform of torch.func, or once FSDP2 has
                sharded the blocks.
        """
        if self.runs is None and self.gamma:
            is_transformed = torch._C._functorch.maybe_current_level() is not None
            if is_transformed or are_sharded([self]):
                inside = (
                    "torch.func.grad, vmap and the like" if is_transformed else "sharded blocks"
                )
                raise UsageError(
                    f"runs cannot be found inside {inside}",
                    kind="model.untraceable",
                    fix="call the network once before, or give it runs=[…]",
                )
            blocks, tensors = bind([*self._modules.values()], args, kwargs)
            found = find_runs(blocks, x, tensors)
            self.runs = tuple(Run(run.start, run.stop, (1.0,) * len(run)) for run in found)
        return self.runs or ()

    def integrate(self, x: Tensor, *args: Any, **kwargs: Any) -> EndState:
        """Return the state at the end, from which :meth:`invert` leads back; its x is the output.

        Nothing can be differentiated. The range is that of a pass without gradients, which is
        computed in floating point before.

        Raises:
            UsageError: The blocks are not one run, or a program or derivatives are made of what
                they do.
        """
        if is_graph_made():
            raise UsageError(
                "integrate needs values, and has none inside torch.func, forward-mode derivatives"
                " and what is traced",
                kind="usage.tracing",
                fix="stage.integrate(x) outside of it, or stage(x) inside",
            )
        runs = self.find_runs(x, *args, **kwargs)
        part, blocks, tensors = self._whole_run(runs, args, kwargs)
        exponent = part.exponent
        if x.numel():
            measure = cache(partial(survey, blocks, x, tensors, self.rule(part, x.dtype)))
            if exponent is None:
                exponent, is_seen = find_range(measure, x)
                self.set_range(part.start, exponent if is_seen else None)
            else:
                with one_pass(), torch.no_grad():
                    exponent = find_fitting(measure, measure(), x, exponent)
        exponent = _UNKNOWN if exponent is None else exponent
        return follow(blocks, x, tensors, self.rule(replace(part, exponent=exponent), x.dtype))

    def invert(self, end: EndState | tuple[Any, ...], *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return x[0] to x[k] of the pass that ended in this state: blocks' inputs, and the output.

        ``args`` and ``kwargs`` are what the blocks were called with besides x. Their buffers stay
        as they are, and so do random generators.

        Raises:
            UsageError: The blocks are not one run, its range is not known, or they do not take what
                has the type, the shape and the device of this state; or it is none.
            InversionError: No pass of these blocks ended there, or it was not finite.
        """
        end = read_state(end)
        own = chain(self.parameters(), self.buffers())
        types = (tensor.dtype for tensor in own if tensor.is_floating_point())
        dtype = end.dtype or next(types, torch.float32)
        runs = self.find_runs(end.x.to(dtype), *args, **kwargs)
        part, blocks, tensors = self._whole_run(runs, args, kwargs)
        exponent = part.exponent if end.exponent is None else end.exponent
        if exponent is None:
            raise UsageError(
                "this stage has not seen a pass, and does not know the range of the one to invert",
                kind="usage.no_run",
                fix="stage.runs = runs of the stage that the state is of",
            )
        rule = self.rule(replace(part, exponent=exponent), dtype)
        return walk_back(blocks, end, tensors, rule, dtype)

    def _whole_run(
        self, runs: tuple[Run, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Run, list[nn.Module], tuple[Tensor, ...]]:
        if not self.gamma or [(part.start, part.stop) for part in runs] != [(0, len(self))]:
            raise UsageError(
                "only a stage whose blocks are all of one run can be inverted as a whole",
                kind="usage.no_run",
                fix="MomentumSequential(*blocks) of the blocks of one run, with gamma > 0",
            )
        return runs[0], *bind([*self._modules.values()], args, kwargs)

    def _begins_plain(self, part: Run) -> bool:
        """Return whether x[1] is what the first block returns, as in the plain network."""
        return coefficients(self.gamma, part.gains, self.velocity)[0] == 1

    def rule(self, part: Run, dtype: torch.dtype) -> Rule:
        """Return the constants of a run of blocks that compute in ``dtype``.

        Raises:
            UsageError: That is complex, or the run's exponent none that its grids can have.
        """
        if dtype.is_complex:
            raise UsageError(
                f"a momentum run was called with {dtype}, and its grids are of real numbers",
                kind="model.complex",
                fix="torch.view_as_real(x), in blocks that take that",
            )
        steps = coefficients(self.gamma, part.gains, self.velocity)
        exponent = _UNKNOWN if part.exponent is None else part.exponent
        if exponent not in range(LOWEST, HIGHEST + 1):
            raise UsageError(
                f"a momentum run's exponent is {exponent!r}, not an integer from {LOWEST} to"
                f" {HIGHEST}",
                kind="usage.bad_value",
                fix="exponent=None, which looks for it",
            )
        return Rule.of(self.gamma, steps, exponent, torch.promote_types(dtype, torch.float32))

    def __getitem__(self, index: Any) -> Any:
        """A block or, for a slice, a plain ``nn.Sequential``: momentum belongs to whole runs."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self.named_children()][index]))
        return super().__getitem__(index)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickle or a copy has kept of a stage.

        Raises:
            ModelFileError: An older version's had other attributes.
        """
        own = MomentumSequential.__annotations__
        if lacking := [name for name in own if name not in state and not hasattr(type(self), name)]:
            raise ModelFileError(
                f"a momentum stage was pickled by an older momconv: it lacks {', '.join(lacking)}",
                kind="model_file.older_stage",
                fix="momconv.save(model, path) with that version, and momconv.load(path) with this",
            )
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        claim(self, self._members)

    def __setattr__(self, name: str, value: Any) -> None:
        """Put another block in the place of one, also in a run.

        Raises:
            UsageError: It is None.
        """
        if name in self.__dict__.get("_modules", ()):
            _require_block(name, value)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and "_runs" in vars(self):
            self.runs = self.runs

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Put a block at the end, or in the place of one.

        Raises:
            UsageError: It is None.
        """
        _require_block(name, module)
        super().add_module(name, module)
        if "_runs" in vars(self):
            self.runs = self.runs

    def __delattr__(self, name: str) -> None:
        """Take a block out; its run goes on without it, with the gains of those that are left."""
        place = [*self._modules].index(name) if name in self._modules else None
        super().__delattr__(name)
        if place is not None:
            runs = self.runs
            self.runs = runs and [_without(one, place) for one in runs if {*one.blocks} - {place}]

    def insert(self, index: int, module: nn.Module) -> Self:
        """Put a block in front of the one at ``index``.

        Raises:
            UsageError: That is in the midst of a run.
        """
        place = index + len(self) if index < 0 else index
        if any(part.start < place < part.stop for part in self.runs or ()):
            raise UsageError(
                f"block {place} is in the midst of a momentum run, where no other fits",
                kind="usage.bad_run",
                fix="MomentumSequential(*blocks), which finds its runs anew",
            )
        super().insert(index, module)
        if self.runs:
            moved = [
                p if p.stop <= place else replace(p, start=p.start + 1, stop=p.stop + 1)
                for p in self.runs
            ]
            self.runs = moved
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks for this.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "a momentum stage cannot be scripted: torch.jit.script reads its code, which is more"
            " than it knows of Python",
            kind="usage.tracing",
            fix="torch.jit.trace(model.eval(), images)",
        )

    def extra_repr(self) -> str:
        """Return γ, the strategy and the runs, for ``print(model)``."""
        spans = ", ".join(f"{run.start}-{run.stop - 1}" for run in self.runs or ())
        return f"gamma={self.gamma}, strategy={self.way}, momentum blocks: {spans or 'none'}"


def _require_block(name: str, block: object) -> None:
    """Do nothing unless this is None, which PyTorch's containers take and cannot call.

    Raises:
        UsageError: It is.
    """
    if block is None:
        raise UsageError(
            f"block {name} of a momentum stage would be None, which cannot be called",
            kind="usage.bad_value",
            fix="leave it out, or take torch.nn.Identity()",
        )


def _trace(stage: MomentumSequential, x: Any, args: Any, kwargs: Any) -> Any:
    """Put a call of the stage into the graph that is being made, or of its blocks without runs."""
    if stage.runs is not None and not stage.followed:
        for block in stage._modules.values():
            x = block(x, *args, **kwargs)
        return x
    tracer: Any = x.tracer
    if tracer.root is stage:
        raise UsageError(
            "this network is a momentum stage as a whole, of which torch.fx can make no graph",
            kind="usage.tracing",
            fix="trace torch.nn.Sequential(network)",
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(stage), (x, *args), kwargs)


@_disable_dynamo
def _uncompiled(stage: MomentumSequential, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return stage.forward(x, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass through a stage.

    Attributes:
        blocks: The stage's, bound to what is no tensor.
        args: What they are called with besides x.
        way: The stage's at the time.
        proposed: Exponents for runs whose own did not fit, by their first blocks.
        ranges: The exponents of its runs.
    """

    blocks: list[nn.Module]
    args: tuple[Tensor, ...]
    way: Way
    proposed: dict[int, int] = field(default_factory=dict)
    ranges: dict[int, int] = field(default_factory=dict)

    @property
    def border(self) -> int:
        """The first block that is stored for being one of the last."""
        return 0 if self.way.strategy == "store" else len(self.blocks) - self.way.stored

    def walk_plain(self, piece: range, x: Tensor, call: Call) -> Tensor:
        """Go through blocks outside the runs; ``call`` calls those that are not stored."""
        units = split_units(self.blocks[piece.start : piece.stop])
        ends = accumulate(map(len, units), initial=piece.start)
        before = sum(end <= self.border for end in [*ends][1:])
        for group, has_own_way in _group(units[:before], self.way):
            together = _join(group)
            x = (_call if has_own_way else call)(together, x, *self.args)
        for block in chain(*units[before:]):
            x = _call(block, x, *self.args)
        return x


def _call(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    return require_tensor(block, call_block(block, x, *args))


def _group(units: list[list[nn.Module]], way: Way) -> Iterator[tuple[list[nn.Module], bool]]:
    """Yield what shares a checkpoint; and, alone, a block that has a stage with its own way."""

    def has_own_way(unit: list[nn.Module]) -> bool:
        return way.strategy != "segment" and bool(momentum_stages(unit[0]))

    for is_own, members in groupby(units, has_own_way):
        length = way.length if way.strategy == "checkpoint" and not is_own else 1
        for group in _batched([*members], length or 1):
            yield [*chain(*group)], is_own


def join_layers(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Join each block with the layers that follow it: a ReLU may write into its output."""
    return map(_join, split_units(blocks))


def split_units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Return the blocks, each in a list with the single layers that follow it."""
    units: list[list[nn.Module]] = []
    for block in blocks:
        is_layer = next(block.children(), None) is None
        if units and is_layer and not momentum_stages(units[-1][0]):
            units[-1].append(block)
        else:
            units.append([block])
    return units


def _batched(units: list[list[nn.Module]], length: int) -> Iterator[list[list[nn.Module]]]:
    for start in range(0, len(units), length):
        yield units[start : start + length]


def _join(blocks: list[nn.Module]) -> nn.Module:
    return blocks[0] if len(blocks) == 1 else _Joined(*blocks)


class _Joined(nn.Sequential):
    """Blocks that are called in turn, each with the same further arguments."""

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        for block in self:
            x = _call(block, x, *args)
        return x


class MomentumList(MomentumSequential):
    """Takes the place of an ``nn.ModuleList`` in a network that calls its blocks in turn.

    Blocks that a loop calls wait for the last of them, which calls the stage: see loops.py.
    """

    @_disable_dynamo  # which would look into what is no module
    def __iter__(self) -> Iterator[Any]:
        return iter([Turn(self, n, block) for n, block in enumerate(self._modules.values())])


class MomentumDict(MomentumSequential):
    """Takes the place of a module dictionary whose ``forward`` calls its items in turn.

    That may hand out what some of them return, as torchvision's ``IntermediateLayerGetter`` does,
    but nothing from inside a run.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the dictionary would do."""
        return self.kind.forward(self, *args, **kwargs)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the runs, each under the name of its last block, and all other blocks."""
        for n, (name, block) in enumerate(self._modules.items()):
            member_of = [part for part in self.runs or () if part.start <= n < part.stop]
            for part in member_of:
                if n == part.stop - 1:
                    yield name, self._take(part)
            if not member_of:
                is_layer = next(block.children(), None) is None
                yield name, block if is_layer else self._take(Run(n, n + 1, ()))

    def _take(self, part: Run) -> MomentumSequential:
        """Return some blocks as a stage for themselves."""
        return _Taken(
            self,
            part.start,
            *[*self._modules.values()][part.start : part.stop],
            gamma=self.gamma,
            velocity=self.velocity,
            way=replace(self.way, stored=max(0, self.way.stored - (len(self) - part.stop))),
            runs=[replace(part, start=0, stop=len(part))] if part.gains else [],
        )


class _Taken(MomentumSequential):
    """Blocks of a dictionary, which are told the range that is found."""

    def __init__(
        self, owner: MomentumDict, start: int, *blocks: nn.Module, way: Way, **options: Any
    ) -> None:
        super().__init__(*blocks, **options)
        self.way = way
        self._tell = partial(owner.set_range, start)

    def set_range(self, start: int, exponent: int | None) -> None:
        """Set the range of the run, and of the dictionary's run that it stands for."""
        super().set_range(start, exponent)
        self._tell(exponent)


def momentum_stages(model: nn.Module) -> dict[str, MomentumSequential]:
    """Return the MomentumSequentials of a model by name, in the order of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MomentumSequential)
    }


_NOT_FOUND = LOWEST - 1


def read_ranges(model: nn.Module) -> list[int]:
    """Return the exponents of all runs of ``model``, as numbers for :func:`set_ranges`."""
    stages = momentum_stages(model).values()
    exponents = [part.exponent for stage in stages for part in stage.runs or ()]
    return [_NOT_FOUND if exponent is None else exponent for exponent in exponents]


def set_ranges(model: nn.Module, exponents: Iterable[int]) -> None:
    """Give all runs of ``model`` these exponents."""
    remaining = iter(exponents)
    for stage in momentum_stages(model).values():
        for part in stage.runs or ():
            exponent = next(remaining)
            stage.set_range(part.start, None if exponent == _NOT_FOUND else exponent)


def forget_ranges(model: nn.Module) -> None:
    """Let the next pass find the ranges of all runs of ``model``."""
    set_ranges(model, repeat(_NOT_FOUND))


def set_strategy(model: nn.Module, strategy: Strategies) -> None:
    """Choose how backward gets its activations in every MomentumSequential of ``model``.

    Values and gradients stay the same, bit for bit; memory and time change. A forward pass that
    waits for its backward pass is not to be given another strategy. "auto" is momentum
    where a stage has runs and checkpoints elsewhere. Activations are largest in the first stage:
    there it computes blocks in parts and, if the stage has no runs, keeps its input alone.

    Args:
        model: A network with momentum stages.
        strategy: One for all stages; or by the names of stages, as in ``plan.strategy``, a text
            for each: a strategy, or one that divides the stage: "momentum+store:5" (the last five
            blocks are stored), "checkpoint:3" and "segment:6" (so many blocks have one checkpoint,
            or are a segment; in a momentum run a block has its own, and the run is a segment), and
            "+parts" after any (blocks are computed again in two parts). Other stages stay.

    Raises:
        UsageError: an unknown strategy or stage; a model without momentum stages; "momentum" for
            γ = 0.
    """
    stages = momentum_stages(model)
    if not stages:
        raise UsageError(
            f"this {type(model).__name__} has no momentum stages",
            kind="usage.not_converted",
            fix="model = momconv.convert(model)",
        )
    ways = find_ways(stages, strategy)
    reversed_ = [stages[name] for name, way in ways.items() if way.strategy == "momentum"]
    if reversed_ and strategy != "auto" and all(stage.gamma == 0 for stage in reversed_):
        raise UsageError(
            "gamma is 0, the plain network, which cannot be inverted",
            kind="usage.gamma",
            fix='momconv.set_strategy(model, "checkpoint")',
        )
    for name, way in ways.items():
        stages[name].way = way


def find_ways(stages: dict[str, MomentumSequential], strategy: Strategies) -> dict[str, Way]:
    """Return the way that ``strategy`` gives to each stage that it names.

    Raises:
        UsageError: A name is unknown.
    """
    if not isinstance(strategy, str):
        for name in strategy:
            _check_choice("stage", name, [*stages])
        return {name: Way.parse(text) for name, text in strategy.items()}
    _check_choice("strategy", strategy, [*get_args(Strategy), "auto"])
    innermost = [name for name, stage in stages.items() if len(momentum_stages(stage)) == 1]
    if strategy == "auto":
        return {
            name: _leanest(stage, is_first=name == innermost[0]) for name, stage in stages.items()
        }
    outer: Strategy = "checkpoint" if strategy == "segment" else strategy
    return {name: Way(strategy if name in innermost else outer) for name in stages}


def _leanest(stage: MomentumSequential, *, is_first: bool) -> Way:
    """Return the way of ``stage`` under "auto"."""
    has_runs = bool(stage.gamma) and stage.runs != ()
    strategy: Strategy = "momentum" if has_runs else "segment" if is_first else "checkpoint"
    return Way(strategy, in_parts=is_first)
