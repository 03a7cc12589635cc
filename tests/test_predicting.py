"""A network that says the brightest channel is asked about images of known colours."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from momconv import predict
from momconv.data.decoding import decode
from momconv.data.transforms import evaluation_transform
from momconv.errors import DataError, ModelFileError
from momconv.prediction import Unreadable
from momconv.zoo.description import Description, Preprocessing, attach, describe
from momconv.zoo.networks import build


class Brightest(nn.Module):
    """Its logits are the mean of each channel."""

    def __init__(self, classes: tuple[str, ...] | None = ("red", "green", "blue")) -> None:
        super().__init__()
        preprocessing = Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        attach(self, Description("cifar_resnet20", 3, preprocessing, classes))

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return 20 * images.mean((2, 3))


def test_each_image_gets_its_classes_the_most_probable_first(colours: Path) -> None:
    done = predict(Brightest(), [colours])

    assert [image.path for image in done.images] == sorted(colours.glob("*/*.png"))
    for image in done.images:
        probabilities = [guess.probability for guess in image.guesses]
        assert image.guesses[0].name == image.path.parent.name
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_only_the_top_classes_are_named(colours: Path) -> None:
    (image,) = predict(Brightest(), [colours / "red" / "0.png"], top=1).images
    assert [guess.name for guess in image.guesses] == ["red"]


def test_the_numbers_are_those_of_the_network_on_the_preprocessed_image(colours: Path) -> None:
    model = build("cifar_resnet20", 3).eval()
    path = colours / "green" / "3.png"
    image = evaluation_transform(describe(model).preprocessing)(decode(path))
    with torch.no_grad():
        expected = model(image[None]).softmax(1)[0].sort(descending=True)

    (said,) = predict(model.train(), [path]).images

    assert model.training
    assert [guess.name for guess in said.guesses] == [str(n) for n in expected.indices.tolist()]
    assert [guess.probability for guess in said.guesses] == pytest.approx(expected.values.tolist())


class _SilentOnRed(Brightest):
    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        return outputs / (outputs.argmax(1, keepdim=True) != 0)


def test_numbers_that_are_not_finite_are_no_answer(colours: Path) -> None:
    done = predict(_SilentOnRed(), [colours])
    assert {image.path.parent.name for image in done.images} == {"blue", "green"}
    assert [bad.path for bad in done.unreadable] == sorted(colours.glob("red/*.png"))
    assert {bad.error for bad in done.unreadable} == {
        "the network's output is not finite (NaN or infinite)"
    }
    with pytest.raises(ModelFileError, match=r"not finite .*, for any of 8 images"):
        predict(_SilentOnRed(), [colours / "red"])


def test_a_file_that_is_named_twice_is_asked_about_once(colours: Path) -> None:
    done = predict(Brightest(), [colours / "red" / "0.png", str(colours / "red")])
    assert len(done.images) == 8


def test_unreadable_images_are_left_out_and_named(colours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colours / "red", tmp_path / "red"))
    (folder / "bad.png").write_bytes(b"no picture")

    done = predict(Brightest(), [folder])

    assert len(done.images) == 8
    (bad,) = done.unreadable
    assert bad.path == folder / "bad.png"
    assert bad.error.startswith("not an image")


def test_a_pipe_is_named_and_not_waited_for(colours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colours / "red", tmp_path / "red"))
    os.mkfifo(folder / "pipe.png")

    done = predict(Brightest(), [folder, Path("/dev/zero")])

    assert len(done.images) == 8
    named = {bad.path: bad.error for bad in done.unreadable}
    reason = "not a regular file"
    assert named == {folder / "pipe.png": reason, Path("/dev/zero"): reason}


def test_a_strip_gets_its_answer_beside_the_others(colours: Path, tmp_path: Path) -> None:
    strip = tmp_path / "strip.png"
    Image.new("RGB", (1, 40_000), (0, 0, 200)).save(strip)
    model = Brightest()
    attach(model, replace(describe(model), preprocessing=describe(model).preprocessing.at(256)))

    done = predict(model, [colours / "red", strip])

    assert [image.guesses[0].name for image in done.images] == [*["red"] * 8, "blue"]
    assert done.unreadable == ()


def test_what_does_not_exist_may_be_a_pattern(colours: Path, tmp_path: Path) -> None:
    done = predict(Brightest(), [colours / "**" / "[01].png", colours / "r?d"])
    found = [str(image.path.relative_to(colours)) for image in done.images]
    assert found[:6] == [f"{name}/{n}.png" for name in ("blue", "green", "red") for n in (0, 1)]
    assert found[6:] == [f"red/{n}.png" for n in range(2, 8)]
    literal = Path(shutil.copy(colours / "red" / "0.png", tmp_path / "[01].png"))
    assert [image.path for image in predict(Brightest(), [literal]).images] == [literal]


def test_what_does_not_exist_has_a_record_beside_what_does(colours: Path) -> None:
    here, gone = colours / "red" / "0.png", colours / "red" / "none.png"
    done = predict(Brightest(), [here, gone])
    assert [image.path for image in done.images] == [here]
    assert done.unreadable == (Unreadable(gone, "No such file or directory"),)


def test_what_does_not_exist_is_named_with_what_does(colours: Path) -> None:
    with pytest.raises(DataError, match=r"no such image or folder: .*/rod") as refused:
        predict(Brightest(), [colours / "rod"])
    assert refused.value.fix == f"closest existing path is {colours / 'red'}"


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in"):
        predict(Brightest(), [tmp_path])


def test_where_memory_runs_out_fewer_images_go_through_at_once(colours: Path) -> None:
    class Crowded(Brightest):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 5:
                raise MemoryError
            return super().forward(images)

    assert predict(Crowded(), [colours]) == predict(Brightest(), [colours])
