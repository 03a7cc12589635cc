"""What a run was asked for, and what follows from that."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from momconv.data.dataset import count_workers, count_workers_that_fit
from momconv.data.folder import Splits
from momconv.determinism import deterministic
from momconv.errors import ResourceError
from momconv.planner.outlook import Fixed
from momconv.recipe import Recipe
from momconv.states import keeping_random_state
from momconv.training import network
from momconv.training.job import Job
from momconv.training.memory import enforcing_limit
from momconv.training.optimisation import choose_precision
from momconv.training.planning import BatchPlan, Setting
from momconv.training.processes import Processes, find_own_device, joined
from momconv.training.progress import SILENT, Listener
from momconv.training.provenance import Provenance, read_provenance
from momconv.training.run_folder import RunFolder
from momconv.training.saving import require_tensorboard
from momconv.units import format_bytes
from momconv.zoo.description import describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What was asked for, and of which process."""

    recipe: Recipe
    run: RunFolder
    overwrite: bool  # whether the folder may hold another run
    like: Provenance | None  # of a run that this one is to be compared to
    device: torch.device
    listener: Listener
    processes: Processes

    def describe_setting(
        self, splits: Splits, model: nn.Module, fixed: tuple[Fixed, ...]
    ) -> Setting:
        """What the plan of the memory depends on."""
        recipe, train, processes = self.recipe, self.recipe.train, self.processes
        return Setting(
            images=len(splits.train.samples),
            batch_size=train.batch_size,
            micro_batch=train.micro_batch,
            resolution=describe(model).preprocessing.resolution,
            strategy=recipe.momentum.strategy,
            precision=choose_precision(train, self.device),
            optimizer=train.optimizer,
            device=str(self.device),
            memory=train.memory,
            headroom=train.headroom,
            ema=train.ema > 0,
            processes=processes.count,
            sharers=processes.on_this_machine if self.device.type == "cpu" else 1,
            fixed=fixed,
        )

    def choose_workers(self, splits: Splits, plan: BatchPlan) -> int:
        """How many processes read images; not more than shared memory has room for.

        Raises:
            ResourceError: It has no room for those that the recipe asks for.
        """
        wanted, processes = self.recipe.data.workers, self.processes
        images = len(splits.train.samples) // processes.count
        most = (
            count_workers(images, self.device) // processes.on_this_machine
            if wanted == "auto"
            else wanted
        )
        batch_bytes = plan.sizes[0] * 3 * 4 * plan.setting.resolution**2
        fitting = count_workers_that_fit(most, batch_bytes * processes.on_this_machine)
        if fitting < most and wanted != "auto":
            raise ResourceError(
                f"{most} processes that read micro-batches of {format_bytes(batch_bytes)} need more"
                " shared memory than there is",
                kind="memory.shared",
                fix=f"--workers {fitting}\ndocker run --shm-size=8g …",
            )
        return fitting

    def make_job(
        self, splits: Splits, model: nn.Module, optimizer: Optimizer, plan: BatchPlan
    ) -> Job:
        """What the training loop works with."""
        return Job(
            recipe=self.recipe,
            folder=self.run,
            splits=splits,
            model=model,
            optimizer=optimizer,
            plan=plan,
            device=self.device,
            workers=self.choose_workers(splits, plan),
            listener=self.listener,
            processes=self.processes,
        )


@contextmanager
def task_of(
    recipe: Recipe, run: RunFolder, like: Path | None, listener: Listener, *, overwrite: bool
) -> Iterator[Task]:
    """The task of this process, with random numbers and other processes ready for it.

    Raises:
        UsageError: The recipe asks for what its device cannot do, or for TensorBoard without it.
        ResourceError: There is no such device.
        ModelFileError: ``like`` is no ``run.json``.
    """
    before = read_provenance(like) if like else None
    device = find_own_device(recipe.train.device)
    choose_precision(recipe.train, device)
    network.require_synchronisable(recipe.train, device)
    require_tensorboard(recipe)
    with (
        joined() as processes,
        _seeded(recipe.train.seed, device),
        deterministic(wanted=recipe.train.deterministic),
        enforcing_limit(device, recipe.train.memory),
    ):
        heard = listener if processes.leads else SILENT
        yield Task(
            recipe=recipe,
            run=run,
            overwrite=overwrite,
            like=before,
            device=device,
            listener=heard,
            processes=processes,
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's generators start from ``seed`` inside, and are as before afterwards."""
    with keeping_random_state(device):
        torch.manual_seed(seed)
        yield
