"""The peak memory of a training step, predicted without running it.

The step runs on fake tensors, which have shapes, types and lifetimes but no memory: forward pass,
loss and backward pass with all recomputation and inversion, so that every tensor is made and freed
in the order of the real step. The storages alive at each operation, plus what its kernel needs for
itself (scratch.py), are the live memory, and its maximum is the peak.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from momconv import eightbit
from momconv.eightbit import AdamW8bit, SGD8bit
from momconv.errors import UsageError
from momconv.momentum.sequential import set_strategy
from momconv.pixels import taking_bytes
from momconv.planner.allowance import find_allowance
from momconv.planner.cost import Work, count_work
from momconv.planner.devices import parse_device
from momconv.planner.fakes import Imitator
from momconv.planner.gathering import Gathering
from momconv.planner.gpu_rules import as_on_gpu
from momconv.planner.measurement import run_step, static_bytes
from momconv.planner.micro_batch import StaticBytes
from momconv.planner.scratch import peak_within
from momconv.planner.stages import Spot, Spots, assign_modules, marking
from momconv.tracing.runs import DEPENDS_ON_VALUES
from momconv.vocabulary import OPTIMIZERS, OptimizerName, Precision, Strategies

_CUDA_BLOCK = 512  # bytes to which PyTorch's CUDA allocator rounds up

_ANY_SCALE = 1.0, 1.0, 1.0
_GATHERING = "gathering"
_ACCUMULATION = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Tensors alive at the peak that one kind of operation allocated in one stage."""

    operation: str
    stage: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """The peak of a training step and what it consists of, in bytes.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of the trainable parameters, which exist throughout unless they are released.
        optimizer: The optimiser's state.
        ema: The averaged copy of the weights, 0 without one.
        batch: The input images and labels.
        activations: By stage, what the forward pass allocated.
        side_information: The integer remainders of the momentum rule.
        transients: What the backward pass allocated: recomputed activations and gradients of
            activations; and the operation's own scratch memory.
        allowance: On a GPU, for context, libraries and fragmentation; 0 on a CPU.
        stage: Whose forward or backward pass runs at the peak.
        operation: The operation that runs at the peak.
        alive: The tensors of ``activations``, ``side_information`` and ``transients``, the largest
            kinds first.
        gathered: Weights, and gradients, that are together where they are divided among processes.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    batch: int
    activations: dict[str, int]
    side_information: int
    transients: int
    allowance: int
    stage: str
    operation: str
    alive: tuple[Alive, ...]
    gathered: int = 0

    @property
    def static(self) -> int:
        """What training holds whatever the batch is."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def step(self) -> int:
        """What a step allocates, as ``momconv.planner.measurement.measure_step`` counts it."""
        activations = sum(self.activations.values())
        return activations + self.side_information + self.gathered + self.transients

    @property
    def total(self) -> int:
        """The peak, everything included."""
        return self.static + self.batch + self.step + self.allowance


@dataclass(frozen=True, slots=True)
class Training:
    """What the memory of a step depends on besides the network, its strategy and its images."""

    resolution: int  # pixels
    precision: Precision = "fp32"
    optimizer: OptimizerName = "sgd"
    _: KW_ONLY
    ema: bool = False
    device: str = "cpu"  # or "cuda"
    release_gradients: bool = False  # each is used and freed in the backward pass
    shards: int = 1  # processes among which weights, gradients and state are divided
    as_bytes: bool = False  # images, until the network takes them

    def static_bytes(
        self, model: nn.Module, unused: AbstractSet[Tensor] = frozenset()
    ) -> StaticBytes:
        """Return what training ``model`` holds whatever the batch is, but for what is unused."""
        return static_bytes(
            model,
            self.optimizer,
            ema=self.ema,
            release_gradients=self.release_gradients,
            shards=self.shards,
            unused=unused,
        )

    def step_bytes(self, parameter: Tensor) -> int:
        """Return what changing ``parameter`` takes for itself in the backward pass."""
        row = OPTIMIZERS[self.optimizer]
        if not self.release_gradients or row.bits != 8:  # fused kernels take nothing
            return 0
        kind: type[AdamW8bit | SGD8bit] = getattr(eightbit, row.class_name)
        return kind.step_bytes(parameter, parse_device(self.device).type)


