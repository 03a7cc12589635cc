import copy
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from torch import nn

from momconv.errors import UsageError
from momconv.zoo.description import (
    Description,
    Preprocessing,
    ValueRanges,
    attach,
    describe,
    find_description,
)

IMAGENET = Preprocessing(
    resolution=224, resize=232, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
BEES = Description("resnet50", 2, IMAGENET, classes=("ants", "bees"))
ADAPTER = TypeAdapter(Description)


@pytest.mark.parametrize(("resolution", "resize"), [(112, 116), (224, 232), (500, 518)])
def test_resize_follows_the_resolution_in_proportion(resolution: int, resize: int) -> None:
    scaled = IMAGENET.at(resolution)
    assert (scaled.resolution, scaled.resize) == (resolution, resize)
    assert (scaled.mean, scaled.std) == (IMAGENET.mean, IMAGENET.std)


def test_a_description_travels_through_copies() -> None:
    model = nn.Linear(1, 2)
    attach(model, BEES)
    assert describe(copy.deepcopy(model)) == BEES


def test_a_network_without_a_description_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Linear has no description"):
        describe(nn.Linear(1, 1))


def test_another_attribute_of_that_name_is_no_description() -> None:
    model = nn.Linear(1, 1)
    assert find_description(model) is None
    model.description = "a layer"  # type: ignore[assignment]  # a module takes any attribute
    assert find_description(model) is None
    attach(model, BEES)
    assert find_description(model) == BEES


def test_a_description_without_ranges_of_values_is_read_as_before() -> None:
    values = ADAPTER.dump_python(BEES, mode="json")
    del values["preprocessing"]["ranges"]
    text = TypeAdapter(dict[str, Any]).dump_json(values)
    assert ADAPTER.validate_json(text) == BEES


def test_ranges_of_values_survive_json() -> None:
    ranges = ValueRanges(integers=(0, 4095), floats=(-0.5, 1))
    bees = replace(BEES, preprocessing=replace(IMAGENET, ranges=ranges))
    assert ADAPTER.validate_json(ADAPTER.dump_json(bees)) == bees
    assert bees.preprocessing.at(64).ranges == ranges


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (0, float("inf"))])
def test_what_is_no_range_of_values_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ValueRanges).validate_python({"floats": bounds})


def test_a_description_survives_json() -> None:
    assert ADAPTER.validate_json(ADAPTER.dump_json(BEES)) == BEES


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 0},
        {"num_classes": "2"},
        {"classes": ["ants"]},
        {"surprise": 1},
        {"preprocessing": {}},
        {"architecture": None},
    ],
    ids=lambda change: "-".join(change),
)
def test_nonsense_in_json_is_refused(change: dict[str, Any]) -> None:
    values = ADAPTER.dump_python(BEES, mode="json") | change
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(values)


@pytest.mark.parametrize(
    "change",
    [{"resolution": 10**9}, {"std": [0.0, 1.0, 1.0]}, {"interpolation": "magic"}, {"mean": [0.5]}],
    ids=lambda change: "-".join(change),
)
def test_preprocessing_that_cannot_work_is_refused(change: dict[str, Any]) -> None:
    adapter = TypeAdapter(Preprocessing)
    text = TypeAdapter(dict[str, Any]).dump_json(adapter.dump_python(IMAGENET) | change)
    with pytest.raises(ValidationError, match=next(iter(change))):
        adapter.validate_json(text)
