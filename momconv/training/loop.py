"""The training loop: gradients of micro-batches add up to a step, steps to an epoch."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.folder import printable
from momconv.data.transforms import training_transform
from momconv.errors import ResourceError
from momconv.evaluation import Scores, evaluate
from momconv.planner.measurement import measure, static_bytes
from momconv.planner.search import has_batch_norm
from momconv.training.annealing import anneal
from momconv.training.batches import MicroBatches, split_batch, split_epoch
from momconv.training.interruption import Interrupted, TimeUp, catching_signals
from momconv.training.job import Job
from momconv.training.network import read_gamma, start_training
from momconv.training.optimisation import set_rate
from momconv.training.progress import EpochRow, Halving, Progress
from momconv.training.saving import (
    Autosave,
    HalfDone,
    NotFinite,
    go_back,
    go_back_and_slow_down,
    save,
    saving_on_failure,
    write_plan,
)
from momconv.training.state import read_random_states, set_random_states
from momconv.units import format_bytes
from momconv.zoo.description import describe

_SHOWN = 5  # files that an error names
Part = tuple[Tensor, Tensor]  # the images and labels of a micro-batch


def train(job: Job, progress: Progress) -> None:
    """Train up to the recipe's last epoch, from wherever ``progress`` is.

    However this ends, the folder then holds the state after the last whole optimisation step.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        TimeUp: The time limit is reached.
        MomconvError: The loss or a gradient is not finite, again after a return to the last saved
            state, which is then the one that the folder holds.
        DataError: An image cannot be decoded any more.
        ResourceError: Memory or disk is exhausted.
    """
    steps, report, autosave = _Steps(job), _Report(job, progress), Autosave(job, progress)
    with catching_signals(job.listener.tell) as check, saving_on_failure(job, progress):
        while progress.epoch < job.recipe.train.epochs:
            start_training(job.model, freeze_bn=job.recipe.train.freeze_bn)
            _reset_peak(job.device)
            began = time.perf_counter()
            for step in steps.read(progress.epoch, first=progress.step):
                loss = _add_up(job, progress, step, report, check)
                if loss is None or not _step(job, progress):
                    report.start_over()
                    break
                progress.count_step(step.images, float(loss), time.perf_counter() - began)
                _note_peak(job)
                done = progress.epoch + progress.step / job.steps_per_epoch
                anneal(job.model, job.recipe.momentum, done)
                autosave()
                _stop_if_asked(job, check)
                began = time.perf_counter()
            else:
                scores = _validate(job, report, check)
                _finish_epoch(job, progress, scores, time.perf_counter() - began)
                if progress.epoch < job.recipe.train.epochs:
                    _stop_if_asked(job, check)


def _add_up(
    job: Job, progress: Progress, step: "_Step", report: "_Report", check: Callable[[], None]
) -> Tensor | None:
    """Add up the gradients of a step; its loss, or None if it cannot be.

    Then the run is to go on from wherever ``progress`` is, prepared not to fail again.
    """
    try:
        with _all_or_nothing(job.model):
            loss = _add_share(job, step, report, check)
            job.processes.add([loss])
            job.processes.add_gradients(job.model)
            _require_finite(job, progress, loss, step)
    except torch.OutOfMemoryError:
        _halve(job, progress)
        return None
    except NotFinite as error:
        go_back_and_slow_down(job, progress, error)
        return None
    return loss


def _add_share(job: Job, step: "_Step", report: "_Report", check: Callable[[], None]) -> Tensor:
    """Add up the gradients of this process's images of a step; their part of its loss.

    Raises:
        torch.OutOfMemoryError: In this process or in another one.
    """
    loss, left, exhausted = torch.zeros((), device=job.device), step.images, False
    try:
        for images, labels in step.parts:
            share = len(labels) / step.images
            if job.plan.measured_bytes is None and job.device.type == "cpu":
                loss += _measure_gradients(job, images, labels, share)
            else:
                loss += add_gradients(job, images, labels, share)
            left -= len(labels)
            report(len(labels))
            if job.processes.count == 1:  # several stop together, between two steps
                check()
    except torch.OutOfMemoryError:
        exhausted = True
    if any(job.processes.largest(exhausted)):
        raise torch.OutOfMemoryError
    if left:
        report(left)  # those of the other processes
    return loss


def _step(job: Job, progress: Progress) -> bool:
    """Change the weights. False if memory ran out: some may have changed, so the run went back.

    Raises:
        HalfDone: Memory ran out in one of several processes, which cannot go back by itself.
    """
    set_rate(job.optimizer, progress.lr_factor * job.rate_at(progress.epoch, progress.step))
    try:
        job.optimizer.step()
    except torch.OutOfMemoryError:
        if job.processes.count > 1:
            raise HalfDone(
                f"{job.device} ran out of memory while changing the weights; the state that was "
                "saved last is kept",
                kind="memory.exhausted",
                fix="resume with a smaller --micro-batch",
            ) from None
        go_back(job, progress)
        _halve(job, progress)
        return False
    job.optimizer.zero_grad()
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


def add_gradients(job: Job, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """Add the gradients of a micro-batch that is ``share`` of its batch; its part of the loss.

    The parts' losses, weighted so, sum to the mean loss over the batch, whatever their sizes.

    Raises:
        torch.OutOfMemoryError: The micro-batch does not fit the GPU.
    """
    layout = torch.channels_last if job.device.type == "cuda" else torch.contiguous_format
    images = images.to(job.device, non_blocking=True, memory_format=layout)
    labels = labels.to(job.device, non_blocking=True)
    half = job.plan.setting.precision == "bf16"
    with torch.autocast(job.device.type, torch.bfloat16, enabled=half):
        outputs = job.model(images)
        smoothing = job.recipe.train.label_smoothing
        loss = share * F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    loss.backward()
    return loss.detach()


# Memory


def _measure_gradients(job: Job, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """As ``add_gradients``, and the plan learns the peak.

    Raises:
        torch.OutOfMemoryError: The peak is above the limit that was asked for, which nothing else
            enforces on a CPU.
    """
    for parameter in job.model.parameters():
        if parameter.requires_grad:  # as in every micro-batch but the first
            parameter.grad = torch.zeros_like(parameter)
    losses: list[Tensor] = []
    work = partial(add_gradients, job, images, labels, share)
    usage = measure(lambda: losses.append(work()), job.device)
    static = static_bytes(job.model, job.recipe.train.optimizer)
    _learn_peak(job, static.total + images.nbytes + labels.nbytes + usage.peak_bytes)
    if job.recipe.train.memory is not None and job.plan.is_exceeded:
        raise torch.OutOfMemoryError(f"above the limit of {job.recipe.train.memory}")
    return losses[0]


def _note_peak(job: Job) -> None:
    """On a GPU, let the plan learn the peak of the first whole step."""
    if job.device.type == "cuda" and job.plan.measured_bytes is None:
        _learn_peak(job, torch.cuda.max_memory_allocated(job.device))


def _learn_peak(job: Job, measured_bytes: int) -> None:
    job.plan = replace(job.plan, measured_bytes=measured_bytes)
    write_plan(job)


def _halve(job: Job, progress: Progress) -> None:
    """Go on with smaller micro-batches, at the step at which memory ran out.

    Raises:
        ResourceError: There are no smaller ones.
    """
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    before = job.plan.micro_batch
    smaller = job.plan.halve(fewest=_fewest_images(job.model))
    if smaller is None:
        raise _out_of_memory(job, f"with micro-batches of {before}")
    job.plan = smaller
    progress.halvings.append(Halving(progress.epoch + 1, progress.step + 1, smaller.micro_batch))
    write_plan(job)
    if job.processes.leads:
        job.folder.write_history(progress)
    job.listener.tell(
        f"warning: {job.device} ran out of memory with micro-batches of {before}; epoch "
        f"{progress.epoch + 1}, step {progress.step + 1} is done again, with {smaller.micro_batch}"
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """The images of one optimisation step, their number, and this process's micro-batches."""

    indices: list[int]
    parts: Iterator[Part]

    @property
    def images(self) -> int:
        return len(self.indices)


