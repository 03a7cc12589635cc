"""The training loop: gradients of micro-batches add up to a step, steps to an epoch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from torch import Tensor
from torch.nn.utils import get_total_norm

from momconv import heap
from momconv.data.decoding import UnreadableImage
from momconv.errors import (
    MomconvError,
    NotReproducible,
    OutOfMemory,
    RangeOverflow,
    ResourceError,
)
from momconv.evaluation import Scores
from momconv.exhaustion import EXHAUSTED, keep_reserve, naming_exhaustion
from momconv.states import keep_buffers
from momconv.training.gradients import changing_in_backward
from momconv.training.interruption import catching_signals, stop_if_asked
from momconv.training.lockstep import add_share
from momconv.training.memory import (
    compare_peak,
    halve,
    keep_for_restart,
    note_peak,
    offering_to_resume,
    peak_bytes,
    reset_peak,
)
from momconv.training.network import compiling, read_gamma, start_training
from momconv.training.omission import leave_out
from momconv.training.optimisation import set_rate
from momconv.training.progress import EpochRow, has_stalled
from momconv.training.run import TrainingRun
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
    saving_together,
    write_plan,
)
from momconv.training.sharding import own_part, whole
from momconv.training.state import read_random_states, set_random_states
from momconv.training.steps import Step, Steps, take_step
from momconv.training.validation import validate
from momconv.units import format_bytes
from momconv.words import itemise, printable
from momconv.zoo.checkpoints import find_spoilt
from momconv.zoo.stages import ALL_BUT_HEAD, freeze

_SHOWN = 5  # files that an error names
_NONE = -1  # in place of a weight's number


def train(run: TrainingRun) -> None:
    """Train up to the recipe's last epoch, from wherever it is.

    However this ends, the folder then holds the state after the last whole optimisation step.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        TimeUp: The time limit is reached.
        MomconvError: A loss, a gradient or a weight is not finite, again after a return to the last
            saved state, which is then the one that the folder holds.
        DataError: Too many images cannot be decoded any more.
        ResourceError: Memory or disk is exhausted.
    """
    report, autosave = _Report(run), Autosave(run)
    with (
        closing(Steps(run)) as steps,
        catching_signals(run.listener.tell) as check,
        saving_on_failure(run),
        run.processes.noticing_losses(among_others=True),
        offering_to_resume(run),
        compiling(run.model, wanted=run.recipe.train.compile),
        # Where gradients are released, memory counts more than time.
        heap.returning_freed_memory(run.device)
        if run.plan.request.release_gradients
        else heap.keeping_freed_memory(run.device),
    ):
        while not _is_done(run):
            _begin_epoch(run)
            began = time.perf_counter()
            left_out = run.progress.left_out("train")
            for step in steps.read(run.progress.epoch, first=run.progress.step, left_out=left_out):
                loss = _add_up(run, step, report, check)
                if loss is None or not _step(run, step, loss, began):
                    report.start_over()
                    break
                note_peak(run)
                autosave()
                stop_if_asked(run, check)
                began = time.perf_counter()
            else:
                scores = validate(run, report, check)
                if _has_diverged(run, scores):
                    report.start_over()
                    continue
                _finish_epoch(run, scores, time.perf_counter() - began)
                if not _is_done(run):
                    stop_if_asked(run, check)
    compare_peak(run)
    recipe, done = run.recipe.train, run.progress.epoch
    if done < recipe.epochs:
        run.listener.tell(
            f"note: stopped after {done} of {recipe.epochs} epochs, the last {recipe.patience} of "
            f"them without a better {recipe.monitor} (train.patience)"
        )


def _begin_epoch(run: TrainingRun) -> None:
    """Choose which parameters learn in this epoch: at first perhaps the head alone."""
    keep_reserve()
    start_training(run.model, run.recipe.train)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = True
    run.head_only = run.progress.epoch < run.recipe.train.freeze_epochs
    if run.head_only:
        freeze(run.model, [ALL_BUT_HEAD])
    if run.processes.count > 1 and not (run.is_sharded or run.plan.request.release_gradients):
        run.buckets.prepare(run.model)
    reset_peak(run)


def _is_done(run: TrainingRun) -> bool:
    train = run.recipe.train
    return run.progress.epoch >= train.epochs or has_stalled(run.progress.history, train)


def _add_up(
    run: TrainingRun, step: Step, report: "_Report", check: Callable[[], None]
) -> Tensor | None:
    """Add up the gradients of a step, and return its loss, or None if it cannot be.

    Then the run is to go on from wherever it is now, prepared not to fail again.
    """
    is_released = step.is_undivided and run.plan.request.release_gradients
    try:
        with naming_exhaustion(), _all_or_nothing(run):
            with _changing_in_backward(run, is_wanted=is_released) as norms:
                loss = add_share(run, step, report, check, is_released=is_released)
            run.processes.add([loss])
            run.processes.average_statistics(run.model)
            run.scaler.scale(loss)  # a process without an image has not made its scale yet
            run.scaler.unscale_(run.optimizer)
            _require_finite(run, loss, step, norms)
    except NotFinite as error:
        go_back_and_slow_down(run, error)
        return None
    except (OutOfMemory, NotReproducible, UnreadableImage, RangeOverflow) as error:
        if not run.is_whole:
            _undo_changes(run, error)
        _prepare_to_redo(run, error)
        return None
    return loss


@contextmanager
def _changing_in_backward(run: TrainingRun, *, is_wanted: bool) -> Iterator[list[Tensor]]:
    """Let the backward pass inside take the step, if that is wanted.

    The list then has the norms of the gradients that are gone.
    """
    if not is_wanted:
        yield []
        return
    set_rate(run.optimizer, _find_rate(run))
    with changing_in_backward(run.optimizer, run.processes) as norms:
        yield norms


def _undo_changes(run: TrainingRun, error: MomconvError) -> None:
    """Go back to the state that was saved last: some weights have changed within backward.

    Raises:
        ResourceError: There are other processes, and none can go back by itself.
    """
    if run.processes.count > 1:
        raise ResourceError(
            f"{error.message}\nin a backward pass that changes the weights; "
            f"{keep_for_restart(run)}",
            kind=error.kind,
            fix=run.folder.resume_command,
        ) from None
    go_back(run)


def _prepare_to_redo(run: TrainingRun, error: MomconvError) -> None:
    """Change what keeps a step from failing in the same way again.

    Raises:
        MomconvError: Nothing does.
    """
    with saving_together(run):
        _change_what_failed(run, error)


def _change_what_failed(run: TrainingRun, error: MomconvError) -> None:
    if isinstance(error, OutOfMemory | NotReproducible):
        halve(run, error)
        save_event(run)
    elif isinstance(error, UnreadableImage):
        leave_out(run, "train", error)
    # The ranges that overflowed are wider now.


def _step(run: TrainingRun, step: Step, loss: Tensor, began: float) -> bool:
    """Change the weights, and count the step, which began at the time ``began``.

    Returns False if memory ran out: some weights may have changed, so the run went back.

    Raises:
        ResourceError: Memory ran out in one of several processes, which cannot go back by itself.
    """
    lr = _find_rate(run)
    with indivisible(run):
        try:
            with naming_exhaustion():
                take_step(run, lr)
        except OutOfMemory as error:
            if run.processes.count > 1:
                raise ResourceError(
                    f"{run.device} ran out of memory while changing the weights; "
                    f"{keep_for_restart(run)}",
                    kind=EXHAUSTED,
                    fix=run.folder.resume_command,
                ) from None
            go_back(run)
            halve(run, error)
            save_event(run)
            return False
        run.progress.count_step(step.images, float(loss), time.perf_counter() - began)
        anneal_networks(run)
    return True


def _find_rate(run: TrainingRun) -> float:
    """Return the learning rate of the step that comes next."""
    return run.progress.lr_factor * run.rate_at(run.progress.epoch, run.progress.step)


@contextmanager
def _all_or_nothing(run: TrainingRun) -> Iterator[None]:
    """Undo what was done to the network since the last step, if that comes to nothing.

    The weights do not change before the optimiser's step; gradients, BatchNorm's statistics and the
    random state do, and the scaler knows of gradients that it has unscaled.
    """
    with ExitStack() as undo:
        undo.callback(keep_buffers(run.model.modules()))
        undo.callback(set_random_states, read_random_states())
        undo.callback(run.model.zero_grad)
        undo.callback(run.renew_scaler)
        yield
        undo.pop_all()


def _require_finite(run: TrainingRun, loss: Tensor, step: Step, norms: Sequence[Tensor]) -> None:
    """Do nothing if the loss and all gradients are finite; ``norms`` are of those that are freed.

    Raises:
        NotFinite: They are not.
    """
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    gradients += norms
    if math.isfinite(loss) and math.isfinite(whole(get_total_norm(gradients))):
        return
    if math.isfinite(loss) and run.scaler.get_scale() > 1:
        return  # the step is left out, and the next ones have a smaller scale
    what = "a gradient" if math.isfinite(loss) else f"the loss ({float(loss)})"
    names = [printable(run.splits.train.samples[index].path) for index in step.indices]
    lower = run.recipe.train.resolved_lr / 10
    raise NotFinite(
        f"{what} is not finite, in epoch {run.progress.epoch + 1}, step {run.progress.step + 1} of "
        f"{run.steps_per_epoch}\nits images:\n" + itemise(names, _SHOWN),
        kind="train.not_finite",
        fix=f"{run.folder.resume_command} --lr {lower:g}",
    )


def _has_diverged(run: TrainingRun, scores: Scores | None) -> bool:
    """Return whether an epoch diverged, after which the run goes on from an earlier state.

    Raises:
        NotFinite: It happened before.
    """
    loss = scores.loss if scores else 0.0
    weights = dict(run.networks[-1].named_parameters())
    own = find_spoilt({name: own_part(weight) for name, weight in weights.items()})
    names = [*weights]
    (place,) = run.processes.largest(max(map(names.index, own), default=_NONE))
    spoilt = [] if place == _NONE else [names[place]]
    if math.isfinite(loss) and not spoilt:
        return False
    what = f"the weight {spoilt[0]}" if spoilt else f"the validation loss ({loss})"
    lower = run.recipe.train.resolved_lr / 10
    best = run.progress.find_best(run.recipe.train.monitor)
    kept = f"\nthe best so far, of epoch {best.epoch}, is in {run.folder.best}" if best else ""
    error = NotFinite(
        f"{what} is not finite after epoch {run.progress.epoch + 1}: the training diverged{kept}",
        kind="train.not_finite",
        fix=f"{run.folder.resume_command} --lr {lower:g}",
    )
    go_back_and_slow_down(run, error)
    return True


def _finish_epoch(run: TrainingRun, scores: Scores | None, seconds: float) -> None:
    progress = run.progress
    row = EpochRow(
        epoch=progress.epoch + 1,
        train_loss=progress.loss_sum / progress.images,
        val_loss=scores.loss if scores else None,
        val_top1=scores.top1 if scores else None,
        lr=progress.lr_factor * run.rate_at(progress.epoch, progress.step - 1),
        images_per_second=progress.images / progress.seconds,
        peak_bytes=peak_bytes(run),
        seconds=progress.seconds + seconds,
        gamma=read_gamma(run.model),
        val_macro_f1=scores.macro_f1 if scores else None,
        val_macro_recall=scores.macro_recall if scores else None,
        val_classes=len(scores.classes) - len(scores.uncovered) if scores else None,
    )
    if run.plan.measured_seconds is None and not run.head_only:
        run.plan = replace(run.plan, measured_seconds=1 / row.images_per_second)
        write_plan(run)
    progress.finish_epoch(row)
    save(run)
    run.listener.finish_epoch(row, run.recipe.train.epochs)


class _Report:
    """Tells the listener how far the run is, whenever it hears of further images."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self.start_over()

    def start_over(self) -> None:
        """Begin to count where the run is now."""
        progress, train = self._run.progress, self._run.recipe.train
        images = len(self._run.splits.train.samples)
        self._done, self._total = 0, (train.epochs - progress.epoch) * images - progress.images

    def __call__(self, further: int, doing: str = "") -> None:
        self._done += further
        progress, parts = self._run.progress, [doing] if doing else []
        if progress.images:
            parts.append(f"loss {progress.loss_sum / progress.images:.3f}")
            parts.append(f"{progress.images / progress.seconds:.1f} images/s")
        parts.append(f"peak {format_bytes(peak_bytes(self._run))}")
        text = " · ".join([f"epoch {progress.epoch + 1}/{self._run.recipe.train.epochs}", *parts])
        self._run.listener.advance("training", self._done, self._total, text)
