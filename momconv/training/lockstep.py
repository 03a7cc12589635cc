"""Passes through a network that is divided among processes: all of them make each one together.

A process whose pass ends early leaves the others waiting for its part of the weights. So all have
equally many, those without an image with nothing to learn, and what can be told later is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from momconv.errors import MomconvError, OutOfMemory, ResourceError
from momconv.files.atomic import write_text
from momconv.momentum.faults import postponing
from momconv.training.gradients import keep_company
from momconv.training.run import TrainingRun
from momconv.training.saving import indivisible
from momconv.training.steps import fewest_images


@contextmanager
def passing(run: TrainingRun) -> Iterator[None]:
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
    """Make those that are ``left`` with nothing to learn, and return the ``fault`` of a step.

    Raises:
        ResourceError: A pass has not come to its end.
    """
    if not run.is_whole:
        raise _lost(run, fault) from None
    for _ in range(left):
        try:
            with passing(run):
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
    message, fix = f"{fault.message}\nwhile others wait for this process", run.folder.resume_command
    message += "'s part of the weights (--shard); the state that was saved last is kept"
    if smaller := run.plan.halve(fewest=fewest_images(run.model)):
        write_text(run.folder.plan, smaller.to_json())
        message += f", and goes on with micro-batches of {smaller.micro_batch}"
    return ResourceError(message, kind=fault.kind, fix=fix)
