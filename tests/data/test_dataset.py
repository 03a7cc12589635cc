import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import fingerprint, save_classes
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from momconv.data import dataset
from momconv.data.dataset import (
    LabelledImages,
    count_workers,
    count_workers_that_fit,
    make_loader,
    read_batches,
)
from momconv.data.decoding import UnreadableImage
from momconv.data.folder import find_evaluation_set, find_splits, list_images
from momconv.data.inspection import check_images
from momconv.data.source import ImageSet
from momconv.data.transforms import evaluation_transform, training_transform
from momconv.errors import DataError, ResourceError
from momconv.zoo.description import Preprocessing

TINY = Preprocessing(resolution=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))

# Python 3.12 warns of any fork; a machine with one core is warned of two workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return find_evaluation_set(save_classes(tmp_path, ant=5, bee=6))


def read_all(dataset: LabelledImages, workers: int = 0) -> tuple[Tensor, Tensor]:
    loader = DataLoader(dataset, batch_size=3, num_workers=workers)
    tensors, labels = zip(*read_batches(loader), strict=True)
    return torch.cat(tensors), torch.cat(labels)


def test_images_come_with_their_labels(images: ImageSet) -> None:
    dataset = LabelledImages(images, evaluation_transform(TINY), seed=None)
    tensors, labels = read_all(dataset)
    assert len(dataset) == 11
    assert labels.tolist() == [0] * 5 + [1] * 6
    assert tensors.shape == (11, 3, 8, 8)


def test_the_number_of_workers_changes_nothing(images: ImageSet) -> None:
    dataset = LabelledImages(images, training_transform(TINY), seed=3)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        alone, helped = read_all(dataset), read_all(dataset, workers=2)
        assert torch.equal(alone[0], helped[0])
        assert torch.equal(alone[1], helped[1])


def test_the_order_of_reading_changes_nothing(images: ImageSet) -> None:
    dataset = LabelledImages(images, training_transform(TINY), seed=3)
    forwards = [dataset[i][0] for i in range(11)]
    backwards = [dataset[i][0] for i in reversed(range(11))]
    assert all(map(torch.equal, forwards, reversed(backwards)))


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_seed_epoch_and_index_each_change_the_augmentation(images: ImageSet, change: str) -> None:
    def draw(*, seed: int = 0, epoch: int = 0, index: int = 0) -> float:
        dataset = LabelledImages(images, lambda image: torch.rand(()), seed=seed)
        dataset.set_epoch(epoch)
        return float(dataset[index][0])

    assert len({draw(**{change: value}) for value in range(8)}) == 8


