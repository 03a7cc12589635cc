import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs import Log

from momconv.data.examination import examine
from momconv.data.folder import find_splits
from momconv.errors import DataError, ModelFileError, UsageError
from momconv.recipe import DataRecipe
from momconv.training.images import (
    CheckedImages,
    find_images,
    keep_readable,
    recall_images,
    remember_images,
    require_folder,
)
from momconv.training.progress import SILENT
from momconv.training.run_folder import RunFolder
from momconv.zoo.seen import SeenImages


def remember(data: Path, folder: Path, recipe: DataRecipe | None = None) -> CheckedImages:
    """Check the images of ``data`` and write them to split.json in ``folder``."""
    recipe = recipe or DataRecipe()
    images = keep_readable(find_images(data, recipe, SILENT), recipe, SILENT)
    remember_images(images, data, RunFolder(folder))
    return images


def test_a_recipe_without_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no folder of images"):
        require_folder(DataRecipe())


def test_an_unreadable_image_is_left_out_and_told(colours: Path, tmp_path: Path) -> None:
    root, log = Path(shutil.copytree(colours, tmp_path / "data")), Log()
    (root / "blue" / "bad.png").write_bytes(b"nothing")
    recipe = DataRecipe(max_bad_fraction=0.5)
    splits = keep_readable(find_images(root, recipe, log), recipe, log).splits
    assert len(splits.train.samples) + len(splits.val.samples) == 24
    assert any("1 of 19 images unreadable" in text or "1 of 6" in text for text in log.told)
    assert log.told[0].startswith("note: no val/ folder")
    assert {title for title, *_ in log.shown} == {
        "checking the training images",
        "checking the held-out images",
    }


def test_the_split_is_recalled_in_its_order_whatever_was_added(
    colours: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "data"))
    splits = remember(root, tmp_path).splits
    shutil.copy(root / "blue" / "0.png", root / "blue" / "new.png")
    again = recall_images(tmp_path / "split.json")
    assert again.train.samples == splits.train.samples
    assert again.val.samples == splits.val.samples
    assert again.train.classes == ("blue", "green", "red")


def test_the_images_may_have_moved_but_not_vanished(colours: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "data"))
    remember(root, tmp_path)
    moved = root.rename(tmp_path / "moved")
    assert recall_images(tmp_path / "split.json", moved).train.root == moved
    with pytest.raises(DataError, match="the images of the run are gone: there is no folder"):
        recall_images(tmp_path / "split.json", root)


def test_changed_images_are_told_by_name(colours: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "data"))
    remember(root, tmp_path)
    shutil.copy(root / "blue" / "0.png", root / "blue" / "1.png")
    (root / "red" / "2.png").unlink()
    with pytest.raises(DataError) as caught:
        recall_images(tmp_path / "split.json")
    assert caught.value.kind == "data.changed"
    assert caught.value.message.splitlines() == [
        f"2 images of the run changed since in {root}",
        f"  {root}/red/2.png: No such file or directory",
        f"  {root}/blue/1.png: changed",
    ]


