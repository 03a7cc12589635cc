from pathlib import Path

import pytest

import momconv
from momconv.data.examination import examine
from momconv.data.folder import read_classes_folder
from momconv.data.unseen import Exposure
from momconv.zoo.description import mark_as_seen
from momconv.zoo.networks import build


def test_images_that_a_model_has_seen_are_left_out(colours: Path) -> None:
    images, model = read_classes_folder(colours), build("cifar_resnet20")
    seen = [examine(sample.path).sha256 for sample in images.samples]
    mark_as_seen(model, seen[:5])
    kept, exposure = momconv.keep_unseen(images, model)
    assert kept.samples == images.samples[5:]
    assert exposure == Exposure(left_out=5, counted=0, recorded=True, complete=False)
    assert momconv.keep_unseen(images, model, keep_all=True)[1].counted == 5
    other = build("cifar_resnet20")
    kept, exposure = momconv.keep_unseen(images, model, other)
    assert (len(kept.samples), exposure.recorded) == (19, False)
    mark_as_seen(other, seen)
    kept, exposure = momconv.keep_unseen(images, model, other)
    assert (len(kept.samples), exposure.counted, exposure.left_out) == (24, 24, 0)


@pytest.mark.parametrize(
    ("exposure", "text"),
    [
        (Exposure(0, 0, recorded=True, complete=True), "none of them was trained on"),
        (Exposure(0, 3, recorded=True, complete=True), "3 of 9 images were trained on"),
        (Exposure(0, 0, recorded=False, complete=False), "is not recorded in the file"),
        (Exposure(1, 0, recorded=True, complete=False), "what its original weights had seen"),
    ],
)
def test_what_is_known_is_said(exposure: Exposure, text: str) -> None:
    assert text in exposure.describe(9)
