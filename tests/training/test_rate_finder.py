import csv
import itertools
import math
from pathlib import Path

import pytest
import torch
from runs import Log, Signals, assert_same_tensors, small
from torch import Tensor

from momconv.errors import MomconvError, UsageError
from momconv.recipe import load_recipe
from momconv.training import rate_finder
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.run import TrainingRun
from momconv.training.steps import add_gradients, take_step


def test_the_rate_is_found_once_and_the_run_is_as_if_it_had_been_given(
    colours: Path, tmp_path: Path
) -> None:
    changes = ["train.epochs=1", "train.ema=0.5", "train.optimizer=adamw"]
    log, recipe = Log(), small(colours, *changes, "train.lr=auto")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(3))
    found = load_recipe(tmp_path / "run" / "config.yaml")
    assert isinstance(found.train.lr, float)
    with (tmp_path / "run" / "lr_finder.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == rate_finder.FEWEST  # as the run itself has 4 steps
    assert (float(points[0]["lr"]), float(points[-1]["lr"])) == pytest.approx((1e-7, 0.1))
    lowest = min(points, key=lambda point: float(point["smoothed"]))
    assert found.train.lr == pytest.approx(float(lowest["lr"]) / 10, rel=0.01)
    finetune(found, tmp_path / "run", resume=True, listener=log)
    assert not [shown for shown in log.shown if "learning rate" in shown[0]]

    given = small(colours, *changes, f"train.lr={found.train.lr}")
    finetune(given, tmp_path / "given")
    assert_same_tensors(tmp_path / "run", tmp_path / "given")
    with pytest.raises(UsageError, match=r"cannot change train.lr from .* to auto"):
        finetune(recipe, tmp_path / "run", resume=True)


def test_gradients_are_released_in_the_search_too_and_it_comes_to_the_same(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def watch(run: TrainingRun, lr: float) -> None:
        held.append(any(p.grad is not None for p in run.model.parameters()))
        take_step(run, lr)

    monkeypatch.setattr(rate_finder, "FEWEST", 3)
    monkeypatch.setattr(rate_finder, "take_step", watch)
    changes = ["train.epochs=1", "train.lr=auto", "train.micro_batch=auto", "train.batch_size=10"]
    for release in ("true", "false"):
        recipe = small(colours, *changes, f"train.release_gradients={release}")
        finetune(recipe, tmp_path / release)
    assert held == [False] * 3 + [True] * 3
    curves = [(tmp_path / name / "lr_finder.csv").read_text() for name in ("true", "false")]
    assert curves[0] == curves[1]


def test_a_loss_that_explodes_at_once_is_named(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_finder, "add_gradients", lambda *_: torch.tensor(math.nan))
    with pytest.raises(MomconvError, match="the loss explodes within 1 steps, at rates from 1e-05"):
        finetune(small(colours, "train.lr=auto"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_explodes_late_is_where_the_search_ends(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(run: TrainingRun, _x: Tensor, _y: Tensor, share: float) -> Tensor:
        return torch.tensor(share if run.optimizer.param_groups[0]["lr"] <= 0.02 else math.nan)

    monkeypatch.setattr(rate_finder, "add_gradients", explode)
    finetune(small(colours, "train.lr=auto", "train.epochs=1"), tmp_path / "run")
    with (tmp_path / "run" / "lr_finder.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert len(rates) < rate_finder.FEWEST
    assert rates[-2] <= 0.02 < rates[-1]  # whose step made the loss explode


def test_where_the_loss_falls_at_no_rate_the_default_stays(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.count(1)

    def rise(_run: TrainingRun, _x: Tensor, _y: Tensor, share: float) -> Tensor:
        return torch.tensor(share * (1 + next(losses) / 100))

    monkeypatch.setattr(rate_finder, "add_gradients", rise)
    log, recipe = Log(), small(colours, "train.lr=auto", "train.epochs=1")
    result = finetune(recipe, tmp_path / "run", listener=log)
    assert result.recipe.train.lr == recipe.train.resolved_lr
    assert [text for text in log.told if text.startswith("warning: the loss fell at no rate")]


def test_memory_that_runs_out_halves_the_parts(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def exhaust(run: TrainingRun, x: Tensor, y: Tensor, share: float) -> Tensor:
        if next(calls) == 2:
            raise MemoryError
        return add_gradients(run, x, y, share)

    monkeypatch.setattr(rate_finder, "add_gradients", exhaust)
    log = Log()
    recipe = small(colours, "train.lr=auto", "train.micro_batch=auto", "train.epochs=1")
    finetune(recipe, tmp_path / "run", listener=log)
    assert any("micro-batches of 5; epoch 1, step 1 is done again, with 2" in t for t in log.told)
