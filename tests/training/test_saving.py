import json
import math
from importlib import util
from pathlib import Path

import pytest
from runs import small

from momconv.errors import UsageError
from momconv.training.finetuning import finetune
from momconv.training.progress import EpochRow, Halving, Progress
from momconv.training.run_folder import RunFolder
from momconv.training.saving import write_board, write_history


def test_metrics_are_a_table_and_events_are_objects(tmp_path: Path) -> None:
    rows = [EpochRow(1, 0.5, 0.25, 1 / 3, 1e-5, 7.5, 2**30, 9.0, 0.9)]
    rows += [EpochRow(2, 0.25, None, None, 0.0, 7.5, 2**20, 9.0)]
    run = RunFolder(tmp_path)
    write_history(run, Progress(rows, halvings=[Halving(2, 3, 4)]))
    assert run.metrics.read_text().splitlines() == [
        "epoch,train_loss,val_loss,val_top1,lr,images_per_second,peak_bytes,seconds,gamma"
        ",val_macro_f1,val_macro_recall,val_classes",
        "1,0.5,0.25,0.3333333333333333,1e-05,7.5,1073741824,9.0,0.9,,,",
        "2,0.25,,,0.0,7.5,1048576,9.0,0.0,,,",
    ]
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert events[1] == {"event": "out_of_memory", "epoch": 2, "step": 3, "micro_batch": 4}
    assert events[2] == {
        "event": "epoch",
        "epoch": 2,
        "train_loss": 0.25,
        "val_loss": None,
        "val_top1": None,
        "lr": 0.0,
        "images_per_second": 7.5,
        "peak_bytes": 2**20,
        "seconds": 9.0,
        "gamma": 0.0,
        "val_macro_f1": None,
        "val_macro_recall": None,
        "val_classes": None,
    }


def test_a_loss_that_is_no_number_leaves_events_readable(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_history(run, Progress([EpochRow(1, 0.5, math.nan, 0.5, 0.1, 7.5, 2**20, 9.0)]))
    assert json.loads(run.events.read_text())["val_loss"] is None
    assert ",nan," in run.metrics.read_text()


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


# Of protobuf's C extension, in TensorBoard's own modules.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_board_has_the_numbers_of_each_epoch_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [EpochRow(epoch, 0.5 / epoch, None, 0.25, 1.0, 7.5, 2**20, 9.0) for epoch in (1, 2)]
    write_board(run, rows[:1])
    write_board(run, rows)
    found = read(run.board)
    assert found["train_loss"] == [(1, 0.5), (2, 0.25)]
    assert found["peak_bytes"] == [(1, 2**20), (2, 2**20)]
    assert "val_loss" not in found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_writes_it_if_asked_to(colours: Path, tmp_path: Path) -> None:
    result = finetune(small(colours, "train.epochs=1", "log.tensorboard=true"), tmp_path / "run")
    (point,) = read(tmp_path / "run" / "tensorboard")["train_loss"]
    assert point == pytest.approx((1, result.best_epoch.train_loss))


def test_a_missing_tensorboard_is_named_before_training(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(
        "momconv.training.saving.find_spec",
        lambda name: None if name == "tensorboard" else find(name),
    )
    with pytest.raises(UsageError) as refused:
        finetune(small(colours, "log.tensorboard=true"), tmp_path / "run")
    assert refused.value.fix == "pip install 'momconv[tensorboard]'"
    assert not (tmp_path / "run").exists()
