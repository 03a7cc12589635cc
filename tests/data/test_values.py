"""One range of values for a data set, whatever odd pixels are in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from momconv.data.folder import read_classes_folder
from momconv.data.inspection import check_images, find_guessed, find_outside
from momconv.data.values import (
    count_outside,
    find_ranges,
    guess_range,
    settle_ranges,
    summarise,
    to_eight_bits,
    warn_of_values,
)
from momconv.zoo.description import (
    Description,
    Preprocessing,
    ValueRange,
    ValueRanges,
    attach,
    describe,
)

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def grey(mean: float, spread: float, kind: str = "float32") -> Array:
    return RNG.normal(mean, spread, (32, 32)).astype(kind)


def with_pixel(values: Array, *pixels: float) -> Array:
    values = values.copy()
    values[0, : len(pixels)] = pixels
    return values


def find(*images: Array, no_data: float | None = None) -> ValueRange | None:
    """The range of images of one kind."""
    found = find_ranges(summarise(image, no_data) for image in images)
    assert found.integers is None or found.floats is None
    return found.integers or found.floats


REFLECTANCE = [grey(mean, 0.08).clip(0.02, 0.98) for mean in (0.3, 0.6)] * 5
ELEVATION = [grey(mean, 20) for mean in (400, 2500)] * 5
TWELVE_BIT = [grey(mean, 300, "uint16") for mean in (1200, 2500)] * 5


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (REFLECTANCE, (0, 1)),
        ([image * 255 for image in REFLECTANCE], (0, 255)),
        (ELEVATION, (0, 2600)),
        ([image.astype("int16") for image in ELEVATION], (0, 4095)),
        ([image - 3000 for image in ELEVATION], (-2700, -400)),
        ([grey(-20, 2), grey(20, 2)], (-27, 27)),
        ([grey(280, 3), grey(310, 3)], (269, 322)),
        ([grey(2900, 30, "uint16")], (2800, 3000)),
        ([grey(120, 20, "uint16")], (0, 255)),
        ([grey(520, 50, "uint16")], (0, 1023)),
        (TWELVE_BIT, (0, 4095)),
        ([image * 4 for image in TWELVE_BIT], (0, 16383)),
        ([image * 16 for image in TWELVE_BIT], (0, 65535)),
        ([np.arange(2**16, dtype="uint16")], (0, 65535)),
        ([np.full((9, 9), 7.0, "float32")], (7, 14)),
    ],
)
def test_the_values_of_all_images_give_a_range(
    images: Sequence[Array], expected: ValueRange
) -> None:
    found = find(*images)
    assert found is not None
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("images", "pixels"),
    [
        (REFLECTANCE, [1.02]),
        (REFLECTANCE, [-0.01]),
        (REFLECTANCE, [-1]),
        (REFLECTANCE, [-9999]),
        (REFLECTANCE, [np.nan, np.inf, -np.inf]),
        (ELEVATION, [-9999]),
        (ELEVATION, [-32768]),
        (ELEVATION, [-9999, 3.4e38]),
        (ELEVATION, [-3.4028234663852886e38]),
        (ELEVATION, [60_000]),
        (TWELVE_BIT, [65535]),
        ([image.astype("int16") for image in TWELVE_BIT], [-32768, 32767]),
    ],
)
def test_odd_pixels_do_not_set_it(images: Sequence[Array], pixels: list[float]) -> None:
    expected = find(*images)
    assert find(with_pixel(images[0], *pixels), *images[1:]) == expected
    assert find(*(with_pixel(image, *pixels) for image in images)) == expected


@pytest.mark.parametrize("missing", [-9999, -32768, -1, -3.4e38, float("nan")])
def test_nor_do_large_areas_without_data(missing: float) -> None:
    def cut(image: Array) -> Array:
        image = image.copy()
        image[:, :20] = missing
        return image

    assert find(*map(cut, REFLECTANCE)) == find(*REFLECTANCE)
    if missing != -1:  # which may be an elevation
        assert find(*map(cut, ELEVATION)) == find(*ELEVATION)


def test_what_the_file_says_is_no_data_is_none() -> None:
    images = [with_pixel(image, *[5000.0] * 20) for image in ELEVATION]
    assert find(*images, no_data=5000) == find(*ELEVATION)


def test_a_rare_but_real_class_is_in_the_range() -> None:
    peaks = [grey(8000, 20)] * 2
    found = find(*ELEVATION * 5, *peaks)
    assert found is not None
    assert found[1] == pytest.approx(8100, rel=0.02)


def test_a_mask_keeps_its_values() -> None:
    mask = np.zeros((32, 32), "float32")
    mask[4:9] = 1
    assert find(mask) == (0, 1)
    assert find(mask * 2 - 1) == (-1, 1)
    assert find((mask * 9).astype("int32")) == (0, 9)


def test_each_kind_of_values_has_a_range_of_its_own() -> None:
    found = find_ranges(map(summarise, [*REFLECTANCE, *TWELVE_BIT]))
    assert found == ValueRanges(integers=(0, 4095), floats=(0, 1))
    assert find_ranges([summarise(np.array([[np.nan]]))]) == ValueRanges()


def test_what_is_outside_is_clipped_and_counted() -> None:
    values = np.array([[0.0, 0.5, 1.0], [-0.1, 1.1, np.nan]])
    levels, outside = to_eight_bits(values, (0, 1))
    assert levels.tolist() == [[0, 128, 255], [0, 255, 0]]
    assert outside == 2
    levels, outside = to_eight_bits(values, (0, 1), no_data=1.1)
    assert levels.tolist() == [[0, 128, 255], [0, 0, 0]]
    assert outside == 1


def test_a_large_image_is_scaled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.normal(0.5, 0.4, (70, 33, 3))
    whole = to_eight_bits(values, (0, 1))
    monkeypatch.setattr("momconv.data.values._BLOCK", 1000)
    parts = to_eight_bits(values, (0, 1))
    assert np.array_equal(whole[0], parts[0])
    assert whole[1] == parts[1] > 0


@pytest.mark.parametrize("pixels", [[], [1.02], [1.5, 1.2]])
def test_how_many_are_outside_is_known_without_the_image(pixels: list[float]) -> None:
    image = with_pixel(REFLECTANCE[0], *pixels)
    bounds = find(*REFLECTANCE)
    assert bounds is not None
    assert count_outside(summarise(image), bounds) == to_eight_bits(image, bounds)[1]


def test_a_third_outside_is_about_a_third() -> None:
    values = summarise(np.linspace(0, 1.5, 9999))
    assert count_outside(values, (0, 1)) == pytest.approx(3333, rel=0.3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (REFLECTANCE[0], (0, 1)),
        (with_pixel(REFLECTANCE[0], 1.02), (0, 1)),
        (REFLECTANCE[0] * 200, (0, 255)),
        (TWELVE_BIT[0], (0, 65535)),
        (grey(2500, 20), (2400, 2600)),
        (np.array([[np.nan]]), (0, 1)),
    ],
)
def test_without_a_range_the_usual_one_is_taken(image: Array, expected: ValueRange) -> None:
    assert guess_range(summarise(image)) == pytest.approx(expected, rel=0.02)


def network(ranges: ValueRanges) -> nn.Module:
    model = nn.Linear(1, 1)
    preprocessing = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), ranges=ranges)
    attach(model, Description("cifar_resnet20", 2, preprocessing))
    return model


@pytest.mark.parametrize(
    ("before", "found", "expected"),
    [
        (None, (0, 1023), (0, 1023)),
        ((0, 4095), (0, 1023), (0, 4095)),
        ((0, 1023), (0, 4095), (0, 4095)),
        ((0, 65535), (0, 4095), (0, 4095)),
        ((0, 4095), None, (0, 4095)),
    ],
)
def test_a_range_that_a_network_has_learned_is_kept_where_it_fits(
    before: ValueRange | None, found: ValueRange | None, expected: ValueRange
) -> None:
    model = network(ValueRanges(integers=before))
    notes = settle_ranges(model, ValueRanges(integers=found, floats=(0, 1)))
    assert describe(model).preprocessing.ranges == ValueRanges(integers=expected, floats=(0, 1))
    assert len(notes) == 1
    assert f"integers from 0 (black) to {expected[1]} (white)" in notes[0]


def test_eight_bit_images_have_no_range() -> None:
    model = network(ValueRanges())
    assert settle_ranges(model, ValueRanges()) == ()
    assert describe(model).preprocessing.ranges == ValueRanges()


def test_images_outside_or_without_a_range_are_named(tmp_path: Path) -> None:
    for number, image in enumerate([*REFLECTANCE, REFLECTANCE[0] + 0.9, *TWELVE_BIT]):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "a" / f"{number:02}.tif")
    findings = check_images(read_classes_folder(tmp_path)).findings
    ranges = ValueRanges(floats=(0, 1))
    outside, guessed = find_outside(findings, ranges), find_guessed(findings, ranges)
    assert [path.name for path in outside] == ["10.tif"]
    assert {path.name for path in guessed} == {f"{n}.tif" for n in range(11, 21)}
    note, warning = warn_of_values(outside, guessed, approximate=True)
    assert note.startswith("note: about ")
    assert "values in 1 image outside of the network's range" in note
    assert warning.startswith("warning: the network knows no range for the values of 10 images")
    assert warn_of_values({}, set()) == ()
