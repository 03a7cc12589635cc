"""What ``momconv convert`` does, from Python; what people type is in tests/cli/test_convert.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import momconv
from momconv.converting import Means, Scheme, convert_network, revert_network
from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.training.progress import Listener
from momconv.zoo.description import ValueRanges, describe

SCHEME = Scheme("cifar_resnet20", weights="none", resolution=32, stages="layer2,layer3")


class Log(Listener):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.titles: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        self.titles.append(title)


def test_a_network_is_converted_adapted_certified_and_written(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 2)
    path, log = tmp_path / "converted.safetensors", Log()
    done = convert_network(SCHEME, Means(calibrate=colours), path, log)
    assert (done.gamma, done.certificate.gradients_exact) == (0.9, True)
    assert [step.name for step in done.steps] == ["swapped", "statistics", "refined"]
    model = momconv.load(path)
    assert [name for name, stage in momentum_stages(model).items() if stage.runs] == [
        "layer2",
        "layer3",
    ]
    seen = describe(model).seen
    assert seen is not None
    assert (seen.count, seen.complete) == (20, False)
    assert list(dict.fromkeys(log.titles)) == [
        "converting cifar_resnet20",
        "running the original",
        "statistics",
        "refining",
    ]
    assert any("images to calibrate on; 100 or more are better" in text for text in log.told)


def test_what_is_black_and_white_is_found_in_the_images_to_calibrate_on(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3000, (12, 32, 32), dtype=np.uint16)
    for number, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    path, log = tmp_path / "converted.safetensors", Log()
    convert_network(replace(SCHEME, gamma=0.0), Means(calibrate=tmp_path), path, log)
    ranges = describe(momconv.load(path)).preprocessing.ranges
    assert ranges == ValueRanges(integers=(0, 4095))
    assert any("integers from 0 (black) to 4095 (white)" in text for text in log.told)


def test_and_back_to_a_plain_network(tmp_path: Path) -> None:
    converted, plain = tmp_path / "converted.safetensors", tmp_path / "plain.pth"
    convert_network(SCHEME, Means(), converted)
    done = revert_network(converted, Means(), plain)
    assert (done.source, done.path, done.interrupted) == (converted, plain, False)
    state = torch.load(plain)
    model = momconv.load(converted)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_is_wrong_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'resnet5O'"):
        convert_network(Scheme("resnet5O"), Means(), tmp_path / "x.safetensors")
    with pytest.raises(UsageError):
        convert_network(SCHEME, Means(), tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())
