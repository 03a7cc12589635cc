import hashlib
import itertools
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Log, Signals, assert_same, read_metrics, resume, small
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from momconv.errors import DataError, MomconvError, ResourceError, UsageError
from momconv.evaluation import Scores, evaluate
from momconv.files import model_file
from momconv.momentum.sequential import momentum_stages
from momconv.planner.prediction import peak_memory
from momconv.recipe import load_recipe
from momconv.surgery.conversion import convert
from momconv.training import network, run
from momconv.training.finetuning import Result, finetune
from momconv.training.images import recall_images
from momconv.training.interruption import Interrupted, TimeUp
from momconv.training.progress import Listener
from momconv.training.run import TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state
from momconv.training.steps import take_step
from momconv.zoo.description import describe
from momconv.zoo.networks import build


@pytest.fixture(scope="module")
def straight(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run from start to end."""
    return finetune(small(colours), tmp_path_factory.mktemp("straight"))


# A run


def test_shared_memory_is_looked_at_before_the_first_step(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "count_workers_that_fit", lambda *_: 1)
    with pytest.raises(ResourceError, match="3 processes that read micro-batches of ") as refused:
        finetune(small(colours, "data.workers=3"), tmp_path / "run")
    assert refused.value.fix is not None
    assert refused.value.fix.startswith("--workers 1\n")
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_a_folder_with_all_that_it_came_to(straight: Result) -> None:
    assert {path.name for path in straight.folder.iterdir()} == {
        "best.safetensors",
        "config.yaml",
        "data-report.json",
        "events.jsonl",
        "last.safetensors",
        "metrics.csv",
        "plan.json",
        "run.json",
        "split.json",
        "state.previous.safetensors",
        "state.safetensors",
    }
    assert [row["epoch"] for row in read_metrics(straight.folder)] == ["1", "2"]
    assert straight.epochs == 2


def test_it_learns(straight: Result, colours: Path) -> None:
    first, second = (float(row["train_loss"]) for row in read_metrics(straight.folder))
    assert second < first
    assert straight.best_epoch.val_top1 is not None
    assert straight.best_epoch.val_top1 > 0.5


def test_the_best_model_has_the_classes_and_the_scores_of_its_epoch(straight: Result) -> None:
    model = model_file.load(straight.best)
    assert describe(model).classes == ("blue", "green", "red")
    assert momentum_stages(model)["layer1"].gamma == 0.9
    val = recall_images(RunFolder(straight.folder).split).val
    assert evaluate(model, val).top1 == straight.best_epoch.val_top1
    training = model_file.read_metadata(straight.best)["training"]
    assert training["metrics"]["val_top1"] == straight.best_epoch.val_top1


def test_the_data_folder_is_left_as_it_was(colours: Path, tmp_path: Path) -> None:
    def fingerprint() -> dict[Path, str]:
        files = [path for path in colours.rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = fingerprint()
    finetune(small(colours, "train.epochs=1"), tmp_path / "run")
    assert fingerprint() == before
    assert len(before) == 24


def test_the_recipe_in_the_folder_replays_the_run(straight: Result, tmp_path: Path) -> None:
    finetune(load_recipe(straight.folder / "config.yaml"), tmp_path / "again")
    assert_same(straight.folder, tmp_path / "again")


def test_neither_workers_nor_the_strategy_change_a_bit(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    changes = ["data.workers=1", "momentum.strategy=store"]
    finetune(small(colours, *changes), tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


def test_the_random_state_of_the_caller_stays(colours: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    finetune(small(colours, "train.epochs=1"), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_listener_hears_of_the_split_the_plan_the_progress_and_the_epochs(
    colours: Path, tmp_path: Path
) -> None:
    log = Log()
    finetune(small(colours, "train.micro_batch=auto"), tmp_path / "run", listener=log)
    assert log.told[0].startswith("note: no val/ folder; holding out 20% per class")
    assert log.told[1].startswith("note: batch of 5 in one micro-batch (store, fp32), ")
    training = [shown for shown in log.shown if shown[0] == "training"]
    assert training[0][1:3] == (5, 36)
    assert training[-1][1:3] == (36, 36)
    assert "epoch 2/2 · validating 6/6 · loss" in training[-1][3]
    assert "peak " in training[-1][3]
    assert [row.epoch for row in log.rows] == [1, 2]


def test_without_validation_the_last_model_is_the_best(colours: Path, tmp_path: Path) -> None:
    result = finetune(small(colours, "data.val_frac=0"), tmp_path / "run")
    assert (result.best_epoch.epoch, result.best_epoch.val_top1) == (2, None)
    best, last = load_file(result.best), load_file(result.last)
    assert all(torch.equal(value, last[key]) for key, value in best.items())


def test_a_fine_tuned_file_can_be_fine_tuned_again(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    """With the same classes it keeps its head, so that it starts where it was."""
    changes = [f"model.from_file={straight.best}", "train.epochs=1", "train.lr=1e-6"]
    result = finetune(small(colours, *changes), tmp_path / "run")
    assert result.best_epoch.val_top1 == straight.best_epoch.val_top1


def test_gamma_zero_is_the_plain_network(colours: Path, tmp_path: Path) -> None:
    changes = ["momentum.gamma=0", "train.epochs=1"]
    result = finetune(small(colours, *changes), tmp_path / "run")
    assert not network.read_gamma(model_file.load(result.last)) > 0


def test_a_network_that_momentum_does_not_help_stays_plain_and_says_so(
    colours: Path, tmp_path: Path
) -> None:
    log = Log()
    changes = ["model.name=resnet18", "data.resolution=32", "train.epochs=1"]
    result = finetune(small(colours, *changes), tmp_path / "run", listener=log)
    assert "stays plain; --set momentum.stages=all converts" in log.told[1]
    assert not network.read_gamma(model_file.load(result.last)) > 0


def test_the_resolution_of_the_run_is_that_of_its_models(colours: Path, tmp_path: Path) -> None:
    result = finetune(small(colours, "data.resolution=24", "train.epochs=1"), tmp_path / "run")
    assert describe(model_file.load(result.best)).preprocessing.resolution == 24


def test_a_used_folder_is_refused_before_anything_else(straight: Result, colours: Path) -> None:
    with pytest.raises(UsageError, match="already exists"):
        finetune(small(colours, "model.name=nonsense"), straight.folder)


@pytest.mark.parametrize("change", ["model.name=resnet5o", 'data.path="missing"'])
def test_a_run_that_cannot_start_leaves_no_folder(
    colours: Path, tmp_path: Path, change: str
) -> None:
    with pytest.raises(MomconvError):
        finetune(small(colours, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Failing


class Poison(Log):
    """From a micro-batch on, lets so many of them have a loss that is not a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, times: int) -> None:
        super().__init__()
        self.calls, self.first, self.times = 0, first, times
        functions = SimpleNamespace(cross_entropy=self.cross_entropy)
        monkeypatch.setattr("momconv.training.steps.F", functions)

    def cross_entropy(self, outputs: Tensor, labels: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        if self.first <= self.calls < self.first + self.times:
            return outputs.sum() * float("nan")
        return functional.cross_entropy(outputs, labels, **options)


def test_after_a_loss_that_is_not_finite_a_run_goes_back_and_on_with_half_the_rate(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was saved since the start, so it is a run with half the learning rate."""
    log = Poison(monkeypatch, 5, times=1)
    finetune(small(colours, "train.epochs=1"), tmp_path / "run", listener=log)
    monkeypatch.undo()
    told = log.told[-1]
    assert told.startswith("warning: the loss (nan) is not finite, in epoch 1, step 3 of 4; going")
    assert "back to epoch 1, step 0, and on with half the learning rate" in told
    assert log.shown[-1][1] == log.shown[-1][2]
    event = (tmp_path / "run" / "events.jsonl").read_text().splitlines()[0]
    assert json.loads(event) == {"event": "not_finite", "epoch": 1, "step": 3}
    half = small(colours).train.resolved_lr / 2
    finetune(small(colours, "train.epochs=1", f"train.lr={half}"), tmp_path / "half")
    assert_same(tmp_path / "half", tmp_path / "run")


def test_a_second_loss_that_is_not_finite_is_named_and_the_saved_state_kept(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(colours, "train.epochs=1")
    with pytest.raises(MomconvError, match=r"the loss \(nan\) is not finite") as failed:
        finetune(recipe, tmp_path / "run", listener=Poison(monkeypatch, 5, times=99))
    assert failed.value.kind == "train.not_finite"
    assert "in epoch 1, step 1 of 4" in failed.value.message
    assert failed.value.message.count(".png") == 5
    assert failed.value.fix is not None
    assert failed.value.fix.endswith("--lr 0.00015625")
    monkeypatch.undo()
    resume(tmp_path / "run", "train.lr=0.00015625")
    finetune(small(colours, "train.epochs=1", "train.lr=0.00015625"), tmp_path / "slow")
    assert_same(tmp_path / "slow", tmp_path / "run")


def _spoil_scores(monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
    """Let these validations, counted from 1, come to a loss that is not a number."""
    calls = itertools.count(1)

    def spoilt(*args: Any, **options: Any) -> Scores:
        scores = evaluate(*args, **options)
        return replace(scores, loss=math.nan) if next(calls) in which else scores

    monkeypatch.setattr("momconv.training.validation.evaluate", spoilt)


def test_after_a_validation_loss_that_is_not_finite_the_epoch_is_done_again(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil_scores(monkeypatch, 1)
    log = Log()
    result = finetune(small(colours, "train.epochs=1"), tmp_path / "run", listener=log)
    assert log.told[-1].startswith(
        "warning: the validation loss (nan) is not finite after epoch 1: the training diverged; "
        "going back to epoch 1, step 0, and on with half"
    )
    assert [math.isfinite(row.val_loss or math.nan) for row in result.history] == [True]
    half = small(colours).train.resolved_lr / 2
    finetune(small(colours, "train.epochs=1", f"train.lr={half}"), tmp_path / "half")
    assert_same(tmp_path / "half", tmp_path / "run")


def test_a_run_whose_validation_diverges_again_fails_and_keeps_its_best(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil_scores(monkeypatch, 2, 3)
    with pytest.raises(MomconvError, match=r"validation loss \(nan\) .* after epoch 2") as failed:
        finetune(small(colours), tmp_path / "run", listener=Log())
    assert (failed.value.exit_code, failed.value.kind) == (1, "train.not_finite")
    best = tmp_path / "run" / "best.safetensors"
    assert failed.value.message.endswith(f"the best so far, of epoch 1, is in {best}")
    assert model_file.read_metadata(best)["training"]["epochs"] == 1
    assert "--resume" in str(failed.value.fix)


def test_weights_that_diverge_are_noticed_without_validation(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very last step, after which no loss would show it."""
    steps = itertools.count(1)

    def step(run: TrainingRun, lr: float) -> None:
        take_step(run, lr)
        if next(steps) % 4 == 0:
            run.model.get_parameter("linear.bias").data[0] = math.inf

    monkeypatch.setattr("momconv.training.loop.take_step", step)
    recipe = small(colours, "train.epochs=1", "data.val_frac=0", "train.batch_size=6")
    with pytest.raises(MomconvError, match=r"weight linear\.bias is not finite after epoch 1"):
        finetune(recipe, tmp_path / "run", listener=Log())


def test_a_run_stops_when_its_time_is_up_and_each_process_gets_a_step_further(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(TimeUp):
        finetune(small(colours, "train.time_limit=0.001s"), tmp_path / "run")
    with pytest.raises(TimeUp):
        resume(tmp_path / "run")
    assert load_state(RunFolder(tmp_path / "run").state).progress.step == 2
    resume(tmp_path / "run", "train.time_limit=")
    assert_same(straight.folder, tmp_path / "run")


def test_images_that_vanish_during_a_run_end_it_by_name(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))

    class Thief(Listener):
        def advance(self, title: str, done: int, total: int, text: str = "") -> None:
            if title == "training":
                for path in data.rglob("*.png"):
                    path.unlink()

    with pytest.raises(DataError, match=r"cannot be read any more, such as .*\.png") as caught:
        finetune(small(data), tmp_path / "run", listener=Thief())
    assert caught.value.kind == "data.lost_folder"
    shutil.copytree(colours, data, dirs_exist_ok=True)
    resume(tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("momconv.training.loop.note_peak", id="after the second step"),
        pytest.param("momconv.training.lockstep.add_gradients", id="within the third step"),
    ],
)
def test_what_nobody_expected_does_not_cost_a_whole_step(
    straight: Result,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    log, run = Fails(monkeypatch, where, after_steps=2), RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        finetune(small(colours), run.path, listener=log)
    monkeypatch.undo()
    assert load_state(run.state).progress.step == 2
    assert f"the state of this step is kept. To go on: {run.resume_command}" in log.told[-1]
    resume(run.path)
    assert_same(straight.folder, run.path)


def test_half_a_step_is_not_saved(
    straight: Result, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have changed, and the step is not counted yet."""
    where, run = "momconv.training.loop.anneal_networks", RunFolder(tmp_path / "run")
    log = Fails(monkeypatch, where, after_steps=2)
    with pytest.raises(ZeroDivisionError):
        finetune(small(colours), run.path, listener=log)
    monkeypatch.undo()
    assert load_state(run.state).progress.step == 0
    assert "the last time that the run was saved is kept" in log.told[-1]
    resume(run.path)
    assert_same(straight.folder, run.path)


class Fails(Log):
    """Lets a function fail once the listener has heard of the images of so many steps."""

    def __init__(self, patch: pytest.MonkeyPatch, where: str, after_steps: int) -> None:
        super().__init__()
        self.patch, self.where, self.left = patch, where, after_steps * 5

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        super().advance(title, done, total, text)
        if title == "training" and done == self.left:
            self.patch.setattr(self.where, self.fail_later)

    def fail_later(self, *_: object) -> None:
        raise ZeroDivisionError


def test_sigterm_is_told_apart(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as interrupted:
        finetune(small(colours), tmp_path / "run", listener=Signals(1, signal.SIGTERM))
    assert interrupted.value.signal == signal.SIGTERM


def test_what_a_plan_may_change_is_changed_where_the_batch_does_not_fit(
    colours: Path, tmp_path: Path
) -> None:
    """From then on it is as if the recipe had asked for it."""
    larger = convert(build("cifar_resnet56", num_classes=3), 0.95, stages="all").train()
    limit = int(peak_memory(larger, 5, 32, strategy="momentum").total * 1.0102)
    changes = [
        *("model.name=cifar_resnet56", "momentum.gamma=0.1"),
        *("momentum.stages=all", "momentum.strategy=momentum"),
        *(f"train.memory={limit}", "train.micro_batch=auto", "train.epochs=1"),
    ]
    log, run = Log(), tmp_path / "run"
    done = finetune(small(colours, *changes, "train.may_change=[gamma]"), run, listener=log)
    assert any("train.may_change): γ is 0.95" in text for text in log.told)
    assert done.plan.sizes == (5,)
    assert load_recipe(run / "config.yaml").momentum.gamma == 0.95
    stages = momentum_stages(model_file.load(done.best)).values()
    assert {stage.gamma for stage in stages} == {0.95}