def test_persistent_workers_hear_of_a_new_epoch(images: ImageSet) -> None:
    dataset = LabelledImages(images, training_transform(TINY), seed=3)
    loader = DataLoader(dataset, batch_size=11, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        ((tensors, _),) = read_batches(loader)
        assert torch.equal(tensors, read_all(dataset)[0])


def test_a_seeded_dataset_leaves_the_global_random_state_alone(images: ImageSet) -> None:
    dataset = LabelledImages(images, training_transform(TINY), seed=3)
    before = torch.get_rng_state()
    assert not torch.equal(dataset[0][0], dataset[1][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_random_state_decides(images: ImageSet) -> None:
    dataset = LabelledImages(images, lambda image: torch.rand(()), seed=None)
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(dataset[0][0], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_in_the_middle_is_named(images: ImageSet, workers: int) -> None:
    broken = images.samples[7].path
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = LabelledImages(images, evaluation_transform(TINY), seed=0)
    loader = DataLoader(dataset, batch_size=3, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(read_batches(loader))
    assert caught.value.message == f"{broken}: truncated image"
    assert caught.value.kind == "data.unreadable_image"
    assert multiprocessing.active_children() == []


def test_workers_work_on_after_one_sigterm_but_not_after_two(images: ImageSet) -> None:
    def read(signals: int) -> int:
        def signalled(image: object) -> Tensor:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
            return torch.zeros(3, 8, 8)

        loader = make_loader(LabelledImages(images, signalled, seed=0), workers=1, batch_size=11)
        return sum(len(labels) for _, labels in read_batches(loader))

    images = images.select([0])
    assert read(signals=1) == 1
    with pytest.raises(ResourceError, match="ended by itself, with code -15"):
        read(signals=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_fails_on_an_image_costs_that_image(
    images: ImageSet, workers: int
) -> None:
    def refuse_red(image: Image.Image) -> Tensor:
        if image.getpixel((0, 0)) == (255, 0, 0):
            raise ValueError("no red")
        return torch.zeros(3, 8, 8)

    red = images.samples[7].path
    Image.new("RGB", (9, 9), "red").save(red)
    loader = make_loader(LabelledImages(images, refuse_red, seed=0), workers=workers, batch_size=3)
    with pytest.raises(UnreadableImage, match="no red") as caught:
        list(read_batches(loader))
    assert caught.value.path == red


def test_other_failures_in_a_worker_are_not_hidden(images: ImageSet) -> None:
    def fail(image: object) -> Tensor:
        raise RuntimeError("not the file's fault")

    loader = DataLoader(LabelledImages(images, fail, seed=0), num_workers=1)
    with pytest.raises(RuntimeError, match="not the file's fault"):
        list(read_batches(loader))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGBUS, "memory.shared"),
        (signal.SIGKILL, "memory.killed"),
        (signal.SIGUSR1, "run.lost_reader"),
    ],
)
def test_a_process_that_was_killed_is_explained(
    images: ImageSet, number: signal.Signals, kind: str
) -> None:
    def die(image: object) -> Tensor:
        os.kill(os.getpid(), number)
        raise AssertionError

    loader = DataLoader(LabelledImages(images, die, seed=0), num_workers=1)
    with pytest.raises(ResourceError) as caught:
        list(read_batches(loader))
    assert caught.value.kind == kind
    assert caught.value.fix is not None
    assert "--workers 0" in caught.value.fix


def test_full_shared_memory_is_named(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: object) -> Tensor:
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    loader = DataLoader(LabelledImages(images, fail, seed=0), num_workers=1)
    with pytest.raises(ResourceError, match="/dev/shm is full"):
        list(read_batches(loader))


def test_nothing_is_written_into_the_data(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ant=5, bee=6)
    save_classes(tmp_path / "val", ant=2, bee=2)
    before = fingerprint(tmp_path)
    splits = find_splits(tmp_path)
    find_splits(tmp_path / "train")
    find_evaluation_set(tmp_path)
    list_images(tmp_path)
    train = check_images(splits.train).images
    read_all(LabelledImages(train, training_transform(TINY), seed=0), workers=1)
    read_all(LabelledImages(splits.val, evaluation_transform(TINY), seed=None))
    assert len(before) == 21
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("workers", "batches", "fitting"), [(8, 100, 8), (8, 5, 2), (8, 1, 0), (8, 0, 0), (0, 0, 0)]
)
def test_shared_memory_has_room_for_so_many_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, batches: int, fitting: int
) -> None:
    monkeypatch.setattr(dataset, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=batches * 100 + 99))
    assert count_workers_that_fit(workers, 100) == fitting
    monkeypatch.setattr(dataset, "_SHARED_MEMORY", tmp_path / "none")
    assert count_workers_that_fit(workers, 100) == workers


@pytest.mark.skipif(sys.platform != "linux", reason="which processors a process may use")
@pytest.mark.parametrize(
    ("device", "cores", "images", "workers"),
    [
        ("cpu", 1, 999, 0),
        ("cpu", 4, 999, 3),
        ("cpu", 64, 999, 8),
        ("cpu", 4, 63, 1),
        ("cuda", 16, 9999, 15),
        ("cuda", 128, 9999, 32),
    ],
)
def test_one_processor_is_left_to_the_network(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, images: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)})
    assert count_workers(images, torch.device(device)) == workers
