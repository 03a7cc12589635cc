"""Memory in a run: what is measured of it, and what happens when it runs out."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from momconv.errors import NotReproducible, OutOfMemory
from momconv.exhaustion import EXHAUSTED, naming_exhaustion
from momconv.files.atomic import write_text
from momconv.momentum.faults import tell_fault
from momconv.planner.allowance import find_allowance
from momconv.planner.measurement import measure
from momconv.planner.outlook import SLACK
from momconv.planner.plan import Plan
from momconv.training.progress import Halving
from momconv.training.run import TrainingRun
from momconv.training.saving import write_plan
from momconv.training.steps import add_gradients, fewest_images
from momconv.units import format_bytes, parse_bytes

_LEANER = 0.9  # times the memory with which a plan failed


def has_to_measure(run: TrainingRun, images: int) -> bool:
    """Return whether what a micro-batch of so many takes is unknown yet, as it may be on a CPU.

    Equal shapes take equal memory. A limit that was asked for is checked once more in each epoch.
    Where only the head learns, it is less than planned.
    """
    if run.head_only or run.device.type != "cpu" or images in run.measured_sizes:
        return False
    return run.recipe.train.memory is not None or run.plan.measured_bytes is None


def measure_gradients(
    run: TrainingRun,
    images: Tensor,
    labels: Tensor,
    share: float,
    before_backward: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add gradients as ``add_gradients`` does, and let the plan learn the peak.

    Where steps are taken in backward, it does not learn from those that begin with their state,
    which would count twice.

    Raises:
        OutOfMemory: The peak is above the limit that was asked for, which nothing else enforces on
            a CPU.
    """
    losses: list[Tensor] = []
    work = partial(add_gradients, run, images, labels, share, before_backward)
    training, state = run.plan.request, run.optimizer.state
    begun = len(state)
    with nullcontext() if training.release_gradients else _holding_gradients(run.model):
        peak = measure(lambda: losses.append(work()), run.device)
    if training.release_gradients and len(state) > begun:
        return losses[0]
    trained = {p for p in run.model.parameters() if p.requires_grad}
    unused = {p for p in trained if p.grad is None and p not in state}
    train, static = run.recipe.train, training.static_bytes(run.model, unused)
    _learn_peak(run, static.total + images.nbytes + labels.nbytes + peak)
    run.measured_sizes.add(len(labels))
    if train.memory is not None and run.plan.is_exceeded:
        tell_fault(OutOfMemory(f"above the limit of {train.memory}", kind=EXHAUSTED))
    return losses[0]


@contextmanager
def _holding_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, every trained parameter has a gradient, as in all micro-batches but the first.

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


def note_peak(run: TrainingRun) -> None:
    """On a GPU, let the plan learn the peak of all steps so far, those of the head aside."""
    if run.device.type == "cuda" and not run.head_only:
        _learn_peak(run, torch.cuda.max_memory_allocated(run.device))


def _learn_peak(run: TrainingRun, measured_bytes: int) -> None:
    """Let the plan have the highest of the peaks that were measured."""
    if measured_bytes > (run.plan.measured_bytes or 0):
        run.plan = replace(run.plan, measured_bytes=measured_bytes)
        write_plan(run)


def halve(run: TrainingRun, error: OutOfMemory | NotReproducible) -> None:
    """Go on with smaller micro-batches, at the step that met ``error``. Nothing is written.

    Near the limit of a GPU's memory cuDNN may take another algorithm the second time, with other
    last bits: what is not reproducible is tried once more.

    Raises:
        OutOfMemory: There are no smaller ones.
        NotReproducible: There are no smaller ones, or the step is not reproducible with them.
    """
    progress, before = run.progress, run.plan.micro_batch
    here = (progress.epoch, progress.step)
    smaller = run.plan.halve(fewest=fewest_images(run.model))
    if isinstance(error, NotReproducible):
        if smaller is None or run.redone == here:
            raise error
        run.redone = here
    elif smaller is None:
        doing = f"with micro-batches of {before}"
        raise out_of_memory(run, error, doing, _find_other_memory(run.plan)) from None
    run.plan = smaller
    run.measured_sizes.clear()
    progress.halvings.append(Halving(progress.epoch + 1, progress.step + 1, smaller.micro_batch))
    what = "ran out of memory" if isinstance(error, OutOfMemory) else "was not reproducible"
    run.listener.tell(
        f"warning: {run.device} {what} with micro-batches of {before}; epoch "
        f"{progress.epoch + 1}, step {progress.step + 1} is done again, with {smaller.micro_batch}"
    )