class _Steps:
    """Reads the steps of an epoch, in the order that its number and the seed give."""

    def __init__(self, job: Job) -> None:
        images = job.splits.train
        preprocessing = describe(job.model).preprocessing
        transform = training_transform(preprocessing, flip=job.recipe.data.flip)
        self._dataset = LabelledImages(images, transform, seed=job.recipe.train.seed)
        self._micro_batches = MicroBatches()
        self._loader = make_loader(
            self._dataset,
            workers=job.workers,
            batch_sampler=self._micro_batches,
            persistent_workers=job.workers > 0,
            pin_memory=job.device.type == "cuda",
        )
        self._job, self._recipe = job, job.recipe.train

    def read(self, epoch: int, *, first: int) -> Iterator[_Step]:
        """The steps of ``epoch`` from its step ``first`` on. Each must be used up in turn."""
        batches = split_epoch(
            len(self._dataset), self._recipe.batch_size, seed=self._recipe.seed, epoch=epoch
        )[first:]
        self._dataset.set_epoch(epoch)
        micro_batch, fewest = self._job.plan.micro_batch, _fewest_images(self._job.model)
        shares = [self._job.processes.share(batch, fewest=fewest) for batch in batches]
        self._micro_batches.steps = [split_batch(share, micro_batch) for share in shares]
        parts = read_batches(self._loader)
        for batch, split in zip(batches, self._micro_batches.steps, strict=True):
            yield _Step(batch, itertools.islice(parts, len(split)))


