from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from momconv.data.folder import find_evaluation_set, find_splits
from momconv.data.source import ImageSet
from momconv.errors import DataError


def write(folder: Path, lines: Sequence[str], *, name: str = "labels.csv") -> Path:
    """Ten images in ``folder/images``, 0 to 9, and a table beside it."""
    (folder / "images").mkdir(exist_ok=True)
    for n in range(10):
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(folder / "images" / f"{n}.png")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def rows(line: str) -> list[str]:
    return [line.format(n=n, name=("ant", "bee")[n % 2]) for n in range(10)]


def labels(images: ImageSet) -> dict[str, str]:
    return {sample.path.stem: images.classes[sample.label] for sample in images.samples}


TRUTH = {str(n): ("ant", "bee")[n % 2] for n in range(10)}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("filename,label", "{n}.png,{name}"),
        ("\ufeffImage ID;Class", "{n};{name}"),
        ("id\tx\tcategory", "images/{n}.png\t7\t{name}"),
        ("target,image_path", '"{name}",./images/{n}.png'),
    ],
)
@pytest.mark.parametrize("root", [".", "images"])
def test_a_table_beside_the_images_is_found(
    tmp_path: Path, header: str, line: str, root: str
) -> None:
    write(tmp_path, [header, *rows(line)])
    splits = find_splits(tmp_path / root)
    assert splits.train.classes == ("ant", "bee")
    assert labels(splits.train) | labels(splits.val) == TRUTH
    assert (len(splits.train.samples), len(splits.val.samples)) == (8, 2)
    assert labels(find_evaluation_set(tmp_path / root, ("bee", "ant"))) == TRUTH


@pytest.mark.parametrize("root", [".", "images"])
def test_a_table_among_the_images_is_found(tmp_path: Path, root: str) -> None:
    write(tmp_path, ["file,label", *rows("{n}.png,{name}")], name="images/labels.csv")
    splits = find_splits(tmp_path / root)
    assert labels(splits.train) | labels(splits.val) == TRUTH


@pytest.mark.parametrize("line", ["{n}.PNG,{name}", "Images/{n}.Png,{name}", "C:\\{n}.PNG,{name}"])
def test_names_may_be_in_upper_or_lower_case(tmp_path: Path, line: str) -> None:
    write(tmp_path, ["file,label", *rows(line)])
    splits = find_splits(tmp_path / "images")
    assert labels(splits.train) | labels(splits.val) == TRUTH


def test_accents_may_be_characters_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, ["file,label", "la\u0308rche.png,bee", *rows("{n}.png,{name}")])
    (tmp_path / "images" / "9.png").rename(tmp_path / "images" / "l\u00e4rche.png")
    assert labels(find_splits(tmp_path / "images").train)["l\u00e4rche"] == "bee"


def test_a_name_that_only_nearly_fits_two_images_is_that_of_none(tmp_path: Path) -> None:
    table = write(tmp_path, ["file,label", *rows("{n}.png,{name}"), "X.png,ant", "Y.png,ant"])
    for n, name in {8: "x.PNG", 9: "x.Png", 7: "y.png"}.items():
        (tmp_path / "images" / f"{n}.png").rename(tmp_path / "images" / name)
    train = find_splits(tmp_path / "images", labels=table).train
    assert f"warning: no image for 4 lines of {table}: 7.png, 8.png, 9.png, X.png" in train.notes


def test_what_a_table_leaves_open_is_told(tmp_path: Path) -> None:
    lines = ["file,label,split", *rows("{n}.png,{name},train")[:8], "7.png,bee,x", "8.png,,x"]
    table = write(tmp_path, [*lines, "77.png,bee,train"])
    splits = find_splits(tmp_path / "images", labels=table)
    assert len(splits.train.samples) + len(splits.val.samples) == 8
    assert splits.train.notes == (
        f"note: classes from {table}, columns file and label",
        f"warning: no image for 1 line of {table}: 77.png",
        f"warning: ignoring 1 image without a class in {table}",
        f"warning: ignoring 1 image without a line in {table}",
        f"warning: nothing is done with the column split of {table}",
    )


def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path, ["file,label", *rows("{n}.png,{name}"), "3.png,ant"])
    with pytest.raises(DataError, match="gives 1 image two classes") as refused:
        find_splits(tmp_path)
    assert f"{tmp_path}/images/3.png: bee in line 5, ant in line 12" in refused.value.message
    assert str(table) in refused.value.message


def test_of_several_tables_one_is_to_be_named(tmp_path: Path) -> None:
    first = write(tmp_path, ["file,label", *rows("{n}.png,{name}")])
    second = write(tmp_path, ["file,label", *rows("{n}.png,{name}")], name="more.csv")
    with pytest.raises(DataError) as refused:
        find_splits(tmp_path)
    assert refused.value.fix == f"--labels {first}\n--labels {second}"
    assert len(find_splits(tmp_path, labels=first).train.samples) == 8


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b", "0.png,ant"], "has no column of files and no column of classes"),
        (["file,label", "x.png,ant"], "names no image in"),
        (["file,label", "0.png,ant"], "found 1 class in"),
    ],
)
def test_a_table_that_is_named_must_fit(tmp_path: Path, lines: list[str], message: str) -> None:
    table = write(tmp_path, lines)
    with pytest.raises(DataError, match=message):
        find_splits(tmp_path / "images", labels=table)


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16", "bär"), ("utf-8", "bär"), ("latin-1", r"b\xe4r")]
)
def test_a_table_may_be_in_another_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    table = write(tmp_path, [])
    lines = ["file,label", *rows("{n}.png,{name}")]
    table.write_text("\n".join(lines).replace("bee", "bär"), encoding=encoding)
    assert find_splits(tmp_path).train.classes == ("ant", name)


@pytest.mark.parametrize("root", [".", "images"])
def test_a_table_that_says_no_classes_is_named(tmp_path: Path, root: str) -> None:
    table = write(tmp_path, rows("{n}.png,{name}"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=f"no classes were found in {table}; ") as caught:
        find_splits(tmp_path / root)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith(f"--labels {table}\n")
