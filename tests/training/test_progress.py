import math
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Log, small

from momconv.errors import UsageError
from momconv.recipe import TrainRecipe, load_recipe
from momconv.training.finetuning import finetune
from momconv.training.progress import EpochRow, Progress, has_stalled
from momconv.vocabulary import Monitor


def row(epoch: int, top1: float | None) -> EpochRow:
    return EpochRow(epoch, 0.5, None if top1 is None else 0.5, top1, 0.1, 10.0, 2**20, 3.0)


def test_the_best_epoch_is_the_first_with_the_highest_top1() -> None:
    assert Progress().find_best("val/top1") is None
    rows = [row(1, 0.5), row(2, 0.75), row(3, 0.75), row(4, 0.25)]
    assert Progress(rows).find_best("val/top1") is rows[1]


@pytest.mark.parametrize(("monitor", "best"), [("val/macro_f1", 3), ("val/loss", 2)])
def test_another_figure_may_say_which_epoch_is_best(monitor: Monitor, best: int) -> None:
    rows = [row(1, 0.9), replace(row(2, 0.5), val_loss=0.1), row(3, 0.5)]
    rows = [replace(each, val_macro_f1=0.1 * each.epoch) for each in rows]
    rows.append(replace(row(4, 0.8), val_loss=math.nan, val_macro_f1=math.nan))
    found = Progress(rows).find_best(monitor)
    assert found is not None
    assert found.epoch == best


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("monitor", ["val/top1", "val/macro_f1", "val/loss"])
def test_an_epoch_that_diverged_is_never_the_best(monitor: Monitor, loss: float) -> None:
    rows = [replace(row(1, 0.1), val_macro_f1=0.1), replace(row(2, 0.9), val_macro_f1=0.9)]
    rows[1] = replace(rows[1], val_loss=loss)
    assert Progress(rows).find_best(monitor) is rows[0]


def test_while_gamma_changes_the_last_epoch_is_the_best() -> None:
    rows = [replace(row(1, 0.75), gamma=0.5), *(replace(row(2, 0.5), gamma=g) for g in (0.9, 0.9))]
    assert Progress(rows[:2]).find_best("val/top1") is rows[1]
    assert Progress(rows).find_best("val/top1") is rows[1]


def test_without_validation_the_last_epoch_is_the_best() -> None:
    rows = [row(1, None), row(2, None)]
    assert Progress(rows).find_best("val/top1") is rows[1]


def test_an_epoch_that_ends_leaves_counters_at_zero() -> None:
    progress = Progress()
    progress.count_step(images=4, loss=0.5, seconds=2)
    progress.count_step(images=2, loss=2.0, seconds=1)
    assert (progress.step, progress.images, progress.loss_sum, progress.seconds) == (2, 6, 6, 3)
    progress.finish_epoch(row(1, 0.5))
    assert progress == Progress([row(1, 0.5)])
    assert progress.epoch == 1


def test_an_epoch_whose_model_is_lost_is_not_the_best() -> None:
    rows = [row(1, 0.9), row(2, 0.5), row(3, 0.7)]
    assert Progress(rows, lost=1).find_best("val/top1") is rows[2]
    assert Progress(rows, lost=3).find_best("val/top1") is None
    assert Progress([row(1, None)], lost=1).find_best("val/top1") is None


def history(*scores: float, gammas: tuple[float, ...] = ()) -> list[EpochRow]:
    found = gammas or (0.9,) * len(scores)
    return [
        EpochRow(n, 1.0, 1.0, score, 0.1, 1.0, 1, 1.0, gamma)
        for n, (score, gamma) in enumerate(zip(scores, found, strict=True), start=1)
    ]


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "expected"),
    [
        ((), 1, 0.0, False),
        ((0.5,), 1, 0.0, False),
        ((0.5, 0.5), 1, 0.0, True),
        ((0.5, 0.4), 2, 0.0, False),
        ((0.5, 0.4, 0.45), 2, 0.0, True),
        ((0.5, 0.4, 0.51), 2, 0.0, False),
        ((0.5, 0.4, 0.51), 2, 0.02, True),
        ((0.5, 0.51, 0.525), 2, 0.02, False),
        ((0.5, 0.4, 0.3, 0.2), None, 0.0, False),
    ],
)
def test_a_run_has_stalled_after_epochs_of_patience(
    scores: tuple[float, ...], patience: int | None, min_delta: float, expected: bool
) -> None:
    recipe = TrainRecipe(patience=patience, min_delta=min_delta)
    assert has_stalled(history(*scores), recipe) is expected


def test_patience_waits_for_what_is_monitored() -> None:
    rows = [replace(row, val_loss=1 / row.epoch) for row in history(0.5, 0.4, 0.3)]
    assert has_stalled(rows, TrainRecipe(patience=2))
    assert not has_stalled(rows, TrainRecipe(patience=2, monitor="val/loss"))
    assert has_stalled(rows, TrainRecipe(patience=2, monitor="val/loss", min_delta=1))


def test_epochs_with_another_gamma_do_not_count() -> None:
    recipe = TrainRecipe(patience=1)
    assert not has_stalled(history(0.9, 0.5, 0.4, gammas=(0.1, 0.5, 0.9)), recipe)
    assert has_stalled(history(0.9, 0.5, 0.4, gammas=(0.1, 0.9, 0.9)), recipe)


def test_a_run_stops_early_says_so_and_can_be_made_to_go_on(colours: Path, tmp_path: Path) -> None:
    log = Log()
    changes = ["train.patience=1", "train.min_delta=1", "train.epochs=3", "train.schedule=constant"]
    result = finetune(small(colours, *changes), tmp_path / "run", listener=log)
    assert result.epochs == 2
    (told,) = [text for text in log.told if "stopped" in text]
    assert told.startswith("note: stopped after 2 of 3 epochs, the last 1 of them without")
    recipe = load_recipe(tmp_path / "run" / "config.yaml", ["train.patience=null"])
    assert finetune(recipe, tmp_path / "run", resume=True).epochs == 3


def test_patience_needs_held_out_images(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without held-out images nothing says when to stop"):
        finetune(small(colours, "train.patience=1", "data.val_frac=0"), tmp_path / "run")
    finetune(small(colours, "data.val_frac=0", "train.epochs=1"), tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "config.yaml", ["train.patience=1", "train.epochs=3"])
    with pytest.raises(UsageError, match="without held-out images nothing says when to stop"):
        finetune(recipe, tmp_path / "run", resume=True)