class Course(NamedTuple):
    """What one part of a step takes, in bytes beside what earlier parts retain for backward.

    Attributes:
        retained: What is alive of it when backward begins.
        entry: What is alive, held by callers for a while, when its forward pass begins.
        forward: The most that is alive in its forward pass.
        backward: And in its backward pass.
        output: What its block returned.
        forward_work: What the operations of its forward pass amount to.
        work: And of both passes.
    """

    retained: int
    entry: int
    forward: int
    backward: int
    output: int
    forward_work: Work
    work: Work


class StepPrediction(NamedTuple):
    """The peak, and the course of the step.

    Attributes:
        peak: The peak.
        moments: All that is alive at each operation, in bytes.
        places: Where each operation runs: in the forward pass or not, and the stage.
        work: What all operations amount to.
        courses: Of the blocks of momentum stages, and of what is between stages, in the order of
            the forward pass.
    """

    peak: PeakMemory
    moments: list[int]
    places: list[tuple[bool, str]]
    work: Work
    courses: dict[Spot, Course]


def peak_memory(  # noqa: PLR0913 (each is a fact about the training)
    model: nn.Module,
    batch: int,
    resolution: int,
    precision: Precision = "fp32",
    optimizer: OptimizerName = "sgd",
    *,
    strategy: Strategies | None = None,
    ema: bool = False,
    device: str = "cpu",
    release_gradients: bool = False,
    processes: int = 1,
) -> PeakMemory:
    """Predict the peak memory of a training step of ``model``, in its current mode.

    Neither memory for the step nor a pass through the network is needed: only shapes are computed,
    but for a CPU each kind of convolution runs once on a few images (convolution.py). ``model`` may
    be on any device, ``torch.device("meta")`` included, and stays as it is.

    For a CPU, benchmarks/prediction.py compares with measured peaks. What kernels need for
    themselves depends on its instructions and threads, and is predicted for the CPU that predicts.
    For a GPU there is an allowance for its context, the workspaces of libraries and the allocator's
    fragmentation, see allowance.py. On a machine without a GPU the step is traced on a CPU, in the
    types that a GPU computes in.

    Args:
        model: A network for RGB images, converted or not.
        batch: Images that go through the network at once.
        resolution: Pixels of their sides.
        precision: "bf16" and "fp16" are autocast.
        optimizer: Whose state counts.
        strategy: As for ``momconv.set_strategy``; None keeps the model's.
        ema: Whether an averaged copy of the weights is kept.
        device: "cpu" or "cuda".
        release_gradients: Whether each is used and freed in the backward pass, as by
            ``momconv.release_gradients``.
        processes: Among which weights, gradients and the optimiser's state are divided
            (``train.shard``); the peak is that of the first.

    Raises:
        UsageError: The strategy or the device is unknown, or what the model computes depends on
            values, which fake tensors do not have.
    """
    training = Training(
        resolution,
        precision,
        optimizer,
        ema=ema,
        device=device,
        release_gradients=release_gradients,
        shards=processes,
    )
    return Predictor(model, training).predict(batch, strategy).peak


