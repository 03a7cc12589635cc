import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import Copies, Damage, Log, assert_same, resume, small

from momconv.errors import DataError
from momconv.evaluation import evaluate
from momconv.files import model_file
from momconv.recipe import load_recipe
from momconv.training import rate_finder
from momconv.training.batches import split_epoch
from momconv.training.finetuning import Result, finetune
from momconv.training.images import find_images, require_folder
from momconv.training.interruption import Interrupted
from momconv.training.progress import SILENT
from momconv.vocabulary import OPTIMIZERS
from momconv.zoo.networks import build

LENIENT = "data.max_bad_fraction=0.2"


@pytest.fixture
def data(colours: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(colours, tmp_path / "data"))


def choose(data: Path, step: int = -1) -> tuple[Path, Path]:
    """An image of a step of the first epoch, by default the last one, and one that is held out."""
    recipe = small(data).data
    splits = find_images(require_folder(recipe), recipe, SILENT)
    first = split_epoch(len(splits.train.samples), 5, seed=0, epoch=0)[step][0]
    return splits.train.samples[first].path, splits.val.samples[1].path


# Python 3.12 warns of any fork.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_images_that_break_are_named_counted_and_left_out(data: Path, tmp_path: Path) -> None:
    train, val = choose(data)
    recipe, log = small(data, LENIENT, "data.workers=1"), Damage([train, val])
    result = finetune(recipe, tmp_path / "run", listener=log)
    assert [text for text in log.told if "going on without it" in text] == [
        f"warning: {train}: empty file; going on without it (1 of 18 images unreadable since the "
        "start)",
        f"warning: {val}: empty file; going on without it (1 of 6 images unreadable since the "
        "start)",
    ]
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "unreadable_image"]
    assert [(event["epoch"], event["step"], event["path"]) for event in events] == [
        (1, 4, str(train)),
        (1, None, str(val)),
    ]
    assert_scored_without(result, val)


def test_a_run_that_is_killed_afterwards_goes_on_without_it(data: Path, tmp_path: Path) -> None:
    (image, _), run, copy = choose(data), tmp_path / "run", tmp_path / "copy"
    log = Copies(run, copy, "going on without it", [image])
    finetune(small(data, LENIENT), run, listener=log)
    image.unlink()
    finetune(load_recipe(copy / "config.yaml"), copy, resume=True)
    assert_same(run, copy)


class Replacement(Damage):
    """Puts named pipes in the place of images."""

    def harm(self, path: Path) -> None:
        path.unlink()
        os.mkfifo(path)


def test_an_image_that_becomes_a_pipe_is_named_and_not_waited_for(
    data: Path, tmp_path: Path
) -> None:
    train, val = choose(data)
    log = Replacement([train, val])
    result = finetune(small(data, LENIENT), tmp_path / "run", listener=log)
    told = [text for text in log.told if "going on without it" in text]
    assert [text.partition("; ")[0] for text in told] == [
        f"warning: {path}: not a regular file" for path in (train, val)
    ]
    assert_scored_without(result, val)


def assert_scored_without(result: Result, val: Path) -> None:
    assert result.epochs == 2
    assert val not in [sample.path for sample in result.splits.val.samples]
    scores = evaluate(model_file.load(result.best), result.splits.val)
    assert (scores.n, scores.top1) == (5, result.best_epoch.val_top1)


