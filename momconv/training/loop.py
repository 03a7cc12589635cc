"""The training loop: gradients of micro-batches add up to a step, steps to an epoch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from momconv.data.decoding import UnreadableImage
from momconv.errors import DataError, MomconvError, NotReproducible, OutOfMemory, ResourceError
from momconv.evaluation import Scores
from momconv.exhaustion import EXHAUSTED, keep_reserve, naming_exhaustion
from momconv.heap import keeping_freed_memory
from momconv.states import keep_buffers
from momconv.training.gradients import add_gradients, take_step
from momconv.training.interruption import Interrupted, TimeUp, catching_signals
from momconv.training.job import Job
from momconv.training.memory import (
    compare_peak,
    halve,
    halved,
    has_to_measure,
    measure_gradients,
    note_peak,
    offering_to_resume,
    peak_bytes,
    reset_peak,
)
from momconv.training.network import compiling, read_gamma, start_training
from momconv.training.omission import find_number, leave_out
from momconv.training.progress import EpochRow, Progress, has_stalled
from momconv.training.saving import (
    Autosave,
    NotFinite,
    anneal_networks,
    go_back,
    go_back_and_slow_down,
    indivisible,
    save,
    save_event,
    saving_on_failure,
    write_plan,
)
from momconv.training.state import read_random_states, set_random_states
from momconv.training.steps import Step, Steps
from momconv.training.validation import validate
from momconv.units import format_bytes
from momconv.words import itemise, printable
from momconv.zoo.checkpoints import find_spoilt
from momconv.zoo.stages import ALL_BUT_HEAD, freeze

_SHOWN = 5  # files that an error names
_NONE = -1  # in place of an image's number


def train(job: Job, progress: Progress) -> None:
    """Train up to the recipe's last epoch, from wherever ``progress`` is.

    However this ends, the folder then holds the state after the last whole optimisation step.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        TimeUp: The time limit is reached.
        MomconvError: A loss, a gradient or a weight is not finite, again after a return to the last
            saved state, which is then the one that the folder holds.
        DataError: Too many images cannot be decoded any more.
        ResourceError: Memory or disk is exhausted.
    """
    steps, report, autosave = Steps(job), _Report(job, progress), Autosave(job, progress)
    with (
        catching_signals(job.listener.tell) as check,
        saving_on_failure(job, progress),
        offering_to_resume(job),
        compiling(job.model, wanted=job.recipe.train.compile),
        keeping_freed_memory(job.device),
    ):
        while not _is_done(job, progress):
            _begin_epoch(job, progress)
            began = time.perf_counter()
            left_out = progress.left_out("train")
            for step in steps.read(progress.epoch, first=progress.step, left_out=left_out):
                loss = _add_up(job, progress, step, report, check)
                if loss is None or not _step(job, progress, step, loss, began):
                    report.start_over()
                    break
                note_peak(job)
                autosave()
                _stop_if_asked(job, check)
                began = time.perf_counter()
            else:
                scores = validate(job, progress, report, check)
                if _has_diverged(job, progress, scores):
                    report.start_over()
                    continue
                _finish_epoch(job, progress, scores, time.perf_counter() - began)
                if not _is_done(job, progress):
                    _stop_if_asked(job, check)
    compare_peak(job)
    if progress.epoch < job.recipe.train.epochs:
        job.listener.tell(
            f"note: stopped after {progress.epoch} of {job.recipe.train.epochs} epochs, the last "
            f"{job.recipe.train.patience} of them without a better {job.recipe.train.monitor} "
            "(train.patience)"
        )


def _begin_epoch(job: Job, progress: Progress) -> None:
    """Let what is to learn in this epoch learn: at first perhaps the head alone."""
    keep_reserve()
    start_training(job.model, job.recipe.train)
    for group in job.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = True
    job.head_only = progress.epoch < job.recipe.train.freeze_epochs
    if job.head_only:
        freeze(job.model, [ALL_BUT_HEAD])
    reset_peak(job)


def _is_done(job: Job, progress: Progress) -> bool:
    train = job.recipe.train
    return progress.epoch >= train.epochs or has_stalled(progress.history, train)


def _add_up(
    job: Job, progress: Progress, step: Step, report: "_Report", check: Callable[[], None]
) -> Tensor | None:
    """Add up the gradients of a step; its loss, or None if it cannot be.

    Then the run is to go on from wherever ``progress`` is, prepared not to fail again.
    """
    try:
        with naming_exhaustion(), _all_or_nothing(job):
            loss = _add_share(job, step, report, check)
            job.processes.add([loss])
            job.processes.add_gradients(job.model)
            job.scaler.scale(loss)  # a process without an image has not made its scale yet
            job.scaler.unscale_(job.optimizer)
            _require_finite(job, progress, loss, step)
    except (OutOfMemory, NotReproducible) as error:
        halve(job, progress, error)
        save_event(job, progress)
        return None
    except UnreadableImage as error:
        leave_out(job, progress, "train", error)
        return None
    except NotFinite as error:
        go_back_and_slow_down(job, progress, error)
        return None
    return loss


def _add_share(job: Job, step: Step, report: "_Report", check: Callable[[], None]) -> Tensor:
    """Add up the gradients of this process's images of a step; their part of its loss.

    Raises:
        OutOfMemory: In this process or in another one.
        NotReproducible: The same.
        UnreadableImage: The same.
    """
    loss, left = torch.zeros((), device=job.device), step.images
    fault: MomconvError | None = None
    try:
        with naming_exhaustion():
            for images, labels in step.parts:
                share = len(labels) / step.images
                if has_to_measure(job, len(labels)):
                    loss += measure_gradients(job, images, labels, share)
                else:
                    loss += add_gradients(job, images, labels, share)
                left -= len(labels)
                report(len(labels))
                if job.processes.count == 1:  # several stop together, between two steps
                    check()
    except (OutOfMemory, NotReproducible, UnreadableImage) as error:
        fault = error
    _fail_together(job, fault)
    if left:
        report(left)  # those of the other processes
    return loss


def _fail_together(job: Job, fault: MomconvError | None) -> None:
    """Do nothing if no process has met a fault for which all do a step again.

    Raises:
        MomconvError: This one has, and the others wait for it within BatchNorm.
        OutOfMemory: One ran out of memory.
        NotReproducible: One has computed something else the second time.
        UnreadableImage: One has met an image that cannot be read.
    """
    number = find_number(job.splits.train, fault) if isinstance(fault, UnreadableImage) else _NONE
    if fault and job.recipe.train.sync_bn and job.processes.count > 1:
        _refuse_to_redo(job, fault)
    exhausted, different, unreadable = job.processes.largest(
        isinstance(fault, OutOfMemory), isinstance(fault, NotReproducible), number
    )
    if fault and job.processes.count == 1:
        raise fault
    if exhausted:
        raise OutOfMemory("a process ran out of memory", kind=EXHAUSTED)
    if different:
        problem = "a block computed something else when it was run again, in one of the processes"
        raise NotReproducible(problem, kind="inversion.not_reproducible")
    if unreadable != _NONE:
        raise UnreadableImage(job.splits.train.samples[unreadable].path, "could not be read")


def _refuse_to_redo(job: Job, fault: MomconvError) -> None:
    if isinstance(fault, OutOfMemory):
        raise ResourceError(
            f"{job.device} ran out of memory, while others wait for it (--sync-bn)",
            kind=EXHAUSTED,
            fix=f"{job.folder.resume_command} --micro-batch {halved(job)}",
        )
    if isinstance(fault, UnreadableImage):
        path = printable(fault.path)
        raise DataError(
            f"{path}: could not be read, while others wait for it (--sync-bn)\n"
            "once it is back, the run can go on",
            kind="data.lost_image",
            fix=job.folder.resume_command,
        )
    raise fault


def _step(job: Job, progress: Progress, step: Step, loss: Tensor, began: float) -> bool:
    """Change the weights, and count the step, which ``began`` then.

    False if memory ran out: some weights may have changed, so the run went back.

    Raises:
        ResourceError: Memory ran out in one of several processes, which cannot go back by itself.
    """
    lr = progress.lr_factor * job.rate_at(progress.epoch, progress.step)
    with indivisible(job):
        try:
            with naming_exhaustion():
                take_step(job, lr)
        except OutOfMemory as error:
            if job.processes.count > 1:
                raise ResourceError(
                    f"{job.device} ran out of memory while changing the weights; the state that "
                    "was saved last is kept",
                    kind=EXHAUSTED,
                    fix=f"{job.folder.resume_command} --micro-batch {halved(job)}",
                ) from None
            go_back(job, progress)
            halve(job, progress, error)
            save_event(job, progress)
            return False
        progress.count_step(step.images, float(loss), time.perf_counter() - began)
        anneal_networks(job, progress)
    return True


def _stop_if_asked(job: Job, check: Callable[[], None]) -> None:
    """Do nothing if no process was signalled, and the leader has time left.

    Raises:
        Interrupted: One was signalled.
        TimeUp: There is no time left.
    """
    number = 0
    try:
        check()
    except Interrupted as interrupted:
        number = interrupted.signal
    own = job.processes.leads and time.monotonic() >= job.ends
    number, late = job.processes.largest(number, own)
    if number:
        raise Interrupted(number)
    if late:
        raise TimeUp


@contextmanager
def _all_or_nothing(job: Job) -> Iterator[None]:
    """Undoes what was done to the network since the last step, if it comes to nothing.

    The weights do not change before the optimiser's step; gradients, BatchNorm's statistics and the
    random state do, and the scaler knows of gradients that it has unscaled.
    """
    with ExitStack() as undo:
        undo.callback(keep_buffers(job.model))
        undo.callback(set_random_states, read_random_states())
        undo.callback(job.model.zero_grad)
        undo.callback(job.renew_scaler)
        yield
        undo.pop_all()


def _require_finite(job: Job, progress: Progress, loss: Tensor, step: Step) -> None:
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    if math.isfinite(loss) and math.isfinite(get_total_norm(gradients)):
        return
    if math.isfinite(loss) and job.scaler.get_scale() > 1:
        return  # the step is left out, and the next ones have a smaller scale
    what = "a gradient" if math.isfinite(loss) else f"the loss ({float(loss)})"
    names = [printable(job.splits.train.samples[index].path) for index in step.indices]
    lower = job.recipe.train.resolved_lr / 10
    raise NotFinite(
        f"{what} is not finite, in epoch {progress.epoch + 1}, step {progress.step + 1} of "
        f"{job.steps_per_epoch}\nits images:\n" + itemise(names, _SHOWN),
        kind="train.not_finite",
        fix=f"{job.folder.resume_command} --lr {lower:g}",
    )


def _has_diverged(job: Job, progress: Progress, scores: Scores | None) -> bool:
    """Whether an epoch came to what is not finite. Then the run goes on from an earlier state.

    Raises:
        NotFinite: It happened before.
    """
    loss = scores.loss if scores else 0.0
    spoilt = find_spoilt(dict(job.networks[-1].named_parameters()))
    if math.isfinite(loss) and not spoilt:
        return False
    what = f"the weight {spoilt[0]}" if spoilt else f"the validation loss ({loss})"
    lower = job.recipe.train.resolved_lr / 10
    best = progress.find_best(job.recipe.train.monitor)
    kept = f"\nthe best so far, of epoch {best.epoch}, is in {job.folder.best}" if best else ""
    error = NotFinite(
        f"{what} is not finite after epoch {progress.epoch + 1}: the training diverged{kept}",
        kind="train.not_finite",
        fix=f"{job.folder.resume_command} --lr {lower:g}",
    )
    go_back_and_slow_down(job, progress, error)
    return True


def _finish_epoch(job: Job, progress: Progress, scores: Scores | None, seconds: float) -> None:
    row = EpochRow(
        epoch=progress.epoch + 1,
        train_loss=progress.loss_sum / progress.images,
        val_loss=scores.loss if scores else None,
        val_top1=scores.top1 if scores else None,
        lr=progress.lr_factor * job.rate_at(progress.epoch, progress.step - 1),
        images_per_second=progress.images / progress.seconds,
        peak_bytes=peak_bytes(job),
        seconds=progress.seconds + seconds,
        gamma=read_gamma(job.model),
        val_macro_f1=scores.macro_f1 if scores else None,
        val_macro_recall=scores.macro_recall if scores else None,
        val_classes=len(scores.classes) - len(scores.uncovered) if scores else None,
    )
    if job.plan.measured_seconds is None and not job.head_only:
        job.plan = replace(job.plan, measured_seconds=1 / row.images_per_second)
        write_plan(job)
    progress.finish_epoch(row)
    save(job, progress)
    job.listener.finish_epoch(row, job.recipe.train.epochs)


class _Report:
    """Tells the listener how far the run is, whenever it hears of further images."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self.start_over()

    def start_over(self) -> None:
        """Begin to count where the run is now."""
        progress, train = self._progress, self._job.recipe.train
        images = len(self._job.splits.train.samples)
        self._done, self._total = 0, (train.epochs - progress.epoch) * images - progress.images

    def __call__(self, further: int, doing: str = "") -> None:
        self._done += further
        progress, parts = self._progress, [doing] if doing else []
        if progress.images:
            parts.append(f"loss {progress.loss_sum / progress.images:.3f}")
            parts.append(f"{progress.images / progress.seconds:.1f} images/s")
        parts.append(f"peak {format_bytes(peak_bytes(self._job))}")
        text = " · ".join([f"epoch {progress.epoch + 1}/{self._job.recipe.train.epochs}", *parts])
        self._job.listener.advance("training", self._done, self._total, text)
