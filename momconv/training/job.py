"""What a run works with."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from momconv.data.folder import Splits
from momconv.planner.micro_batch import count_steps
from momconv.recipe import Recipe
from momconv.training.optimisation import rate_at
from momconv.training.planning import BatchPlan
from momconv.training.processes import ALONE, Processes
from momconv.training.progress import Listener
from momconv.training.run_folder import RunFolder


@dataclass(slots=True)
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

    @property
    def steps_per_epoch(self) -> int:
        """The optimisation steps of an epoch."""
        return count_steps(len(self.splits.train.samples), self.recipe.train.batch_size)

    def rate_at(self, epoch: int, step: int) -> float:
        """The learning rate of a step."""
        done = epoch * self.steps_per_epoch + step
        return rate_at(self.recipe.train, done, self.steps_per_epoch)