@contextmanager
def offering_to_resume(run: TrainingRun) -> Iterator[None]:
    """Inside, the error where memory ran out says how the run can go on.

    Raises:
        OutOfMemory: It ran out.
    """
    try:
        with naming_exhaustion():
            yield
    except OutOfMemory as error:
        if error.fix and run.folder.resume_command in error.fix:
            raise
        fix = "\n".join(filter(None, [run.folder.resume_command, error.fix]))
        raise OutOfMemory(error.message, kind=error.kind, fix=fix) from None


@contextmanager
def enforcing_limit(device: torch.device, memory: str | None) -> Iterator[None]:
    """Inside, a GPU is out of memory above the limit ``memory``.

    PyTorch's allocator counts its own bytes alone, without the context of CUDA. On a CPU nothing
    enforces a limit, which is why the first step is measured.
    """
    if device.type != "cuda" or memory is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = (parse_bytes(memory) - find_allowance(device).context) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def compare_peak(run: TrainingRun) -> None:
    """Tell if the peak of the run is above what was planned; on a GPU, whatever it is."""
    measured, planned = run.plan.measured_bytes, run.plan.predicted_bytes
    if measured is None:
        return
    if measured > planned * (1 + SLACK):
        run.listener.tell(
            f"warning: the peak was {format_bytes(measured)}, above the {format_bytes(planned)} "
            "that were planned"
        )
    elif run.device.type == "cuda":
        run.listener.tell(
            f"note: the peak was {format_bytes(measured)}; planned were {format_bytes(planned)}, "
            "context and libraries included"
        )


def reset_peak(run: TrainingRun) -> None:
    """Forget the peak that was measured, and the micro-batches that it was measured with."""
    run.measured_sizes.clear()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)


def peak_bytes(run: TrainingRun) -> int:
    """Return the peak since the epoch began; on the CPU, that of the first step."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device)
    return run.plan.measured_bytes or run.plan.predicted_bytes


def keep_for_restart(run: TrainingRun) -> str:
    """Let what starts this run again take smaller micro-batches, if there are any.

    Returns what to tell of the state from which it then goes on.
    """
    kept = "the state that was saved last is kept"
    smaller = run.plan.halve(fewest=fewest_images(run.model))
    if smaller is None:
        return kept
    write_text(run.folder.plan, smaller.to_json())
    return f"{kept}, and goes on with micro-batches of {smaller.micro_batch}"


def offer_half(run: TrainingRun) -> str:
    """Return the command that goes on with half the micro-batch, if the network can take so few."""
    half = max(fewest_images(run.model), run.plan.micro_batch // 2)
    return f"{run.folder.resume_command} --micro-batch {half}"


def out_of_memory(run: TrainingRun, error: OutOfMemory, doing: str, remedy: str) -> OutOfMemory:
    """Return what ends a run if no smaller batch helps against ``error``; the ``remedy`` may."""
    *_, words = error.message.splitlines()
    return OutOfMemory(
        f"{run.device} ran out of memory {doing}, and there are no smaller ones; the state before "
        f"it is saved\n{words}",
        kind=error.kind,
        fix=f"{run.folder.resume_command} {remedy}",
    )


def _find_other_memory(plan: Plan) -> str:
    """Return what was needed, if that is known; or less, for a leaner strategy, if there is one."""
    if plan.measured_bytes is not None and plan.is_exceeded:
        wanted = plan.measured_bytes / (1 - SLACK)
    else:
        wanted = plan.predicted_bytes * _LEANER
    return f"--memory {math.ceil(wanted / 2**20)}MiB"