def _fewest_images(model: nn.Module) -> int:
    """How many images ``model`` needs at once: BatchNorm may not be able to take one alone."""
    return 2 if has_batch_norm(model) else 1


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undoes what was done to ``model`` since the last step, if it comes to nothing.

    The weights do not change before the optimiser's step; gradients, BatchNorm's statistics and the
    random state do.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random_states = read_random_states()

    def restore() -> None:
        model.zero_grad()
        set_random_states(random_states)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    with ExitStack() as undo:
        undo.callback(restore)
        yield
        undo.pop_all()


def _require_finite(job: Job, progress: Progress, loss: Tensor, step: _Step) -> None:
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    if math.isfinite(loss) and math.isfinite(get_total_norm(gradients)):
        return
    what = "a gradient" if math.isfinite(loss) else f"the loss ({float(loss)})"
    names = [printable(job.splits.train.samples[index].path) for index in step.indices]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    lower = job.recipe.train.resolved_lr / 10
    raise NotFinite(
        f"{what} is not finite, in epoch {progress.epoch + 1}, step {progress.step + 1} of "
        f"{job.steps_per_epoch}\nits images:\n"
        + "\n".join(f"  {name}" for name in [*names[:_SHOWN], *more]),
        kind="train.not_finite",
        fix=f"{job.folder.resume_command} --lr {lower:g}",
    )


def _validate(job: Job, report: "_Report", check: Callable[[], None]) -> Scores | None:
    """The scores on the held-out images; None without any.

    Without gradients an image needs less than in training, so the micro-batch should fit here too.

    Raises:
        ResourceError: Not even one image does.
    """
    if not job.splits.val.samples:
        return None

    def progress(done: int, total: int) -> None:
        report(0, f"validating {done}/{total}")
        if job.processes.count == 1:
            check()

    while True:
        size = min(job.evaluation_batch, job.plan.micro_batch)
        try:
            with job.processes.noticing_losses():
                return evaluate(
                    job.model,
                    job.splits.val,
                    batch_size=size,
                    device=job.device,
                    workers=job.workers,
                    progress=progress,
                )
        except torch.OutOfMemoryError:
            if size == 1:
                raise _out_of_memory(job, "validating 1 image at a time") from None
            job.evaluation_batch = size // 2
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        job.listener.tell(
            f"warning: {job.device} ran out of memory while validating {size} images at once; it "
            f"is done again, with {size // 2}"
        )


def _finish_epoch(job: Job, progress: Progress, scores: Scores | None, seconds: float) -> None:
    row = EpochRow(
        epoch=progress.epoch + 1,
        train_loss=progress.loss_sum / progress.images,
        val_loss=scores.loss if scores else None,
        val_top1=scores.top1 if scores else None,
        lr=progress.lr_factor * job.rate_at(progress.epoch, progress.step - 1),
        images_per_second=progress.images / progress.seconds,
        peak_bytes=_peak_bytes(job),
        seconds=progress.seconds + seconds,
        gamma=read_gamma(job.model),
    )
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
        parts.append(f"peak {format_bytes(_peak_bytes(self._job))}")
        text = " · ".join([f"epoch {progress.epoch + 1}/{self._job.recipe.train.epochs}", *parts])
        self._job.listener.advance("training", self._done, self._total, text)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(job: Job) -> int:
    """The peak since the epoch began; on the CPU, where nobody counts, of the first step."""
    if job.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.device)
    return job.plan.measured_bytes or job.plan.predicted_bytes


def _out_of_memory(job: Job, doing: str) -> ResourceError:
    return ResourceError(
        f"{job.device} ran out of memory {doing}, and there are no smaller ones; the state before "
        "it is saved",
        kind="memory.exhausted",
        fix=f"{job.folder.resume_command} with more --memory, or another --strategy",
    )