class Predictor:
    """Predicts steps of a network.

    Attributes:
        model: A copy of it, on fake tensors. What is changed in it, such as what is frozen, counts
            from then on.
        training: What a step is.
    """

    def __init__(self, model: nn.Module, training: Training) -> None:
        """``model`` may be on any device and stays as it is."""
        self.training, self._name = training, type(model).__name__
        self._kind = parse_device(training.device).type
        is_traced_on_cpu = self._kind == "cpu" or not torch.cuda.is_available()
        self._device = torch.device("cpu" if is_traced_on_cpu else self._kind)
        self._imitator = Imitator(partial(_examine, with_scratch=self._kind == "cpu"))
        self.model = self._imitator.copy(model, self._device, is_contiguous=training.shards > 1)

    def predict(
        self, batch: int, strategy: Strategies | None = None, **changes: Any
    ) -> StepPrediction:
        """Return the prediction for ``batch`` images, under ``changes`` of what a step is.

        Raises:
            UsageError: What the model computes depends on values, or the strategy is unknown.
        """
        training = replace(self.training, **changes)
        if strategy is not None:
            set_strategy(self.model, strategy)
        trace = _Trace(self._imitator, 1 if self._kind == "cpu" else _CUDA_BLOCK)
        side = training.resolution
        with _explaining(self._name), self._imitator.mode, self._rules():
            kind = torch.uint8 if training.as_bytes else torch.float
            images = torch.empty(batch, 3, side, side, dtype=kind, device=self._device)
            labels = torch.empty(batch, dtype=torch.long, device=self._device)
            using = self._using_gradients(trace, training)
            with self._taking(kind), using as unused, self._divided(trace, training.shards):
                trace.run(self.model, images, labels, training.precision)
        static = training.static_bytes(self.model, unused)
        peak = trace.report(
            weights=static.weights,
            gradients=static.gradients,
            optimizer=static.optimizer,
            ema=static.ema,
            batch=images.nbytes + labels.nbytes,
            allowance=0,
        )
        if self._kind == "cuda":
            allowance = find_allowance(torch.device(training.device)).total(peak.total)
            peak = replace(peak, allowance=allowance)
        rest = peak.total - peak.step
        moments = [rest + alive for alive in trace.moments]
        work = sum((work for *_, work in trace.operations), Work())
        return StepPrediction(peak, moments, trace.places, work, trace.list_courses())

    @contextmanager
    def _using_gradients(self, trace: "_Trace", training: Training) -> Iterator[set[Tensor]]:
        """Inside, a gradient goes as soon as it is complete; the set is of those that get none.

        The real step adds it to the one that exists, or changes the parameter by it.
        """
        unused: set[Tensor] = {p for p in self.model.parameters() if p.requires_grad}

        def use(parameter: Tensor) -> None:
            unused.discard(parameter)
            trace.need("step", training.step_bytes(parameter))
            parameter.grad = None

        with ExitStack() as hooks:
            for parameter in [*unused]:
                hooks.callback(parameter.register_post_accumulate_grad_hook(use).remove)
            yield unused

    def _divided(self, trace: "_Trace", shards: int) -> AbstractContextManager[None]:
        if shards == 1:
            return nullcontext()
        copies = self._kind == "cpu"
        return Gathering(trace.hold, trace.keep, shards, copies=copies).watching(self.model)

    def _taking(self, kind: torch.dtype) -> AbstractContextManager[None]:
        if kind != torch.uint8:
            return nullcontext()
        return taking_bytes(self.model, _ANY_SCALE, _ANY_SCALE, self._device)

    def _rules(self) -> AbstractContextManager[object]:
        """Return a context with the rules of a GPU, if one is asked about and is not there."""
        return as_on_gpu() if self._kind != self._device.type else nullcontext()


class _Finding(NamedTuple):
    """What there is to know of an operation."""

    name: str
    scratch: int  # the most bytes that it adds to the live memory
    work: Work


def _examine(
    func: OpOverload, args: Any, results: Sequence[Tensor], *, with_scratch: bool
) -> _Finding:
    """Return what there is to know of an operation; ``with_scratch``, its own memory too."""
    scratch = peak_within(func, args, results) if with_scratch else 0
    return _Finding(func.name().partition("::")[2], scratch, count_work(func, args, results))


class _Tensor(NamedTuple):
    """A storage, by what made it."""

    bytes: int
    operation: str
    stage: str
    spot: Spot
    in_forward: bool
    is_remainder: bool


class _Operation(NamedTuple):
    """When an operation runs, and its work."""

    in_forward: bool
    spot: Spot
    work: Work


class _Peak(NamedTuple):
    """A moment: so many changes of the live memory happened before, and an operation runs."""

    bytes: int
    changes: int
    scratch: int
    operation: str
    stage: str