def test_the_report_has_what_was_found(colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data" / "train")).parent
    shutil.copytree(colours / "red", data / "val" / "red")
    Image.new("RGBA", (50, 20)).save(data / "train" / "blue" / "z.png")
    (data / "train" / "blue" / "bad.png").touch()
    checked = remember(data, tmp_path)
    report = json.loads((tmp_path / "data-report.json").read_text())
    assert report["train"] == {
        "folder": str(data / "train"),
        "images": 25,
        "classes": {"blue": 9, "green": 8, "red": 8},
        "stored": {"PNG RGB": 24, "PNG RGBA": 1},
        "converted": {"transparent, put on white": 1},
        "width": [36, 36, 50],
        "height": [20, 34, 34],
        "unreadable": {str(data / "train/blue/bad.png"): "empty file"},
    }
    assert report["val"]["classes"] == {"blue": 0, "green": 0, "red": 8}
    assert len(report["duplicates"]) == 8
    assert sum("are training images too" in note for note in report["notes"]) == 1
    assert recall_images(tmp_path / "split.json").fingerprint == report["fingerprint"]
    assert checked.splits.fingerprint == report["fingerprint"]


def test_strictly_a_warning_is_an_error(colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data" / "train")).parent
    shutil.copytree(colours / "red", data / "val" / "red")
    with pytest.raises(DataError, match="val has no images of 2 classes") as caught:
        remember(data, tmp_path, DataRecipe(strict=True))
    assert caught.value.kind == "data.strict"


def test_the_split_may_lie_anywhere(colours: Path, tmp_path: Path) -> None:
    val = Path(shutil.copytree(colours, tmp_path / "elsewhere"))
    remember(colours, tmp_path, DataRecipe(train_dir=colours, val_dir=val))
    assert recall_images(tmp_path / "split.json").val.root == val


@pytest.mark.parametrize("text", ["", "{}", '{"classes": 3}'])
def test_a_damaged_split_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"split\.json is damaged"):
        recall_images(tmp_path / "split.json")
    with pytest.raises(ModelFileError, match="cannot read"):
        recall_images(tmp_path / "missing.json")


def test_a_class_that_the_split_does_not_list_is_damage(colours: Path, tmp_path: Path) -> None:
    remember(colours, tmp_path)
    text = (tmp_path / "split.json").read_text()
    (tmp_path / "split.json").write_text(text.replace('"blue"', '"blau"', 1))
    with pytest.raises(ModelFileError, match="unknown class blue"):
        recall_images(tmp_path / "split.json")


def test_images_that_the_network_has_seen_are_not_validated_on(
    colours: Path, tmp_path: Path
) -> None:
    """Whether the run trains on copies of them, or the network was trained on them before."""
    found = find_splits(colours)
    copied, seen = found.train.samples[0].path, found.val.samples[1].path
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    here = find_splits(data).val.samples
    shutil.copy(copied, here[0].path)
    log, before = Log(), SeenImages().add([examine(seen).sha256])
    checked = keep_readable(find_splits(data), DataRecipe(), log, before)
    assert [sample.path for sample in checked.splits.val.samples] == [s.path for s in here[2:]]
    assert [text.split(", such as")[0] for text in log.told[:3]] == [
        "warning: 1 of 6 validation images are training images too, byte for byte",
        "warning: the network was trained on 1 of 6 validation images before",
        "note: validating on the 4 images it is not trained on",
    ]


def test_where_all_held_out_images_were_seen_they_are_validated_on_with_a_warning(
    colours: Path, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        shutil.copytree(colours, tmp_path / part)
    log = Log()
    checked = keep_readable(find_splits(tmp_path), DataRecipe(), log)
    assert len(checked.splits.val.samples) == 24
    assert log.told[-1] == "warning: so its scores do not say how it does on new images"


def test_names_that_are_not_utf8_are_remembered(colours: Path, tmp_path: Path) -> None:
    """Of folders, and so of classes, and of files."""
    data = Path(shutil.copytree(colours, tmp_path / "d\udce4ta"))
    (data / "red").rename(data / "r\udcf6t")
    for path in [*(data / "blue").iterdir()]:
        path.rename(path.with_name(f"bl\udce4-{path.name}"))
    checked = remember(data, tmp_path)
    assert checked.splits.train.classes == ("blue", "green", r"r\xf6t")
    again = recall_images(tmp_path / "split.json")
    assert again.train.samples == checked.splits.train.samples
    assert again.fingerprint == checked.splits.fingerprint
    json.loads((tmp_path / "data-report.json").read_bytes().decode())


def test_a_class_that_is_not_validated_is_told(colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    (data / "one").mkdir()
    shutil.copy(min((colours / "red").iterdir()), data / "one")
    log = Log()
    checked = keep_readable(find_splits(data), DataRecipe(), log)
    assert checked.splits.uncovered == ["one"]
    assert log.told[-1] == (
        "warning: val top-1 and macro F1 do not cover 1 class: one, without a validation image"
    )


def test_thousands_of_classes_are_a_few_names_in_a_message(tmp_path: Path) -> None:
    for n in range(300):
        (tmp_path / "data" / f"species-{n:03d}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (n % 256, n // 256, 0)).save(
            tmp_path / "data" / f"species-{n:03d}" / "0.png"
        )
    log = Log()
    found = find_images(tmp_path / "data", DataRecipe(), log)
    assert len(found.train.classes) == 300
    assert "warning: 300 classes with fewer than 5 training images: species-000 (1), " in "".join(
        log.told
    )
    assert max(map(len, log.told)) < 250
