"""Memory in a run: what is measured of it, and what happens when it runs out."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from momconv.errors import ResourceError
from momconv.planner.measurement import measure, static_bytes
from momconv.planner.outlook import SLACK
from momconv.training.gradients import add_gradients
from momconv.training.job import Job
from momconv.training.planning import BatchPlan
from momconv.training.progress import Halving, Progress
from momconv.training.saving import write_plan
from momconv.training.steps import fewest_images

_LEANER = 0.9  # times the memory with which a plan failed


def has_to_measure(job: Job, images: int) -> bool:
    """Whether nothing says yet what a micro-batch of so many takes, on a CPU, where nobody counts.

    Equal shapes take equal memory. A limit that was asked for is checked once more in each epoch.
    Where only the head learns, it is less than planned.
    """
    if job.head_only or job.device.type != "cpu" or images in job.measured_sizes:
        return False
    return job.recipe.train.memory is not None or job.plan.measured_bytes is None


def measure_gradients(job: Job, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """As ``add_gradients``, and the plan learns the peak.

    Raises:
        torch.OutOfMemoryError: The peak is above the limit that was asked for, which nothing else
            enforces on a CPU.
    """
    losses: list[Tensor] = []
    work = partial(add_gradients, job, images, labels, share)
    with _holding_gradients(job.model):
        peak = measure(lambda: losses.append(work()), job.device)
    train = job.recipe.train
    static = static_bytes(job.model, train.optimizer, ema=train.ema > 0)
    _learn_peak(job, static.total + images.nbytes + labels.nbytes + peak)
    job.measured_sizes.add(len(labels))
    if train.memory is not None and job.plan.is_exceeded:
        raise torch.OutOfMemoryError(f"above the limit of {train.memory}")
    return losses[0]


@contextmanager
def _holding_gradients(model: nn.Module) -> Iterator[None]:
    """Every trained parameter has a gradient inside, as in all micro-batches but the first.

    One that gets none keeps none: an optimiser would let it decay.
    """
    empty = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    untouched = {*empty}
    with ExitStack() as hooks:
        for parameter in empty:
            parameter.grad = torch.zeros_like(parameter)
            hook = parameter.register_post_accumulate_grad_hook(untouched.discard)
            hooks.callback(hook.remove)
        yield
    for parameter in untouched:
        parameter.grad = None


def note_peak(job: Job) -> None:
    """On a GPU, let the plan learn the peak of the first whole step."""
    if job.device.type == "cuda" and job.plan.measured_bytes is None and not job.head_only:
        _learn_peak(job, torch.cuda.max_memory_allocated(job.device))


def _learn_peak(job: Job, measured_bytes: int) -> None:
    """Let the plan have the highest of the peaks that were measured."""
    if measured_bytes > (job.plan.measured_bytes or 0):
        job.plan = replace(job.plan, measured_bytes=measured_bytes)
        write_plan(job)


def halve(job: Job, progress: Progress) -> None:
    """Go on with smaller micro-batches, at the step at which memory ran out. Nothing is written.

    Raises:
        ResourceError: There are no smaller ones.
    """
    release_memory(job.device)
    before = job.plan.micro_batch
    smaller = job.plan.halve(fewest=fewest_images(job.model))
    if smaller is None:
        raise out_of_memory(job, f"with micro-batches of {before}", _find_other_memory(job.plan))
    job.plan = smaller
    job.measured_sizes.clear()
    progress.halvings.append(Halving(progress.epoch + 1, progress.step + 1, smaller.micro_batch))
    job.listener.tell(
        f"warning: {job.device} ran out of memory with micro-batches of {before}; epoch "
        f"{progress.epoch + 1}, step {progress.step + 1} is done again, with {smaller.micro_batch}"
    )


def release_memory(device: torch.device) -> None:
    """Give back what nothing uses any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(job: Job) -> None:
    """Begin to measure anew."""
    job.measured_sizes.clear()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)


def peak_bytes(job: Job) -> int:
    """The peak since the epoch began; on the CPU, where nobody counts, of the first step."""
    if job.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.device)
    return job.plan.measured_bytes or job.plan.predicted_bytes


def halved(job: Job) -> int:
    """The next smaller micro-batch."""
    return max(fewest_images(job.model), job.plan.micro_batch // 2)


def out_of_memory(job: Job, doing: str, remedy: str) -> ResourceError:
    """The error that ends a run: memory ran out ``doing`` something; the ``remedy`` may help."""
    return ResourceError(
        f"{job.device} ran out of memory {doing}, and there are no smaller ones; the state before "
        "it is saved",
        kind="memory.exhausted",
        fix=f"{job.folder.resume_command} {remedy}",
    )


def _find_other_memory(plan: BatchPlan) -> str:
    """What was needed, if that is known; or less, for a leaner strategy, if there is one."""
    if plan.measured_bytes is not None and plan.is_exceeded:
        wanted = plan.measured_bytes / (1 - SLACK)
    else:
        wanted = plan.predicted_bytes * _LEANER
    return f"--memory {math.ceil(wanted / 2**20)}MiB"