class _Trace(TorchDispatchMode):
    """Follows the storages of a step on fake tensors from their first operation to their end."""

    def __init__(self, imitator: Imitator[_Finding], block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._imitator = imitator
        self._block = block  # bytes to which the allocator rounds up
        self._known: dict[int, weakref.ref[Any]] = {}  # storages by their address
        self._changes: list[tuple[int, _Tensor | None]] = []  # None: the end of a storage
        self._live = 0
        self._peak = _Peak(0, 0, 0, "", "")
        self.moments: list[int] = []  # the live memory at each operation
        self.places: list[tuple[bool, str]] = []  # its pass and stage
        self.operations: list[_Operation] = []
        self._stage = ""
        self._spots = Spots()
        self._entries: dict[Spot, int] = {}  # the live memory when each is reached
        self._in_forward = True
        self._changes_before_loss = 0

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, precision: Precision) -> None:
        """Trace the step; what exists before it does not count."""
        for tensor in (*model.parameters(), *model.buffers(), images, labels):
            self._follow(tensor, None)
        stages = assign_modules(model)
        self._stage = next(iter(stages.values()))
        following = _watching_random_states(lambda state: self._follow(state, "get_rng_state"))
        marks = marking(stages, self._enter), self._spots.watching(model)
        with torch.random.fork_rng(devices=[]), marks[0], marks[1], following, self:
            run_step(model, images, labels, precision, self._enter_loss)

    def report(self, **parts: int) -> PeakMemory:
        """Return what was alive at the peak, beside ``parts`` that the step does not allocate."""
        alive = self._find_alive(self._peak.changes)
        activations: Counter[str] = Counter()
        gathered = sum(tensor.bytes for tensor in alive if tensor.operation == _GATHERING)
        for tensor in alive:
            is_activation = not tensor.is_remainder and tensor.operation != _GATHERING
            if tensor.in_forward and is_activation:
                activations[tensor.stage] += tensor.bytes
        remainders = sum(tensor.bytes for tensor in alive if tensor.is_remainder)
        return PeakMemory(
            **parts,
            activations=dict(activations),
            side_information=remainders,
            gathered=gathered,
            transients=self._peak.bytes - activations.total() - remainders - gathered,
            stage=self._peak.stage,
            operation=self._peak.operation,
            alive=_summarise(alive),
        )

    def hold(self, size: int) -> Callable[[], None]:
        """Take memory for weights that come together, and return what gives it back."""
        release = self.keep(size)
        self._note(_GATHERING, 0, Work())
        return release

    def need(self, operation: str, size: int) -> None:
        """Take memory for as long as an ``operation`` runs that is not traced."""
        if size:
            self._note(operation, size, Work())

    def keep(self, size: int) -> Callable[[], None]:
        """Take memory that counts from the next operation on, and return what gives it back."""
        address = -len(self._changes) - 1  # nothing's own
        spot = self._spots.note()
        made = _Tensor(size, _GATHERING, self._stage, spot, self._in_forward, False)
        self._live += size
        self._changes.append((address, made))

        def release() -> None:
            self._live -= size
            self._changes.append((address, None))

        return release

    def _find_alive(self, changes: int) -> list[_Tensor]:
        """Return the storages that are alive after so many changes."""
        alive: dict[int, _Tensor] = {}
        for address, tensor in self._changes[:changes]:
            if tensor is None:
                alive.pop(address, None)
            elif tensor.bytes:
                alive[address] = tensor
        return [*alive.values()]

    def list_courses(self) -> dict[Spot, Course]:
        """Return the course of each part."""
        retained: Counter[Spot] = Counter()
        for tensor in self._find_alive(self._changes_before_loss):
            retained[tensor.spot] += tensor.bytes
        highest: Counter[tuple[bool, Spot]] = Counter()
        works: dict[tuple[bool, Spot], Work] = {}
        for (in_forward, spot, work), alive in zip(self.operations, self.moments, strict=True):
            pass_ = in_forward, spot
            highest[pass_] = max(highest[pass_], alive)
            works[pass_] = works.get(pass_, Work()) + work
        spots = [*dict.fromkeys(spot for _, spot, _ in self.operations)]
        courses, before = {}, 0
        for spot in spots:
            passes = (True, spot), (False, spot)
            forward, backward = (max(0, highest[pass_] - before) for pass_ in passes)
            forward_work, backward_work = (works.get(pass_, Work()) for pass_ in passes)
            output = self._spots.outputs.get(spot, 0)
            courses[spot] = Course(
                retained[spot],
                max(0, self._entries.get(spot, before) - before),
                forward,
                backward,
                output,
                forward_work,
                forward_work + backward_work,
            )
            before += retained[spot]
        return courses

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten.equal.default:  # of random states, which are no fakes
            with _disable_current_modes():
                return func(*args)
        if _draws(func, args, kwargs or {}):
            with _disable_current_modes():
                torch.rand(())  # as the operation itself would, on tensors with values
        before = self._live
        out, results, (operation, within, work) = self._imitator.run(func, args, kwargs or {})
        is_accumulating = _is_accumulating()
        for tensor in results:
            self._follow(tensor, None if is_accumulating else operation)
        if self._in_forward:
            self._entries.setdefault(self._spots.note(), before)
        self._note(operation, max(0, before + within - self._live), work)
        return out

    def _note(self, operation: str, scratch: int, work: Work) -> None:
        """Remember what is alive as an operation runs, which needs ``scratch`` for itself."""
        self.operations.append(_Operation(self._in_forward, self._spots.note(), work))
        now = self._live + scratch
        self.moments.append(now)
        self.places.append((self._in_forward, self._stage))
        if now > self._peak.bytes:
            self._peak = _Peak(now, len(self._changes), scratch, operation, self._stage)

    def _follow(self, tensor: Tensor, operation: str | None) -> None:
        """Count the storage of ``tensor`` until it ends: as 0 where no ``operation`` made it."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size = 0 if operation is None else -storage.nbytes() // self._block * -self._block
        is_remainder = tensor.dtype in (torch.int8, torch.int16)  # the state's v is an int32
        spot = self._spots.note()
        made = _Tensor(size, operation or "", self._stage, spot, self._in_forward, is_remainder)
        self._live += size
        self._changes.append((address, made))
        self._known[address] = weakref.ref(storage, lambda _: self._end(address, size))

    def _end(self, address: int, size: int) -> None:
        del self._known[address]
        self._live -= size
        self._changes.append((address, None))

    def _enter(self, stage: str) -> None:
        self._stage = stage

    def _enter_loss(self) -> None:
        self._in_forward = False
        self._changes_before_loss = len(self._changes)


def _summarise(tensors: Any) -> tuple[Alive, ...]:
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        sizes[tensor.operation, tensor.stage] += tensor.bytes
        counts[tensor.operation, tensor.stage] += 1
    return tuple(
        Alive(operation=operation, stage=stage, count=counts[operation, stage], bytes=size)
        for (operation, stage), size in sizes.most_common()
    )


def _is_accumulating() -> bool:
    """Return whether autograd is adding a gradient, which on fakes alone it may copy."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == _ACCUMULATION


@contextmanager
def _watching_random_states(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, ``tell`` hears of each state of the generator that is asked for.

    A block that is run again keeps one, and so does each of torch's checkpoints. They are no fakes,
    and no operation makes them.
    """
    ask = torch.get_rng_state

    def ask_and_tell() -> Tensor:
        state = ask()
        tell(state)
        return state

    torch.get_rng_state = ask_and_tell
    try:
        yield
    finally:
        torch.get_rng_state = ask


def _draws(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Return whether ``func`` draws random numbers; attention does not where it drops nothing."""
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return bool(args[3] if len(args) > 3 else kwargs.get("dropout_p", 0))
    return torch.Tag.nondeterministic_seeded in func.tags


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    try:
        yield
    except DEPENDS_ON_VALUES as error:
        raise UsageError(
            f"the memory of this {name} depends on values: {error}",
            kind="model.depends_on_values",
            fix="measure it with momconv.planner.measurement.measure_step",
        ) from error
