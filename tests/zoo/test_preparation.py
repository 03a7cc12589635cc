from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from momconv.errors import UsageError
from momconv.zoo.description import Preprocessing, describe
from momconv.zoo.networks import build
from momconv.zoo.preparation import (
    Preparation,
    describe_assumption,
    parse_preparation,
    prepare_as,
    read_own,
)

USUAL = Preprocessing(32, 36, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
GREY, TENTH = (0.5, 0.4, 0.3), (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Preparation(), USUAL),
        (Preparation(mean=GREY), Preprocessing(32, 36, GREY, USUAL.std)),
        (Preparation(std=TENTH, resize=40), Preprocessing(32, 40, USUAL.mean, TENTH)),
        (Preparation(resolution=64), Preprocessing(64, 72, USUAL.mean, USUAL.std)),
        (Preparation(crop=0.8), Preprocessing(32, 40, USUAL.mean, USUAL.std)),
        (Preparation(64, crop=0.5), Preprocessing(64, 128, USUAL.mean, USUAL.std)),
        (Preparation(crop=48, resize=50), Preprocessing(48, 50, USUAL.mean, USUAL.std)),
        (
            Preparation(interpolation="lanczos"),
            Preprocessing(32, 36, USUAL.mean, USUAL.std, "lanczos"),
        ),
    ],
)
def test_only_what_is_said_changes(said: Preparation, expected: Preprocessing) -> None:
    assert said.apply(USUAL) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Preparation(resize=30), "images of 30 pixels are too small for a crop of 32"),
        (Preparation(crop=0.001), "images of 32000 pixels are larger than the most, 4096"),
        (Preparation(resize=40, crop=0.8), "two words for the same"),
        (Preparation(64, crop=48), "a crop of 48 pixels, and images of 64 in the network"),
    ],
)
def test_what_contradicts_itself_is_refused(said: Preparation, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        said.apply(USUAL)


class Own(nn.Module):
    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_a_network_says_it_by_an_attribute_in_our_words_or_in_timm_s() -> None:
    words = {"mean": list(GREY), "std": TENTH, "resize": 40, "interpolation": "bicubic"}
    ours = Own(preprocessing=words)
    assert read_own(ours, "mine") == Preparation(None, 40, None, GREY, TENTH, "bicubic")
    timm = {"input_size": (3, 48, 48), "crop_pct": 0.9, "mean": GREY, "url": "…"}
    assert read_own(Own(pretrained_cfg=timm), "mine") == Preparation(48, None, 0.9, GREY)
    for silent in (Own(), Own(preprocessing=nn.Identity()), Own(pretrained_cfg=None)):
        assert read_own(silent, "mine") is None


@pytest.mark.parametrize("words", [{"meen": GREY}, {"std": (1, 1, 0)}, {"mean": (1, 1)}])
def test_an_attribute_that_cannot_be_is_named(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"mine, preprocessing: {next(iter(words))}") as error:
        read_own(Own(preprocessing=words), "mine")
    assert "model.preprocessing = {" in str(error.value.fix)


def test_options_are_read_and_written() -> None:
    said = parse_preparation(mean="0.5,0.4,0.3", std="0.1", crop="0.875", interpolation=None)
    assert said == Preparation(crop=0.875, mean=GREY, std=TENTH)
    words = ["--crop", "0.875", "--mean", "0.5,0.4,0.3", "--std", "0.1,0.1,0.1"]
    assert said.write_options() == words
    with pytest.raises(
        UsageError, match="--std: '0,1,1' cannot be used: it is three numbers above"
    ):
        parse_preparation(std="0,1,1")


@pytest.mark.parametrize(
    ("say", "assumed"),
    [
        (lambda model: prepare_as(model, Preparation(resolution=64)), True),
        (lambda model: prepare_as(model, Preparation(mean=GREY)), False),
    ],
)
def test_what_nobody_said_is_told(say: Callable[[nn.Module], None], assumed: bool) -> None:
    model = build("cifar_resnet20")
    assert describe_assumption(model) is None
    object.__setattr__(describe(model), "assumed", True)
    say(model)
    note = describe_assumption(model)
    assert bool(note) is assumed
    if note:
        assert note.startswith("note: cifar_resnet20 does not say how its images are prepared")
        assert "shorter side to 64" in note
