from importlib import util
from pathlib import Path

import pytest
from runs import small

from momconv.errors import UsageError
from momconv.training.board import write_board
from momconv.training.finetuning import finetune
from momconv.training.progress import EpochRow
from momconv.training.run_folder import RunFolder


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
        "momconv.training.board.find_spec",
        lambda name: None if name == "tensorboard" else find(name),
    )
    with pytest.raises(UsageError) as refused:
        finetune(small(colours, "log.tensorboard=true"), tmp_path / "run")
    assert refused.value.fix == "pip install 'momconv[tensorboard]'"
    assert not (tmp_path / "run").exists()
