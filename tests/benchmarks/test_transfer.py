import zipfile
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import transfer
from benchmarks.pictures import TRANSFER_STYLES, draw_transfer
from benchmarks.tables import Row
from momconv.recipe import load_recipe


def rows(method: str, *scores: tuple[float, ...]) -> list[Row]:
    """Rows of one method: for each seed, the score after each epoch."""
    return [
        {"method": method, "epoch": str(n), "seed": str(seed), transfer.VALUE: str(score)}
        for seed, own in enumerate(scores)
        for n, score in enumerate(own, start=1)
    ]


ROWS = [*rows("plain", (50, 80), (52, 84), (54, 82)), *rows("calibrated", (40, 78), (40, 80))]


def test_the_table_has_mean_and_deviation_over_the_seeds() -> None:
    assert transfer.present(ROWS) == [
        {"method": "plain", "seeds": "3", "epoch 1": "52.0 ± 2.0", "epoch 2": "82.0 ± 2.0"},
        {"method": "calibrated", "seeds": "2", "epoch 1": "40.0 ± 0.0", "epoch 2": "79.0 ± 1.4"},
    ]


def test_the_picture_has_a_line_for_each_method() -> None:
    (axes,) = draw_transfer(ROWS).axes
    assert len(axes.containers) == 2
    assert "top-1" in axes.get_ylabel()


def test_every_method_has_a_recipe_and_a_style() -> None:
    assert TRANSFER_STYLES.keys() == transfer.METHODS.keys()
    for changes in transfer.METHODS.values():
        load_recipe(None, [*transfer.COMMON, *changes])


def test_the_task_pairs_classes_and_keeps_the_held_out_images_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRAIN", 2)
    monkeypatch.setattr(transfer, "VAL", 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for class_ in "abcdefghij":
            for number in range(8):
                archive.write(tmp_path / "image.png", f"cifar10/val/{class_}/{number}.png")
                archive.write(tmp_path / "image.png", f"cifar10/train/{class_}/{number}.png")
    files = []
    for seed in (0, 1):
        transfer.unpack(tmp_path / "images.zip", tmp_path / str(seed), seed)
        found = (tmp_path / str(seed)).rglob("*.png")
        files.append({path.relative_to(tmp_path / str(seed)) for path in found})
    train, val = ({p for p in files[0] if p.parts[0] == part} for part in ("train", "val"))
    assert (len(train), len(val)) == (20, 30)
    assert not {path.parts[1:] for path in train} & {path.parts[1:] for path in val}
    assert {(path.parts[1], path.name[0]) for path in val} == {
        (str(n % 5), class_) for n, class_ in enumerate("abcdefghij")
    }
    assert train != {path for path in files[1] if path.parts[0] == "train"}
    assert val <= files[1]
