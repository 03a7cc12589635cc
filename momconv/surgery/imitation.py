"""Training a converted network, the student, to compute what its original, the teacher, computes.

No label is needed. The loss is the teacher's logits' divergence from the student's, KL(p ‖ q), plus
the mean over the momentum stages of ‖x − x'‖² / ‖x' − mean x'‖², where x' is the stage's output in
the teacher. BatchNorm uses its running statistics throughout, in both networks, and dropout is off:
the student learns to agree where it is going to be used, whatever the size of a batch.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Adam

from momconv.exhaustion import Parts, naming_exhaustion
from momconv.momentum.ranging import retrying
from momconv.momentum.sequential import MomentumSequential, Run, momentum_stages
from momconv.states import in_eval_mode
from momconv.surgery.stem import leave_stem
from momconv.units import format_duration

OnStep = Callable[[int, int, str], None]
Portion = tuple[Tensor, float]  # images, and which share of the work is done before them

CHUNK, _SMALLEST_CHUNK = 50, 8  # images of a step
_HELD_OUT = 5  # one image in so many
_HELD_OUT_BATCHES = 8  # in which some are held out; they stay in memory
_CHECK = 25  # steps between two looks at the images held out
_WARM_UP = 10  # steps
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Imitation:
    """How far a student came.

    Attributes:
        steps: How many it was trained for.
        before: Mean KL(teacher ‖ student) of the logits, in nats, on the images held out.
        after: The same at the end. It is never larger than ``before``.
        interrupted: Whether it was ended early by a KeyboardInterrupt.
    """

    steps: int
    before: float
    after: float
    interrupted: bool


class Images:
    """Batches that are read again and again, a part of which is held out.

    Attributes:
        held_out: One image in five of the first eight batches.
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.held_out: list[Tensor] = []
        self._counts: list[int] = []  # of the others, in each batch
        self._batches = batches
        self._generator = torch.Generator().manual_seed(0)
        for number, batch in enumerate(batches):
            kept = _kept(number, batch)
            if kept < len(batch):
                self.held_out.append(batch[kept:].clone())
            self._counts.append(kept)

    @property
    def count(self) -> int:
        """How many are not held out."""
        return sum(self._counts)

    def find_chunk(self, steps: int) -> int:
        """Return how many images a step takes, so that a pass has about so many steps."""
        return min(CHUNK, max(_SMALLEST_CHUNK, self.count // steps))

    def count_steps(self, chunk: int = CHUNK) -> int:
        """Return how many steps it takes to see all images that are not held out."""
        return sum(math.ceil(count / chunk) for count in self._counts)

    def read(self, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Yield the images of one step after the other, in an order that depends on the pass."""
        for number, batch in enumerate(self._batches):
            order = torch.randperm(_kept(number, batch), generator=self._generator)
            for indices in order.chunk(math.ceil(len(order) / chunk)):
                yield batch[indices]


def _kept(number: int, batch: Tensor) -> int:
    """Return how many images of a batch are for training; the others are held out."""
    return len(batch) - (len(batch) // _HELD_OUT if number < _HELD_OUT_BATCHES else 0)


def imitate(
    student: nn.Module,
    teacher: nn.Module,
    groups: Sequence[tuple[list[nn.Parameter], float]],
    steps: Iterable[Portion],
    held_out: Sequence[Tensor],
    trial: float = math.inf,
) -> Imitation:
    """Train the parameters in ``groups``, of a learning rate each, on the images of ``steps``.

    However this ends, by an exception or a KeyboardInterrupt too, the student then has the values
    with which it was clearly closest to the teacher on the images held out: at the beginning, after
    every 25 steps or at the end. A KeyboardInterrupt, which ``steps`` may raise, goes no further.
    If it is no closer after so many steps of ``trial``, or 25, that is the end.
    """
    done, interrupted, parts = 0, False, Parts()
    trial = max(trial, _CHECK)
    with in_eval_mode(student, teacher), _training_only(student, groups), ExitStack() as undo:
        best = _Best(_Pair(student, teacher, held_out), [p for group, _ in groups for p in group])
        undo.callback(best.restore)
        optimizer = Adam([{"params": group, "lr": rate, "peak": rate} for group, rate in groups])
        try:
            for images, share in steps:
                for settings in optimizer.param_groups:
                    settings["lr"] = settings["peak"] * _share_of_rate(done, share)
                parts.work(partial(_add_gradients, optimizer, best.pair), images)
                with naming_exhaustion():
                    optimizer.step()
                done += 1
                if done % _CHECK == 0 or done == trial:
                    best.look()
                if done == trial and best.divergence == best.first:
                    break
            best.look()
        except KeyboardInterrupt:
            leave_stem(student)
            interrupted = True
    return Imitation(done, best.first, best.divergence, interrupted)


def _add_gradients(optimizer: Adam, pair: "_Pair", parts: Sequence[Tensor]) -> None:
    """Add the gradients of the loss on all ``parts``, each with variances of its own."""
    optimizer.zero_grad()
    total = sum(map(len, parts))
    for images in parts:
        (retrying(partial(pair.loss, images)) * (len(images) / total)).backward()


def _share_of_rate(step: int, share: float) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * share)) / 2


class _Pair:
    """The student and the teacher side by side."""

    def __init__(self, student: nn.Module, teacher: nn.Module, held_out: Sequence[Tensor]) -> None:
        self._student, self._teacher = student, teacher
        self._stages = list(momentum_stages(student))
        self._device = next(student.parameters()).device
        self._held_out = held_out
        self._parts = Parts()
        self._targets = [self._run(teacher, batch) for batch in held_out]

    @torch.no_grad()
    def _run(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of ``images``, which where memory is short are computed in parts."""
        return self._parts.forward(model, images, self._device)

    def loss(self, images: Tensor) -> Tensor:
        """Return the loss that the head of this module describes."""
        images = images.to(self._device)
        with torch.no_grad():
            logits, features = _trace(self._teacher, self._stages, images)
        own_logits, own_features = _trace(self._student, self._stages, images)
        loss = _divergences(own_logits, logits).mean()
        for own, other in zip(own_features, features, strict=True):
            variance = other.var(correction=0).clamp_min(1e-12)
            loss = loss + F.mse_loss(own, other) / variance / len(features)
        return loss

    @torch.no_grad()
    def divergences(self) -> Tensor:
        """Return KL(teacher ‖ student) of each image that is held out, in nats."""
        pairs = zip(self._held_out, self._targets, strict=True)
        each = [_divergences(self._run(self._student, batch), target) for batch, target in pairs]
        return torch.cat(each).double()


def measure_divergence(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the mean KL(teacher ‖ student) of the logits, in nats."""
    with in_eval_mode(student, teacher):
        return _Pair(student, teacher, batches).divergences().mean().item()


def _divergences(logits: Tensor, target: Tensor) -> Tensor:
    p, q = F.log_softmax(target.float(), 1), F.log_softmax(logits.float(), 1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


def _trace(model: nn.Module, stages: Sequence[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and what came out of ``stages``."""
    features: list[Tensor] = []
    with ExitStack() as hooks:
        for name in stages:
            stage = model.get_submodule(name)
            last = stage[-1] if isinstance(stage, nn.ModuleList) else stage  # a list is not called
            hook = last.register_forward_hook(lambda _, __, output: features.append(output))
            hooks.callback(hook.remove)
        logits: Tensor = model(images)
    return logits, features


class _Best:
    """The values of the parameters with which the student was closest to the teacher."""

    def __init__(self, pair: _Pair, parameters: Sequence[nn.Parameter]) -> None:
        self.pair, self._parameters = pair, parameters
        self._divergences = pair.divergences()
        self.first = self.divergence
        self._values = [parameter.detach().clone() for parameter in parameters]

    @property
    def divergence(self) -> float:
        """The mean KL(teacher ‖ student) on the images held out, in nats."""
        return self._divergences.mean().item()

    def look(self) -> None:
        """Remember the present values if they are better. What is not a number is not better.

        A few images held out would take chance for progress: their mean gain has to be more than
        its standard error.
        """
        divergences = self.pair.divergences()
        gains = self._divergences - divergences
        if gains.mean() > gains.std(correction=0) / math.sqrt(len(gains)):
            self._values = [parameter.detach().clone() for parameter in self._parameters]
            self._divergences = divergences

    @torch.no_grad()
    def restore(self) -> None:
        """Restore those values."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)


@contextmanager
def _training_only(
    student: nn.Module, groups: Sequence[tuple[list[nn.Parameter], float]]
) -> Iterator[None]:
    """Inside, the parameters in ``groups`` alone get gradients; afterwards all are as before."""
    wanted = {id(parameter) for group, _ in groups for parameter in group}
    before = [(p, p.requires_grad, p.grad) for p in student.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def trainable_gains(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Give parameters, 1 at first, that multiply the gains of all runs, and end up in them.

    f(x) = block(x) − x is scaled in a forward hook, so that the gradient comes by itself.
    """
    device = next(model.parameters()).device
    factors: dict[nn.Module, nn.Parameter] = {}  # one for a block that is used several times
    stages = [stage for stage in momentum_stages(model).values() if stage.gamma]
    with ExitStack() as hooks:
        for stage in stages:
            for run in stage.runs or ():
                for block in _members(stage, run):
                    if block not in factors:
                        factors[block] = nn.Parameter(torch.ones((), device=device))
                        hook = block.register_forward_hook(_scaling(factors[block]))
                        hooks.callback(hook.remove)
        hooks.callback(_fold, stages, factors)
        yield [*factors.values()]


def _members(stage: MomentumSequential, run: Run) -> list[nn.Module]:
    return [stage[n] for n in range(run.start, run.stop)]


def _scaling(factor: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, inputs, output: torch.lerp(inputs[0], output, factor)


def _fold(stages: Sequence[MomentumSequential], factors: Mapping[nn.Module, Tensor]) -> None:
    values = {block: factor.item() for block, factor in factors.items()}
    for stage in stages:
        runs = []
        for run in stage.runs or ():
            blocks = zip(run.gains, _members(stage, run), strict=True)
            runs.append(replace(run, gains=tuple(gain * values[block] for gain, block in blocks)))
        stage.runs = tuple(runs)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return scale and shift of every normalisation layer."""
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]


class Schedule:
    """How far the work of ``total`` steps is, which ``progress`` hears of."""

    def __init__(self, total: int, progress: OnStep | None, minutes: float | None = None) -> None:
        self.total = total
        self._progress = progress
        self._seconds = math.inf if minutes is None else max(1e-9, 60 * minutes)
        self._began = time.monotonic()

    def share(self, done: int) -> float:
        """Return the share of the work that is done after so many steps; 1 if the time is over."""
        elapsed = time.monotonic() - self._began
        share = min(1.0, max(done / self.total, elapsed / self._seconds))
        if self._progress:
            left = f"{format_duration(elapsed * (1 - share) / share)} left" if done else ""
            self._progress(done, self.total, left)
        return share


def read_repeatedly(images: Images, schedule: Schedule, chunk: int) -> Iterator[Portion]:
    """Yield ``chunk`` images for each step, in as many passes as it takes."""
    chunks = chain.from_iterable(images.read(chunk) for _ in count())
    for done, few in enumerate(chunks):
        share = schedule.share(done)
        if share == 1:
            return
        yield few, share
