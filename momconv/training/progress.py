"""How far a run is, whether it still gets better, and who hears about it."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from momconv.data.source import Splits
from momconv.errors import UsageError
from momconv.recipe import Recipe, TrainRecipe
from momconv.vocabulary import Monitor

SplitName = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class EpochRow:
    """What one epoch came to: a line of metrics.csv and of events.jsonl."""

    epoch: int  # from 1
    train_loss: float
    val_loss: float | None  # None where nothing is held out
    val_top1: float | None  # a fraction
    lr: float  # of the last step
    images_per_second: float  # while training
    peak_bytes: int  # of the epoch on a GPU, of the first step on the CPU
    seconds: float  # with validation
    gamma: float = 0.0  # at its end; 0 in a plain network
    val_macro_f1: float | None = None  # the mean over the classes
    val_macro_recall: float | None = None  # the same; also called balanced accuracy
    val_classes: int | None = None  # those that have held-out images, which the figures cover

    def judge(self, monitor: Monitor) -> float:
        """Return how good the epoch is, the higher the better; −∞ where nothing says so.

        That is also so where the loss is not finite, whatever else is measured.
        """
        loss = None if self.val_loss is None else -self.val_loss
        figures = {"val/top1": self.val_top1, "val/macro_f1": self.val_macro_f1, "val/loss": loss}
        figure = figures[monitor]
        if figure is None or not math.isfinite(figure + (self.val_loss or 0)):
            return -math.inf
        return figure


@dataclass(frozen=True, slots=True)
class Halving:
    """Memory ran out, and micro-batches became smaller."""

    epoch: int  # from 1, as the step
    step: int
    micro_batch: int  # from there on


@dataclass(frozen=True, slots=True)
class Rollback:
    """Something was not finite, and the run went back to its last saved state."""

    epoch: int  # from 1, as the step
    step: int


@dataclass(frozen=True, slots=True)
class Omission:
    """An image could not be read any more, and the run went on without it."""

    epoch: int  # from 1, as the step
    step: int | None  # None while validating
    split: SplitName
    image: int  # its number in split.json, from 0
    path: str  # as momconv.names writes it
    returned: bool = False  # whether it could be read again when the run was resumed


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """What a linear classifier on the network's features came to, before anything was trained."""

    top1: float  # a fraction
    interval: tuple[float, float]  # of the top-1, 95 % (Wilson)
    n: int  # held-out images, which it was scored on
    images: int  # that it was fitted on
    penalty: float  # its strength, see momconv.training.probing.fit
    seconds: float


@dataclass(slots=True)
class Progress:
    """The counters of a run. Together with weights and optimiser they are its whole state."""

    history: list[EpochRow] = field(default_factory=list)
    step: int = 0  # finished optimisation steps of the epoch under way
    images: int = 0  # in them
    loss_sum: float = 0.0  # over those images
    seconds: float = 0.0  # spent on them
    halvings: list[Halving] = field(default_factory=list)
    rollbacks: list[Rollback] = field(default_factory=list)
    omissions: list[Omission] = field(default_factory=list)
    lost: int = 0  # the last epoch whose model can no longer be had, should it be the best
    probe: ProbeScore | None = None  # the baseline, if one was asked for
    lr_factor: float = 1.0  # of the recipe's learning rate: a rollback halves it

    @property
    def epoch(self) -> int:
        """The finished epochs."""
        return len(self.history)

    def find_best(self, monitor: Monitor) -> EpochRow | None:
        """Return the first epoch that ``monitor`` finds best; without validation, the last one.

        While γ changes this is the last one too: the others scored another network. An epoch whose
        model is lost is none of them.
        """
        rows = self.history[self.lost :]
        if not rows or rows[-1].val_top1 is None:
            return rows[-1] if rows else None
        same = [row for row in rows if row.gamma == rows[-1].gamma]
        return max(same, key=lambda row: row.judge(monitor))

    def left_out(self, split: SplitName) -> set[int]:
        """Return the numbers of the images of the ``split`` that the run goes on without."""
        return {o.image for o in self.omissions if o.split == split and not o.returned}

    def take_back(self, split: SplitName, images: Collection[int]) -> None:
        """Go on with the images of the ``split`` that have these numbers again."""
        self.omissions = [
            replace(o, returned=True) if o.split == split and o.image in images else o
            for o in self.omissions
        ]

    def count_step(self, images: int, loss: float, seconds: float) -> None:
        """Count one optimisation step on so many images with this mean ``loss``."""
        self.step += 1
        self.images += images
        self.loss_sum += loss * images
        self.seconds += seconds

    def go_back(self, earlier: "Progress") -> None:
        """Take the counters of an ``earlier`` moment; what went wrong since is not forgotten."""
        self.history, self.step, self.images = earlier.history, earlier.step, earlier.images
        self.loss_sum, self.seconds = earlier.loss_sum, earlier.seconds

    def finish_epoch(self, row: EpochRow) -> None:
        """Close the epoch under way."""
        self.history.append(row)
        self.step, self.images, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0


class Listener:
    """Hears how a run goes. This one ignores it all; a subclass overrides what it wants to show."""

    def tell(self, text: str) -> None:
        """Hear a message that begins with ``note:`` or ``warning:``."""

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        """Hear how far the work ``title`` is; when it starts over, or another starts, it ended."""

    def finish_epoch(self, row: EpochRow, epochs: int) -> None:
        """Hear that one of so many ``epochs`` ended."""


SILENT = Listener()


def has_stalled(history: Sequence[EpochRow], recipe: TrainRecipe) -> bool:
    """Return whether no epoch of the last ``patience`` was better by ``min_delta``.

    While γ changes nothing counts: earlier epochs scored another network.
    """
    if recipe.patience is None:
        return False
    best, waited = -math.inf, 0
    for row in (row for row in history if row.gamma == history[-1].gamma):
        if (figure := row.judge(recipe.monitor)) > best + recipe.min_delta:
            best, waited = figure, 0
        else:
            waited += 1
    return waited >= recipe.patience


def require_validation(recipe: Recipe, splits: Splits) -> None:
    """Do nothing unless patience would wait, or a probe ask, for scores that there are not.

    Raises:
        UsageError: It would.
    """
    if recipe.train.probe and not splits.val.samples:
        raise UsageError(
            "--probe: without held-out images nothing says how good it is",
            kind="usage.no_validation",
            fix="--val-frac 0.2",
        )
    if recipe.train.patience is not None and not splits.val.samples:
        raise UsageError(
            "train.patience: without held-out images nothing says when to stop",
            kind="usage.no_validation",
            fix="--val-frac 0.2\n--set train.patience=null",
        )
