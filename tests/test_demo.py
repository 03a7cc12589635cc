import sys
from pathlib import Path

import pytest
from PIL import Image

from momconv import demo
from momconv.demo import Demo, demonstrate
from momconv.errors import ResourceError, UsageError
from momconv.files.model_file import load
from momconv.momentum.sequential import momentum_stages

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A demo in a folder where one was before, with a tenth of the images."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / demo._MARKER).touch()
    (folder / "digits" / "train" / "old").mkdir(parents=True)
    (folder / "converted.safetensors").write_text("old")
    (folder / "mine.txt").write_text("mine")
    return demonstrate(folder, images=180, epochs=(1, 1))


def test_the_networks_are_what_they_are_said_to_be(done: Demo) -> None:
    gammas = [
        {stage.gamma for stage in momentum_stages(load(path)).values()}
        for path in (done.original, done.converted, done.finetuned)
    ]
    assert gammas == [{0}, {0.9}, {0.9}]


def test_all_are_scored_on_the_same_images_that_none_was_trained_on(done: Demo) -> None:
    digits = done.converted.parent / "digits"
    names = {
        split: {path.name for path in (digits / split).glob("*/*.png")}
        for split in ("pretrain", "train", "val")
    }
    counts = {split: len(files) for split, files in names.items()}
    assert counts["pretrain"] == pytest.approx(90, abs=5)
    assert counts["train"] == pytest.approx(45, abs=5)
    assert len(set.union(*names.values())) == sum(counts.values()) == 180
    assert [scores.n for scores in done.scores.values()] == 3 * [counts["val"]]


def test_the_images_are_digits_of_the_size_of_the_network(done: Demo) -> None:
    folders = list((done.converted.parent / "digits").glob("*/*"))
    assert {folder.name for folder in folders} == set("0123456789")
    with Image.open(next(folders[0].iterdir())) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        grey = set(picture.convert("L").tobytes())
    assert min(grey) == 0
    assert max(grey) > 200


def test_an_earlier_demo_is_replaced_and_nothing_else(done: Demo) -> None:
    folder = done.converted.parent
    assert not (folder / "digits" / "train" / "old").exists()
    assert (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["full", "file"])
def test_what_no_demo_made_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "digits").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((UsageError, ResourceError), match=str(tmp_path / name)):
        demonstrate(tmp_path / name)
    assert (tmp_path / "full" / "digits").read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_without_scikit_learn_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ResourceError) as error:
        demonstrate(tmp_path / "new")
    assert error.value.fix == "pip install 'momconv[demo]'"
    assert not (tmp_path / "new").exists()