def test_a_resumed_run_goes_on_without_them_bit_for_bit(data: Path, tmp_path: Path) -> None:
    broken = choose(data)
    whole = {path: path.read_bytes() for path in broken}
    finetune(small(data, LENIENT), tmp_path / "straight", listener=Damage(broken))
    for path, content in whole.items():
        path.write_bytes(content)
    with pytest.raises(Interrupted):
        finetune(small(data, LENIENT), tmp_path / "run", listener=Damage(broken, n=14))
    for path in broken:
        path.unlink()
    recipe = load_recipe(tmp_path / "run" / "config.yaml")
    finetune(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("data.max_bad_fraction=0.05", "data.too_many_unreadable"),
        ("data.strict=true", "data.unreadable_image"),
    ],
)
def test_too_many_of_them_end_the_run(data: Path, tmp_path: Path, change: str, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        finetune(small(data, change), tmp_path / "run", listener=Damage(choose(data)))
    assert caught.value.kind == kind
    assert (tmp_path / "run" / "state.safetensors").is_file()


def test_a_batch_of_which_nothing_is_left_takes_others(data: Path, tmp_path: Path) -> None:
    train, _ = choose(data)
    recipe = small(data, LENIENT, "train.batch_size=1", "train.epochs=1")
    result = finetune(recipe, tmp_path / "run", listener=Damage([train]))
    assert result.best_epoch.train_loss < float("inf")
    assert len(result.splits.train.samples) == 17


class DamageAt(Log):
    """Breaks ``files`` when it hears of the work ``title``."""

    def __init__(self, title: str, files: Iterable[Path]) -> None:
        super().__init__()
        self.title, self.files = title, files

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        if title == self.title:
            for file in self.files:
                file.unlink(missing_ok=True)
        super().advance(title, done, total, text)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_during_calibration_is_left_out(
    data: Path, tmp_path: Path, workers: int
) -> None:
    torch.save(build("cifar_resnet20").state_dict(), tmp_path / "trained.th")
    train, _ = choose(data, step=0)  # calibration takes the same images first
    changes = [f"model.weights={tmp_path}/trained.th", "train.micro_batch=5", "train.epochs=1"]
    log = DamageAt("adapting BatchNorm to momentum", [train])
    recipe = small(data, LENIENT, *changes, f"data.workers={workers}")
    result = finetune(recipe, tmp_path / "run", listener=log)
    told = [text for text in log.told if "going on without it" in text]
    assert len(told) == 1
    assert told[0].startswith(f"warning: {train}: No such file")
    assert any(text.startswith("note: calibrated on 15 training images") for text in log.told)
    assert train not in [sample.path for sample in result.splits.train.samples]


def test_an_image_that_goes_while_a_rate_is_looked_for_is_left_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_finder, "STEPS", rate_finder.FEWEST)
    row = replace(OPTIMIZERS["sgd"], rates=(1e-5, 1e-3))
    monkeypatch.setattr(rate_finder, "OPTIMIZERS", {"sgd": row})  # nothing explodes
    train, _ = choose(data)
    log = DamageAt("looking for a learning rate", [train])
    recipe = small(data, LENIENT, "train.lr=auto", "train.epochs=1")
    result = finetune(recipe, tmp_path / "run", listener=log)
    assert len([text for text in log.told if "going on without it" in text]) == 1
    assert train not in [sample.path for sample in result.splits.train.samples]
    assert result.recipe.train.lr != "auto"


def test_images_that_are_back_count_again_after_a_resume(data: Path, tmp_path: Path) -> None:
    broken, log = choose(data), Log()
    whole = {path: path.read_bytes() for path in broken}
    finetune(small(data, LENIENT, "train.epochs=1"), tmp_path / "run", listener=Damage(broken))
    train, val = broken
    train.write_bytes(whole[train])
    result = resume(tmp_path / "run", "train.epochs=2", listener=log)
    assert (
        f"note: 1 image that had been left out can be read again, and counts from here on: {train}"
        in log.told
    )
    assert (
        f"warning: going on without 1 image that had been left out:\n  {val}: empty file"
    ) in log.told
    assert (len(result.splits.train.samples), len(result.splits.val.samples)) == (18, 5)


class Unmount(Log):
    """Takes ``folder`` away after ``n`` reports of training, and leaves an empty one if asked."""

    def __init__(self, folder: Path, n: int, *, leave_empty: bool) -> None:
        super().__init__()
        self.folder, self.n, self.leave_empty = folder, n, leave_empty

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        super().advance(title, done, total, text)
        if title == "training" and len([t for t, *_ in self.shown if t == title]) == self.n:
            self.folder.rename(self.folder.with_name("away"))
            if self.leave_empty:
                self.folder.mkdir()


@pytest.mark.parametrize(
    ("what", "leave_empty", "n"),
    [
        ("data", False, 3),
        ("data", True, 3),
        ("data/red", False, 3),
        ("data/red", True, 3),
        pytest.param("data", False, 7, id="before the validation"),
        pytest.param("data", True, 8, id="in the validation"),
    ],
)
def test_a_folder_that_goes_away_ends_the_run_and_costs_no_image(
    data: Path, colours: Path, tmp_path: Path, what: str, n: int, *, leave_empty: bool
) -> None:
    finetune(small(colours), tmp_path / "straight")
    log, folder = Unmount(tmp_path / what, n, leave_empty=leave_empty), tmp_path / "run"
    with pytest.raises(DataError, match="cannot be read any more") as lost:
        finetune(small(data, LENIENT), folder, listener=log)
    assert (lost.value.exit_code, lost.value.kind) == (3, "data.lost_folder")
    assert lost.value.fix == f"momconv finetune --resume {folder}"
    if leave_empty:
        (tmp_path / what).rmdir()
    (tmp_path / what).with_name("away").rename(tmp_path / what)
    result = resume(folder)
    assert (len(result.splits.train.samples), len(result.splits.val.samples)) == (18, 6)
    assert "unreadable_image" not in (folder / "events.jsonl").read_text()
    assert_same(tmp_path / "straight", folder)
