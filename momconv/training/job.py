"""What a run works with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from momconv.data.folder import Splits
from momconv.planner.micro_batch import count_steps
from momconv.recipe import Recipe
from momconv.training.batches import weigh_classes
from momconv.training.optimisation import Average, make_scaler, rate_at, read_scaler, restore_scaler
from momconv.training.planning import BatchPlan
from momconv.training.processes import ALONE, Processes
from momconv.training.progress import Listener
from momconv.training.run_folder import RunFolder


@dataclass(slots=True, kw_only=True)
class Job:
    """What a run works with. Its plan changes when memory runs out."""

    recipe: Recipe
    folder: RunFolder
    splits: Splits
    model: nn.Module
    optimizer: Optimizer
    plan: BatchPlan
    device: torch.device
    workers: int
    listener: Listener
    processes: Processes = ALONE
    ends: float = math.inf  # by time.monotonic
    evaluation_batch: int = 32  # images, at most
    is_whole: bool = True  # whether weights and counters are of the same moment, so can be saved
    head_only: bool = False  # whether the rest waits, in this epoch, for train.freeze_epochs
    documents: dict[str, bytes] = field(default_factory=dict)  # what the run began with, by file
    redone: tuple[int, int] | None = None  # epoch and step that were not reproducible at first
    measured_sizes: set[int] = field(default_factory=set)  # of the epoch's micro-batches, on a CPU
    average: Average | None = field(init=False)
    scaler: GradScaler = field(init=False)
    class_weights: Tensor | None = field(init=False)  # of the loss

    def __post_init__(self) -> None:
        decay = self.recipe.train.ema
        self.average = Average(self.model, decay) if decay else None
        self.scaler = make_scaler(self.plan.setting.precision, self.device)
        self.class_weights = None
        if self.recipe.data.balance == "loss":
            weights = weigh_classes(list(self.splits.train.counts().values()))
            self.class_weights = torch.tensor(weights, device=self.device)

    def read_extras(self) -> dict[str, Tensor]:
        """What is part of the state besides network and optimiser."""
        average = self.average.tensors() if self.average else {}
        parts = {"ema/": average, "scaler/": read_scaler(self.scaler)}
        return {prefix + key: value for prefix, own in parts.items() for key, value in own.items()}

    def restore_extras(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``read_extras``."""
        parts: dict[str, dict[str, Tensor]] = {"ema": {}, "scaler": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        if self.average:
            self.average.restore(parts["ema"])
        restore_scaler(self.scaler, parts["scaler"])

    def renew_scaler(self) -> None:
        """Let the scaler forget the gradients of a step that came to nothing, but not its factor.

        It would refuse to unscale the next ones, or to end a step of which it has seen none.
        """
        remembered = read_scaler(self.scaler)
        self.scaler = make_scaler(self.plan.setting.precision, self.device)
        restore_scaler(self.scaler, remembered)

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and its average if there is one; the last of them is the result."""
        return [self.model, *([self.average.model] if self.average else [])]

    @property
    def steps_per_epoch(self) -> int:
        """The optimisation steps of an epoch."""
        return count_steps(len(self.splits.train.samples), self.recipe.train.batch_size)

    def rate_at(self, epoch: int, step: int) -> float:
        """The learning rate of a step."""
        done = epoch * self.steps_per_epoch + step
        return rate_at(self.recipe.train, done, self.steps_per_epoch)
