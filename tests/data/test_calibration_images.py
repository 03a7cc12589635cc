from pathlib import Path

import pytest
import torch
from pictures import fingerprint, save_classes, save_picture

from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.errors import DataError
from momconv.zoo.description import Preprocessing

HALVES = (0.5, 0.5, 0.5)
SMALL = Preprocessing(resolution=8, resize=8, mean=HALVES, std=HALVES)


def test_the_choice_is_random_over_all_classes_and_depends_only_on_the_seed(tmp_path: Path) -> None:
    save_classes(tmp_path, a=30, b=30, c=30)
    chosen = choose_images(tmp_path, 30, seed=0)
    assert len(set(chosen)) == 30
    assert {path.parent.name for path in chosen} == {"a", "b", "c"}
    assert choose_images(tmp_path, 30, seed=0) == chosen
    assert choose_images(tmp_path, 30, seed=1) != chosen
    assert len(choose_images(tmp_path, 1000, seed=0)) == 90


def test_no_labels_are_needed(tmp_path: Path) -> None:
    paths = {save_picture(tmp_path / f"{n}.png", n) for n in range(3)}
    assert set(choose_images(tmp_path, 10, seed=0)) == paths


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (250, [250]), (251, [125, 126]), (700, [233, 233, 234])]
)
def test_batches_are_of_one_size(tmp_path: Path, count: int, sizes: list[int]) -> None:
    paths = [save_picture(tmp_path / "one.png")] * count
    assert [len(batch) for batch in CalibrationImages(paths, SMALL)] == sizes


def test_large_images_come_in_smaller_batches(tmp_path: Path) -> None:
    paths = [save_picture(tmp_path / "one.png")] * 9
    large = Preprocessing(resolution=1000, resize=1000, mean=HALVES, std=HALVES)
    assert [batch.shape for batch in CalibrationImages(paths, large)] == 3 * [(3, 3, 1000, 1000)]


def test_images_are_preprocessed_and_progress_is_told(tmp_path: Path) -> None:
    save_classes(tmp_path, a=2, b=2)
    before, done = fingerprint(tmp_path), list[int]()
    images = CalibrationImages(choose_images(tmp_path, 9, seed=0), SMALL, done.append)
    (batch,) = images
    assert batch.shape == (4, 3, 8, 8)
    assert -1 <= batch.min() < -0.5
    assert (done, images.unreadable) == ([4], [])
    assert fingerprint(tmp_path) == before


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    save_classes(tmp_path, a=3)
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    images = CalibrationImages(choose_images(tmp_path, 9, seed=0), SMALL)
    for _ in range(2):  # the second iteration starts anew
        assert [len(batch) for batch in images] == [3]
        assert [str(e.path) for e in images.unreadable] == [f"{tmp_path}/a/bad.png"]
        assert [e.reason for e in images.unreadable] == ["empty file"]


def test_if_none_can_be_read_that_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 images can be read\n.*bad.png: empty file"):
        list(CalibrationImages([tmp_path / "bad.png"], SMALL))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        choose_images(tmp_path / "nope", 9, seed=0)


def test_every_iteration_gives_the_same_tensors(tmp_path: Path) -> None:
    paths = choose_images(save_classes(tmp_path, a=5), 9, seed=0)
    first, second = (torch.cat(list(CalibrationImages(paths, SMALL))) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("fits", [True, False])
def test_what_fits_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    images = CalibrationImages(choose_images(save_classes(tmp_path, a=5), 9, seed=0), SMALL)
    if not fits:
        monkeypatch.setattr("momconv.data.calibration_images._KEPT", 5 * 3 * 4 * 64 - 1)
        images = CalibrationImages(images.paths, SMALL)
    next(iter(images))  # is not a whole pass
    first = torch.cat(list(images))
    (tmp_path / "a" / "0.png").unlink()
    assert len(torch.cat(list(images))) == (5 if fits else 4)
    assert len(first) == 5


def test_each_batch_can_say_which_files_it_is_from(tmp_path: Path) -> None:
    save_classes(tmp_path, a=3)
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    images = CalibrationImages(choose_images(tmp_path, 9, seed=0), SMALL)
    ((batch, paths),) = images.read()
    assert len(batch) == 3
    assert paths == [path for path in images.paths if path.name != "bad.png"]
