"""The training loop: gradients of micro-batches add up to a step, steps to an epoch."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.folder import Splits, printable
from momconv.data.transforms import training_transform
from momconv.errors import MomconvError, ResourceError
from momconv.evaluation import Scores, evaluate
from momconv.files import model_file
from momconv.files.atomic import write_text
from momconv.planner.measurement import autocast, measure, static_bytes
from momconv.planner.micro_batch import count_steps
from momconv.planner.search import has_batch_norm
from momconv.recipe import Recipe
from momconv.training.annealing import anneal
from momconv.training.averaging import Average
from momconv.training.batches import MicroBatches, split_batch, split_epoch
from momconv.training.compilation import compiling, uncompiled
from momconv.training.interruption import Interrupted, catching_signals
from momconv.training.mixing import Mixer, Part
from momconv.training.network import read_gamma, start_training
from momconv.training.optimisation import rate_at, set_rate
from momconv.training.planning import BatchPlan
from momconv.training.progress import EpochRow, Halving, Listener, Progress
from momconv.training.run_folder import RunFolder
from momconv.training.scaling import make_scaler, read_scaler, restore_scaler
from momconv.training.state import read_random_states, save_state, set_random_states
from momconv.training.stopping import has_stalled
from momconv.units import format_bytes
from momconv.zoo.description import describe

_EVALUATION_BATCH = 32
_SHOWN = 5  # files that an error names


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
    average: Average | None = field(init=False)
    scaler: GradScaler = field(init=False)

    def __post_init__(self) -> None:
        decay = self.recipe.train.ema
        self.average = Average(self.model, decay) if decay else None
        self.scaler = make_scaler(self.plan.setting.precision, self.device)

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


def train(job: Job, progress: Progress) -> None:
    """Train up to the recipe's last epoch, from wherever ``progress`` is.

    However this ends, the folder then holds the state after the last whole optimisation step.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        MomconvError: The loss or a gradient is not finite.
        DataError: An image cannot be decoded any more.
        ResourceError: Memory or disk is exhausted.
    """
    steps, report = _Steps(job), _Report(job, progress)
    with (
        catching_signals(job.listener.tell) as check,
        _saving_on_failure(job, progress),
        compiling(job.model, wanted=job.recipe.train.compile),
    ):
        while not _is_done(job, progress):
            start_training(job.model, job.recipe.train)
            _reset_peak(job.device)
            began = time.perf_counter()
            for step in steps.read(progress.epoch, first=progress.step):
                loss = _add_up(job, progress, step, report, check)
                if loss is None:
                    _halve(job, progress)
                    break
                _take_step(job, progress)
                progress.count_step(step.images, float(loss), time.perf_counter() - began)
                _note_peak(job)
                done = progress.epoch + progress.step / job.steps_per_epoch
                for network in job.networks:
                    anneal(network, job.recipe.momentum, done)
                began = time.perf_counter()
            else:
                scores = _validate(job, report, check)
                _finish_epoch(job, progress, scores, time.perf_counter() - began)


def _is_done(job: Job, progress: Progress) -> bool:
    train = job.recipe.train
    if progress.epoch < train.epochs and has_stalled(progress.history, train):
        job.listener.tell(
            f"note: stopped after {progress.epoch} of {train.epochs} epochs, the last "
            f"{train.patience} of them without a better top-1 (train.patience)"
        )
        return True
    return progress.epoch >= train.epochs


def _add_up(
    job: Job, progress: Progress, step: "_Step", report: "_Report", check: Callable[[], None]
) -> Tensor | None:
    """Add up the gradients of a step; its loss, or None if memory ran out and nothing changed."""
    loss, done = torch.zeros((), device=job.device), 0
    try:
        with _all_or_nothing(job.model):
            for images, labels in step.parts:
                share = len(labels) / step.images
                if job.plan.measured_bytes is None and job.device.type == "cpu":
                    loss += _measure_gradients(job, images, labels, share)
                else:
                    loss += add_gradients(job, images, labels, share)
                done += len(labels)
                report(len(labels))
                check()
            job.scaler.unscale_(job.optimizer)
            _require_finite(job, progress, loss, step)
    except torch.OutOfMemoryError:
        report(-done)
        return None
    return loss


def add_gradients(job: Job, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """Add the gradients of a micro-batch that is ``share`` of its batch; its part of the loss.

    The parts' losses, weighted so, sum to the mean loss over the batch, whatever their sizes.

    Raises:
        torch.OutOfMemoryError: The micro-batch does not fit the GPU.
    """
    images = images.to(job.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(job.device, non_blocking=True)
    with autocast(job.plan.setting.precision, job.device):
        outputs = job.model(images)
        smoothing = job.recipe.train.label_smoothing
        loss = share * F.cross_entropy(outputs, labels, label_smoothing=smoothing)
        job.scaler.scale(loss).backward()
    return loss.detach()


def _take_step(job: Job, progress: Progress) -> None:
    """Change the weights by the gradients that have been added up."""
    set_rate(job.optimizer, job.rate_at(progress.epoch, progress.step))
    if (clip := job.recipe.train.clip) is not None:
        clip_grad_norm_(job.model.parameters(), clip)
    job.scaler.step(job.optimizer)  # not where a gradient is too large for fp16
    job.scaler.update()
    job.optimizer.zero_grad()
    if job.average:
        job.average.update(job.model)


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
    train = job.recipe.train
    static = static_bytes(job.model, train.optimizer, ema=train.ema > 0)
    _learn_peak(job, static.total + images.nbytes + labels.nbytes + usage.peak_bytes)
    if train.memory is not None and job.plan.is_exceeded:
        raise torch.OutOfMemoryError(f"above the limit of {train.memory}")
    return losses[0]


def _note_peak(job: Job) -> None:
    """On a GPU, let the plan learn the peak of the first whole step."""
    if job.device.type == "cuda" and job.plan.measured_bytes is None:
        _learn_peak(job, torch.cuda.max_memory_allocated(job.device))


def _learn_peak(job: Job, measured_bytes: int) -> None:
    job.plan = replace(job.plan, measured_bytes=measured_bytes)
    write_text(job.folder.plan, job.plan.to_json())


def _halve(job: Job, progress: Progress) -> None:
    """Go on with smaller micro-batches, at the step at which memory ran out.

    Raises:
        ResourceError: There are no smaller ones.
    """
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    before = job.plan.micro_batch
    smaller = job.plan.halve(fewest=2 if has_batch_norm(job.model) else 1)
    if smaller is None:
        raise _out_of_memory(job)
    job.plan = smaller
    progress.halvings.append(Halving(progress.epoch + 1, progress.step + 1, smaller.micro_batch))
    write_text(job.folder.plan, smaller.to_json())
    job.folder.write_history(progress)
    job.listener.tell(
        f"warning: {job.device} ran out of memory with micro-batches of {before}; epoch "
        f"{progress.epoch + 1}, step {progress.step + 1} is done again, with {smaller.micro_batch}"
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """The images of one optimisation step, their number and their micro-batches."""

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
        data = job.recipe.data
        transform = training_transform(preprocessing, level=data.augment, flip=data.flip)
        self._dataset = LabelledImages(images, transform, seed=job.recipe.train.seed)
        self._micro_batches = MicroBatches()
        self._mixer = Mixer(job.recipe.train, len(images.classes))
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
        micro_batch = self._job.plan.micro_batch
        self._micro_batches.steps = [
            self._mixer.extend(split_batch(batch, micro_batch)) for batch in batches
        ]
        parts = read_batches(self._loader)
        for step, batch in enumerate(batches):
            own = itertools.islice(parts, len(self._micro_batches.steps[step]))
            yield _Step(batch, self._mixer.mix(own, epoch=epoch, step=first + step))


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


@contextmanager
def _saving_on_failure(job: Job, progress: Progress) -> Iterator[None]:
    try:
        yield
    except (Interrupted, MomconvError):
        _save(job, progress)
        raise


def _require_finite(job: Job, progress: Progress, loss: Tensor, step: _Step) -> None:
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    if math.isfinite(loss) and math.isfinite(get_total_norm(gradients)):
        return
    if math.isfinite(loss) and job.scaler.get_scale() > 1:
        return  # the step is left out, and the next ones have a smaller scale
    what = "a gradient" if math.isfinite(loss) else f"the loss ({float(loss)})"
    names = [printable(job.splits.train.samples[index].path) for index in step.indices]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    lower = job.recipe.train.resolved_lr / 10
    raise MomconvError(
        f"{what} is not finite, in epoch {progress.epoch + 1}, step {progress.step + 1} of "
        f"{job.steps_per_epoch}; the state before it is saved\nits images:\n"
        + "\n".join(f"  {name}" for name in [*names[:_SHOWN], *more]),
        kind="train.not_finite",
        fix=f"{job.folder.resume_command} --lr {lower:g}",
    )


def _validate(job: Job, report: "_Report", check: Callable[[], None]) -> Scores | None:
    """The scores on the held-out images; None without any.

    Without gradients an image needs less than in training, so the micro-batch fits here too.
    """
    if not job.splits.val.samples:
        return None

    def progress(done: int, total: int) -> None:
        report(0, f"validating {done}/{total}")
        check()

    with uncompiled(wanted=job.recipe.train.compile):  # as in momconv eval
        return evaluate(
            job.networks[-1],
            job.splits.val,
            batch_size=min(_EVALUATION_BATCH, job.plan.micro_batch),
            device=job.device,
            workers=job.workers,
            progress=progress,
        )


def _finish_epoch(job: Job, progress: Progress, scores: Scores | None, seconds: float) -> None:
    row = EpochRow(
        epoch=progress.epoch + 1,
        train_loss=progress.loss_sum / progress.images,
        val_loss=scores.loss if scores else None,
        val_top1=scores.top1 if scores else None,
        lr=job.rate_at(progress.epoch, progress.step - 1),
        images_per_second=progress.images / progress.seconds,
        peak_bytes=_peak_bytes(job),
        seconds=progress.seconds + seconds,
        gamma=read_gamma(job.model),
    )
    progress.finish_epoch(row)
    if progress.best is row:
        _save_model(job, job.folder.best, progress)
    _save(job, progress)
    job.listener.finish_epoch(row, job.recipe.train.epochs)


def _save(job: Job, progress: Progress) -> None:
    """Write the state; then, for people, the model and the numbers."""
    save_state(job.folder.state, job.model, job.optimizer, progress, job.read_extras())
    _save_model(job, job.folder.last, progress)
    job.folder.write_history(progress)


def _save_model(job: Job, path: Path, progress: Progress) -> None:
    metrics = asdict(progress.history[-1]) if progress.history else None
    finished = {"epochs": progress.epoch, "steps": progress.step, "metrics": metrics}
    model_file.save(job.networks[-1], path, {"training": finished})


class _Report:
    """Tells the listener how far the run is, whenever it hears of further images."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress, self._done = job, progress, 0
        epochs, images = job.recipe.train.epochs, len(job.splits.train.samples)
        self._total = (epochs - progress.epoch) * images - progress.images

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


def _out_of_memory(job: Job) -> ResourceError:
    return ResourceError(
        f"{job.device} ran out of memory with micro-batches of {job.plan.micro_batch}, and there "
        "are no smaller ones; the state before it is saved",
        kind="memory.exhausted",
        fix=f"{job.folder.resume_command} with more --memory, or another --strategy",
    )
