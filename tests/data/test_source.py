"""What is no folder is checked, trained on, evaluated and predicted like one."""

import re
import shutil
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, Damage, Log, assert_same, save_weights, small

import momconv
from momconv.data.decoding import UnreadableImage, decode
from momconv.data.folder import find_splits, read_classes_folder
from momconv.data.inspection import check_images
from momconv.data.source import ImageSet, Listing, read_classes
from momconv.errors import DataError, UsageError
from momconv.evaluation import evaluate
from momconv.planner import speed
from momconv.recipe import load_recipe, recall_recipe
from momconv.reports.run import report_run
from momconv.training.finetuning import finetune, rehearse
from momconv.training.interruption import Interrupted
from momconv.zoo.networks import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-images.md"
MODULE, USE, PICTURES = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@dataclass(frozen=True)
class Memory:
    """Images in memory, by class and name."""

    images: dict[Path, bytes]
    root: Path = Path("memory")

    def list(self) -> Listing:
        found = defaultdict(list)
        for path in self.images:
            found[path.parent.name].append(path)
        return dict(found), ()

    def read(self, path: Path) -> bytes:
        if not (content := self.images[path]):
            raise UnreadableImage(path, "lost")
        return content

    def identify(self, path: Path) -> None:
        """Nothing is remembered of them."""


def copy(images: ImageSet, root: Path = Path("memory")) -> Memory:
    """The same images in memory."""
    read = images.source.read
    return Memory({root / path.relative_to(images.root): read(path) for path in images.paths}, root)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for a device whose speed is measured with few images."""
    monkeypatch.setattr(speed, "_MOST", 4)


@pytest.fixture
def folder(colours: Path) -> ImageSet:
    return read_classes_folder(colours)


@pytest.fixture
def memory(folder: ImageSet) -> ImageSet:
    """The same images."""
    return read_classes(copy(folder))


def test_a_source_is_listed_and_its_classes_are_numbered(
    folder: ImageSet, memory: ImageSet
) -> None:
    assert (memory.classes, memory.labels) == (folder.classes, folder.labels)
    assert memory.counts() == folder.counts()
    with pytest.raises(DataError, match="memory has 1 class that the model does not have"):
        read_classes(memory.source, memory.classes[1:])


def test_a_source_is_checked(memory: ImageSet) -> None:
    content = {path: memory.source.read(path) for path in memory.paths}
    lost = memory.paths[3]
    images = read_classes(Memory(content | {lost: b""}))
    checked = check_images(images, max_bad_fraction=0.5)
    assert checked.unreadable() == {lost: "lost"}
    assert lost not in checked.images.paths


def test_scores_are_those_of_the_same_images_in_a_folder(
    folder: ImageSet, memory: ImageSet
) -> None:
    torch.manual_seed(0)
    model = build("cifar_resnet20", 3)
    ours, theirs = (evaluate(model, images) for images in (memory.source, folder))
    assert replace(ours, mistakes=()) == replace(theirs, mistakes=())
    kept, _ = momconv.keep_unseen(memory.source, model)
    assert kept == memory
    found = [folder.root / mistake.path.relative_to("memory") for mistake in ours.mistakes]
    assert found == [mistake.path for mistake in theirs.mistakes]


def test_predictions_are_those_of_the_same_images_in_a_folder(
    folder: ImageSet, memory: ImageSet
) -> None:
    torch.manual_seed(0)
    model = build("cifar_resnet20", 3)
    ours, theirs = momconv.predict(model, memory.source), momconv.predict(model, [folder.root])
    assert {p.path.name for p in ours.images} == {p.path.name for p in theirs.images}
    assert [p.guesses for p in ours.images] == [p.guesses for p in theirs.images]


class Loss(Damage):
    """Loses images of a source, in place of files."""

    def __init__(self, source: Memory, lost: list[Path], n: int) -> None:
        super().__init__(lost, n)
        self.source = source

    def harm(self, path: Path) -> None:
        self.source.images[path] = b""


def test_a_run_that_loses_images_and_is_resumed_comes_to_the_same_as_on_a_folder(
    colours: Path, tmp_path: Path
) -> None:
    """With calibration and a linear probe before the first step."""
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    source, splits = copy(read_classes_folder(data)), find_splits(data)
    lost = [splits.train.paths[0], splits.val.paths[1]]
    trained = f"model.weights={save_weights(tmp_path)}"
    changes = [trained, "train.probe=true", "train.micro_batch=5", "data.max_bad_fraction=0.2"]
    finetune(small(data, *changes), tmp_path / "folder", listener=Damage(lost))
    here, run = [source.root / path.relative_to(data) for path in lost], tmp_path / "memory"
    recipe = load_recipe(None, [*SMALL, *changes, "log.plots=false"])
    log = Loss(source, here, n=7)
    with pytest.raises(Interrupted):
        finetune(recipe, run, source=source, listener=log)
    assert f"warning: {here[0]}: lost; going on without it (1 of 18" in " ".join(log.told)
    went = recall_recipe(run / "config.yaml")
    result = finetune(went, run, source=source, resume=True)
    assert_same(tmp_path / "folder", run)
    report_run(result)
    assert (run / "README.md").read_text().count(" on memory\n")
    other = replace(source, images=dict.fromkeys(source.images, b"other"))
    with pytest.raises(DataError, match="22 images of the run changed since in memory"):
        finetune(went, run, source=other, resume=True)


def test_images_to_validate_on_may_be_a_source_of_their_own(memory: ImageSet) -> None:
    val = copy(memory, Path("others"))
    log, recipe = Log(), load_recipe(None, SMALL)
    found = rehearse(recipe, "run", source=(memory.source, val), listener=log).report
    assert (found.train.images, found.val.images) == (24, 24)
    assert log.told[0] == "note: training on memory (24 images), validating on others (24 images)"


def test_what_is_wrong_with_a_source_is_told(memory: ImageSet, colours: Path) -> None:
    with pytest.raises(UsageError, match=r"both data\.path and source= say where the images are"):
        rehearse(small(colours), "run", source=memory.source)
    recipe = load_recipe(None, SMALL)
    with pytest.raises(UsageError, match=r"source= is a list, which is no source of images"):
        rehearse(recipe, "run", source=[1])  # type: ignore[arg-type]
    one = Memory(dict.fromkeys(memory.paths[:3], b""))
    with pytest.raises(DataError, match="found 1 class in memory: blue"):
        rehearse(recipe, "run", source=one)
    with pytest.raises(ValueError, match="must begin with its source's root, elsewhere"):
        rehearse(recipe, "run", source=replace(copy(memory), root=Path("elsewhere")))


def test_the_code_of_the_page_works(
    colours: Path, folder: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MODULE, encoding="utf-8")
    for name in ("photos", "others"):
        with zipfile.ZipFile(f"{name}.zip", "w") as archive:
            for path in folder.paths:
                archive.write(path, f"colours/{path.relative_to(colours)}")
    found: dict[str, Any] = {}
    exec(USE, found)
    assert found["result"].splits.train.classes == folder.classes
    assert found["scores"].n == len(found["predictions"].images) == 24


def test_a_dataset_of_pictures_is_a_source_by_the_class_of_the_page(folder: ImageSet) -> None:
    found: dict[str, Any] = {}
    exec(PICTURES, found)
    dataset = [(decode(sample.path), sample.label) for sample in folder.samples]
    images = read_classes(found["Pictures"](dataset, folder.classes))
    torch.manual_seed(0)
    model = build("cifar_resnet20", 3)
    ours, theirs = evaluate(model, images), evaluate(model, folder)
    assert replace(ours, mistakes=()) == replace(theirs, mistakes=())
