"""The gradients of a step, of which every process adds up its share, in step with the others.

A process that fails must not leave the others waiting, whatever it waits for or they do. So all of
them learn of a fault at the end of the step, which they then do again. Where weights change within
backward they learn of it before that begins, as nothing could be done again afterwards.

Where the weights are divided among processes, all make each pass through the network together: one
whose pass ends early would keep its part of the weights from the others. So all have equally many
passes, those without an image with nothing to learn, and what can be told later is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from momconv.data.decoding import UnreadableImage
from momconv.errors import (
    DataError,
    MomconvError,
    NotReproducible,
    OutOfMemory,
    RangeOverflow,
    ResourceError,
)
from momconv.exhaustion import EXHAUSTED, naming_exhaustion
from momconv.momentum.faults import postponing
from momconv.momentum.sequential import read_ranges, set_ranges
from momconv.training.memory import (
    has_to_measure,
    keep_for_restart,
    measure_gradients,
    offer_half,
)
from momconv.training.omission import find_number
from momconv.training.run import TrainingRun
from momconv.training.saving import indivisible
from momconv.training.steps import Step, add_gradients, keep_company
from momconv.words import printable

_NONE = -1  # in place of an image's number


def add_share(
    run: TrainingRun,
    step: Step,
    report: Callable[[int], None],
    check: Callable[[], None],
    *,
    is_released: bool,
) -> Tensor:
    """Add up the gradients of this process's images of a step; return their part of its loss.

    Those that are released change the weights, which are not whole afterwards.

    Raises:
        OutOfMemory: In this process or in another one.
        NotReproducible: The same.
        UnreadableImage: The same.
        RangeOverflow: The same.
    """
    loss, left, passes = torch.zeros((), device=run.device), step.images, 0
    fault: MomconvError | None = None
    agreement = _Agreement(run=run, is_needed=is_released)
    _begin_adding(run, step, is_released=is_released)
    try:
        with naming_exhaustion():
            for images, labels in step.parts:
                share = len(labels) / step.images
                add = measure_gradients if has_to_measure(run, len(labels)) else add_gradients
                passes += 1
                with _passing(run):
                    loss += add(run, images, labels, share, agreement.seek)
                run.buckets.end_pass()
                left -= len(labels)
                report(len(labels))
                # Several processes stop together, and half-done steps are finished.
                if run.processes.count == 1 and run.is_whole:
                    check()
    except (OutOfMemory, NotReproducible, RangeOverflow, UnreadableImage) as error:
        fault = error
    if run.is_sharded:
        fault = finish_passes(run, step.most - passes, fault)
    if not agreement.is_sought:
        _fail_together(run, fault)
    elif fault:
        raise fault
    if left:
        report(left)  # those of the other processes
    return loss


def _begin_adding(run: TrainingRun, step: Step, *, is_released: bool) -> None:
    """Let gradients be summed in the last pass of a step, unless they are as they come."""
    if is_released:
        run.buckets.clear()
    elif run.processes.count > 1 and not run.is_sharded:
        run.buckets.begin(run.model, step.own)


@dataclass(slots=True, kw_only=True)
class _Agreement:
    """The agreement of all processes to begin a backward pass that changes weights.

    Attributes:
        run: Of this process.
        is_needed: Whether weights change.
        is_sought: Whether the others have been asked.
    """

    run: TrainingRun
    is_needed: bool
    is_sought: bool = False

    def seek(self) -> None:
        """Ask the others, if that is needed; from then on, this step is half done.

        Raises:
            MomconvError: A forward pass has failed.
        """
        if self.is_needed:
            self.is_sought = True
            _fail_together(self.run, None)
            self.run.is_whole = False


def _fail_together(run: TrainingRun, fault: MomconvError | None) -> None:
    """Sum the gradients, and raise a fault that any process has met in all of them.

    All runs have the same ranges in all processes afterwards.

    Raises:
        MomconvError: This one has, and the others wait for it within BatchNorm.
        OutOfMemory: One ran out of memory.
        NotReproducible: One has computed something else the second time.
        RangeOverflow: In one, activations have outgrown the range of a run.
        UnreadableImage: One has met an image that cannot be read.
    """
    number = find_number(run.splits.train, fault) if isinstance(fault, UnreadableImage) else _NONE
    if fault and run.recipe.train.sync_bn and run.processes.count > 1:
        _refuse_to_redo(run, fault)
    run.buckets.finish()
    kinds = (OutOfMemory, NotReproducible, RangeOverflow)
    met = (isinstance(fault, kind) for kind in kinds)
    exhausted, different, outgrown, unreadable, *ranges = run.processes.largest(
        *met, number, *read_ranges(run.model)
    )
    set_ranges(run.model, ranges)
    if fault and run.processes.count == 1:
        raise fault
    if exhausted:
        raise OutOfMemory("a process ran out of memory", kind=EXHAUSTED)
    if different:
        problem = "a block computed something else when it was run again, in one of the processes"
        raise NotReproducible(problem, kind="inversion.not_reproducible")
    if outgrown:
        problem = "activations outgrew the range of a run, in one of the processes"
        raise RangeOverflow(problem, kind="inversion.range_overflow")
    if unreadable != _NONE:
        raise UnreadableImage(run.splits.train.samples[unreadable].path, "could not be read")


def _refuse_to_redo(run: TrainingRun, fault: MomconvError) -> None:
    if isinstance(fault, OutOfMemory):
        raise ResourceError(
            f"{run.device} ran out of memory, while others wait for it (--sync-bn)",
            kind=EXHAUSTED,
            fix=offer_half(run),
        )
    if isinstance(fault, UnreadableImage):
        path = printable(fault.path)
        raise DataError(
            f"{path}: could not be read, while others wait for it (--sync-bn)\n"
            "once it is back, the run can go on",
            kind="data.lost_image",
            fix=run.folder.resume_command,
        )
    raise fault


@contextmanager
def _passing(run: TrainingRun) -> Iterator[None]:
    """Make a pass inside, to its end if the network is divided. Otherwise it may fail at once.

    Raises:
        MomconvError: Something was wrong with it. If it has not come to its end, the run is not
            whole.
    """
    if not run.is_sharded:
        yield
        return
    with indivisible(run), postponing() as faults:
        yield
    if faults:
        raise faults[0]


def finish_passes(run: TrainingRun, left: int, fault: MomconvError | None) -> MomconvError | None:
    """Make the passes that are ``left`` with nothing to learn, and return the first fault.

    Raises:
        ResourceError: A pass has not come to its end.
    """
    if not run.is_whole:
        raise _lost(run, fault) from None
    for _ in range(left):
        try:
            with _passing(run):
                keep_company(run)
        except MomconvError as error:
            if not run.is_whole:
                raise
            fault = fault or error
    return fault


def _lost(run: TrainingRun, fault: MomconvError | None) -> MomconvError:
    """Return what ends a run for a ``fault`` within a pass, in which others wait.

    Where memory ran out, the plan in the folder has smaller micro-batches, if there are any: with
    them the run goes on once it is started again, by whomever.
    """
    if not isinstance(fault, OutOfMemory):
        assert fault
        return fault
    return ResourceError(
        f"{fault.message}\nwhile others wait for this process's part of the weights (--shard); "
        f"{keep_for_restart(run)}",
        kind=fault.kind,
        fix=run.folder.resume_command,
    )
