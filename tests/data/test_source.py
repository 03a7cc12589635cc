"""What is no folder is checked, evaluated and trained on like one."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from runs import make_run

from momconv.data.decoding import UnreadableImage
from momconv.data.folder import read_classes_folder
from momconv.data.inspection import check_images
from momconv.data.source import ImageSet, Listing, Splits, read_classes
from momconv.errors import DataError
from momconv.evaluation import evaluate
from momconv.training.loop import train
from momconv.training.run import TrainingRun
from momconv.training.saving import begin
from momconv.zoo.networks import build


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


@pytest.fixture
def folder(colours: Path) -> ImageSet:
    return read_classes_folder(colours)


@pytest.fixture
def memory(folder: ImageSet) -> ImageSet:
    """The same images."""
    content = {path.relative_to(folder.root): path.read_bytes() for path in folder.paths}
    return read_classes(Memory(content))


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
    ours, theirs = (evaluate(model, images) for images in (memory, folder))
    assert replace(ours, mistakes=()) == replace(theirs, mistakes=())
    found = [folder.root / mistake.path for mistake in ours.mistakes]
    assert found == [mistake.path for mistake in theirs.mistakes]


def train_on(images: ImageSet, colours: Path, folder: Path) -> TrainingRun:
    torch.manual_seed(0)
    run = make_run(colours, build("cifar_resnet20", 3), "train.epochs=1", folder=folder)
    run.splits = Splits(images, images, ())
    run.folder.make()
    begin(run)
    train(run)
    return run


def test_training_comes_to_the_same_as_on_a_folder(
    folder: ImageSet, memory: ImageSet, colours: Path, tmp_path: Path
) -> None:
    ours = train_on(memory, colours, tmp_path / "memory")
    theirs = train_on(folder, colours, tmp_path / "folder")
    after = ours.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in theirs.model.state_dict().items())
    assert ours.progress.history[0].val_loss == theirs.progress.history[0].val_loss
