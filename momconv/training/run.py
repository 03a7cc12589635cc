"""A run: what was asked for, how far it is, and what it works with."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from momconv.data.dataset import count_workers, count_workers_that_fit
from momconv.data.source import Sources, Splits
from momconv.errors import ResourceError
from momconv.planner.micro_batch import StaticBytes, count_steps
from momconv.planner.plan import Change, Fixed, Plan, Request
from momconv.recipe import Recipe
from momconv.training.batches import are_bytes, weigh_classes
from momconv.training.gradients import Buckets
from momconv.training.optimisation import (
    Average,
    choose_precision,
    make_optimizer,
    make_scaler,
    rate_at,
    read_scaler,
    restore_scaler,
)
from momconv.training.processes import ALONE, Processes
from momconv.training.progress import Listener, Progress
from momconv.training.run_folder import RunFolder
from momconv.training.sharding import divide_like, is_sharded, list_numbers, own_parts, shard
from momconv.units import format_bytes
from momconv.zoo.description import describe


@dataclass(slots=True, kw_only=True)
class Assignment:
    """What a process is asked to train, before there are images, network and plan."""

    recipe: Recipe  # with what was found or had to be changed
    folder: RunFolder
    device: torch.device
    listener: Listener
    processes: Processes = ALONE
    sources: Sources | None = None  # of the images, where the recipe names no folder of them

    def request_plan(
        self,
        model: nn.Module,
        splits: Splits,
        fixed: tuple[Fixed, ...],
        may_change: tuple[Change, ...] = (),
    ) -> Request:
        """Return what is asked of the plan for these images."""
        recipe, train, processes = self.recipe, self.recipe.train, self.processes
        return Request(
            describe(model).preprocessing.resolution,
            choose_precision(train, self.device),
            train.optimizer,
            ema=train.ema > 0,
            device=str(self.device),
            images=len(splits.train.samples),
            held_out=len(splits.val.samples),
            epochs=train.epochs,
            batch_size=train.batch_size,
            micro_batch=train.micro_batch,
            strategy=recipe.momentum.strategy,
            memory=train.memory,
            headroom=train.headroom,
            release_gradients=train.release_gradients is True,
            processes=processes.count,
            shards=processes.count if train.shard is True else 1,
            as_bytes=are_bytes(recipe),
            sharers=processes.on_this_machine if self.device.type == "cpu" else 1,
            may_change=may_change,
            fixed=fixed,
        )


@dataclass(slots=True, kw_only=True)
class TrainingRun(Assignment):
    """A run, as all that happens in it sees and changes it; ``make_run`` makes it."""

    # What it works with.
    splits: Splits
    model: nn.Module
    plan: Plan  # changes when memory runs out
    workers: int  # processes that read images
    optimizer: Optimizer = field(init=False)
    average: Average | None = field(init=False)
    scaler: GradScaler = field(init=False)
    class_weights: Tensor | None = field(init=False)  # of the loss
    buckets: Buckets = field(init=False)  # of the gradients, if other processes have some too

    # How far it is.
    progress: Progress = field(default_factory=Progress)
    has_begun: bool = False  # whether its folder has a state
    is_whole: bool = True  # whether weights and counters are of the same moment, so can be saved
    head_only: bool = False  # whether the rest waits, in this epoch, for train.freeze_epochs
    evaluation_batch: int = 32  # images, at most
    documents: dict[str, bytes] = field(default_factory=dict)  # what the run began with, by file
    redone: tuple[int, int] | None = None  # epoch and step that were not reproducible at first
    measured_sizes: set[int] = field(default_factory=set)  # of the epoch's micro-batches, on a CPU
    ends: float = math.inf  # by time.monotonic
    saved_parts: int = 0  # the number of the last state of which all processes wrote their tensors

    def __post_init__(self) -> None:
        self.buckets = Buckets(self.processes)
        self.equip()

    def equip(self) -> None:
        """Make optimiser, average and scaler anew, for the network as it is now."""
        self.optimizer = make_optimizer(self.model, self.recipe.train)
        decay = self.recipe.train.ema
        self.average = Average(self.model, decay) if decay else None
        self.scaler = make_scaler(self.plan.precision, self.device)
        self.class_weights = None
        if self.recipe.data.balance == "loss":
            weights = weigh_classes(list(self.splits.train.counts().values()))
            self.class_weights = torch.tensor(weights, device=self.device)

    def shard(self) -> None:
        """Divide weights and what belongs to them among the processes."""
        parameters, state = dict(self.model.named_parameters()), self.optimizer.state
        before = {name: dict(state.get(p, {})) for name, p in parameters.items()}
        self.saved_parts = max(list_numbers(self.folder.parts), default=0)
        self.processes.wait()  # or one would see what another has written
        for network in self.networks:
            shard(network, self.device, self.processes.count)
        self.optimizer = make_optimizer(self.model, self.recipe.train)
        for name, parameter in self.model.named_parameters():
            values = {key: divide_like(value, parameter) for key, value in before[name].items()}
            self.optimizer.state[parameter].update(values)

    def read_extras(self) -> dict[str, Tensor]:
        """Return what is part of the state besides network and optimiser."""
        average = self.average.tensors() if self.average else {}
        parts = {"ema/": average, "scaler/": read_scaler(self.scaler)}
        return {prefix + key: value for prefix, own in parts.items() for key, value in own.items()}

    def restore_extras(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``read_extras`` returned."""
        parts: dict[str, dict[str, Tensor]] = {"ema": {}, "scaler": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        if self.average:
            self.average.restore(parts["ema"])
        restore_scaler(self.scaler, parts["scaler"])

    def renew_scaler(self) -> None:
        """Replace the scaler after a step that came to nothing, by one of the same factor.

        It would refuse to unscale the next ones, or to end a step of which it has seen none.
        """
        remembered = read_scaler(self.scaler)
        self.scaler = make_scaler(self.plan.precision, self.device)
        restore_scaler(self.scaler, remembered)

    def count_static(self) -> StaticBytes:
        """Return the bytes of weights, gradients, state and average that are there now."""
        parameters, values = [*self.model.parameters()], [*self.optimizer.state.values()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [value for own in values for value in own.values() if isinstance(value, Tensor)]
        average = [*self.average.tensors().values()] if self.average else []
        weights = [*parameters, *self.model.buffers()]
        return StaticBytes(*map(_count, (weights, gradients, state, average)))

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among the processes."""
        return is_sharded(self.model)

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and its average if there is one; the last of them is the result."""
        return [self.model, *([self.average.model] if self.average else [])]

    @property
    def steps_per_epoch(self) -> int:
        """The optimisation steps of an epoch."""
        return count_steps(len(self.splits.train.samples), self.recipe.train.batch_size)

    def rate_at(self, epoch: int, step: int) -> float:
        """Return the learning rate of a step."""
        done = epoch * self.steps_per_epoch + step
        return rate_at(self.recipe.train, done, self.steps_per_epoch)


def make_run(
    assignment: Assignment,
    splits: Splits,
    model: nn.Module,
    plan: Plan,
    progress: Progress | None = None,
) -> TrainingRun:
    """Return the run of an ``assignment``, at its beginning unless there is ``progress``.

    Raises:
        ResourceError: Shared memory has no room for the processes that the recipe asks for.
    """
    return TrainingRun(
        recipe=assignment.recipe,
        folder=assignment.folder,
        device=assignment.device,
        listener=assignment.listener,
        processes=assignment.processes,
        sources=assignment.sources,
        splits=splits,
        model=model,
        plan=plan,
        workers=_choose_workers(assignment, len(splits.train.samples), plan),
        progress=progress or Progress(),
    )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in own_parts(tensors))


def _choose_workers(assignment: Assignment, images: int, plan: Plan) -> int:
    """Return how many processes read images; not more than shared memory has room for.

    Raises:
        ResourceError: It has no room for those that the recipe asks for.
    """
    wanted, processes = assignment.recipe.data.workers, assignment.processes
    most = (
        count_workers(images // processes.count, assignment.device) // processes.on_this_machine
        if wanted == "auto"
        else wanted
    )
    value_bytes = 1 if plan.request.as_bytes else 4
    batch_bytes = plan.sizes[0] * 3 * value_bytes * plan.request.resolution**2
    fitting = count_workers_that_fit(most, batch_bytes * processes.on_this_machine)
    if fitting < most and wanted != "auto":
        raise ResourceError(
            f"{most} processes that read micro-batches of {format_bytes(batch_bytes)} need more"
            " shared memory than there is",
            kind="memory.shared",
            fix=f"--workers {fitting}\ndocker run --shm-size=8g …",
        )
    return fitting
