"""All of it is arithmetic, so every promise is checked on arbitrary numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momconv.planner.micro_batch import Curve, Line, largest_part, split_evenly

counts = st.integers(0, 2**40)
lines = st.builds(Line, counts, st.integers(1, 2**32))


@pytest.mark.parametrize(
    ("batch", "micro_batch", "sizes"),
    [
        pytest.param(64, 24, (22, 21, 21), id="even rather than 24, 24, 16"),
        pytest.param(64, 64, (64,), id="all at once"),
        pytest.param(64, 1000, (64,), id="never more than the batch"),
        pytest.param(64, 63, (32, 32), id="one short"),
        pytest.param(3, 1, (1, 1, 1), id="one by one"),
        pytest.param(5, 2, (3, 2), id="an odd batch in pairs"),
        pytest.param(1, 1, (1,), id="a batch of one"),
    ],
)
def test_a_batch_is_split_into_even_parts(
    batch: int, micro_batch: int, sizes: tuple[int, ...]
) -> None:
    assert split_evenly(batch, micro_batch) == sizes


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_batch_stays_whole_and_its_parts_differ_by_at_most_one(
    batch: int, micro_batch: int
) -> None:
    sizes = split_evenly(batch, micro_batch)
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("count", "batch", "micro", "largest"),
    [
        pytest.param(64, 32, 11, 11, id="as planned"),
        pytest.param(33, 32, 32, 17, id="a batch that took one image more is split"),
        pytest.param(10, 5, 2, 3, id="an odd batch in pairs"),
        pytest.param(10, 5, 1, 1, id="one by one"),
    ],
)
def test_the_largest_part_of_an_epoch(count: int, batch: int, micro: int, largest: int) -> None:
    assert largest_part(count, batch, micro) == largest


@given(lines, st.integers(0, 2**45))
def test_the_largest_batch_fits_and_one_more_image_does_not(line: Line, budget: int) -> None:
    largest = line.largest_batch(budget)
    assert line.at(largest + 1) > budget
    assert largest == 0 or line.at(largest) <= budget


@given(lines, st.integers(1, 100), st.integers(1, 100))
def test_a_line_is_recovered_from_two_points(line: Line, batch: int, more: int) -> None:
    first, second = ((b, line.at(b)) for b in (batch, batch + more))
    assert Line.through(first, second) == Line.through(second, first) == line


@given(counts, counts, st.integers(1, 100), st.integers(1, 100))
def test_a_line_is_never_below_what_was_measured(
    low: int, high: int, batch: int, more: int
) -> None:
    line = Line.through((batch, low), (batch + more, high))
    assert line.at(batch) >= low
    assert line.at(batch + more) >= high
    assert line.bytes_per_image >= 1
    assert line.fixed_bytes >= 0


@given(st.lists(lines, min_size=1, max_size=5), st.integers(0, 2**45))
def test_a_curve_fits_where_all_of_its_lines_do(several: list[Line], budget: int) -> None:
    curve = Curve(tuple(several))
    largest = curve.largest_batch(budget)
    assert curve.at(largest + 1) > budget
    assert largest == 0 or curve.at(largest) <= budget


@given(st.lists(st.tuples(counts, st.integers(1, 2**30)), min_size=1), st.integers(1, 1000))
def test_a_curve_is_the_highest_of_all_moments(moments: list[tuple[int, int]], images: int) -> None:
    low, high = ([fixed + slope * n for fixed, slope in moments] for n in (2, 32))
    curve = Curve.through((2, low), (32, high))
    assert curve.at(images) == max(fixed + slope * images for fixed, slope in moments)


def test_steps_with_other_moments_still_give_a_line_through_their_peaks() -> None:
    curve = Curve.through((2, [5, 30, 7]), (4, [50, 8]))
    assert (curve.at(2), curve.at(4), curve.at(8)) == (30, 50, 90)
