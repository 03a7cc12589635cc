from dataclasses import replace
from pathlib import Path

import pytest
from runs import Log, small

from momconv.errors import UsageError
from momconv.recipe import TrainRecipe, load_recipe
from momconv.training.finetuning import finetune
from momconv.training.progress import EpochRow
from momconv.training.stopping import has_stalled


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
