"""The line and the plan are arithmetic, so every promise is checked on arbitrary numbers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momconv.errors import ResourceError
from momconv.planner.micro_batch import Line, MicroBatchPlan, StaticBytes, choose_micro_batch
from momconv.units import parse_bytes

MIB = 2**20
NOTHING = StaticBytes(weights=0, gradients=0, optimizer=0)

counts = st.integers(0, 2**40)
lines = st.builds(Line, counts, st.integers(1, 2**32))
statics = st.builds(StaticBytes, counts, counts, counts)
batch_sizes = st.integers(1, 5000)


def plan_with_room_for(images: int, line: Line, static: StaticBytes, batch: int) -> MicroBatchPlan:
    limit = static.total + line.at(images) + line.bytes_per_image - 1  # a byte short of one more
    return choose_micro_batch(line, static, limit, batch, resolution=224)


@pytest.mark.parametrize(
    ("batch", "fit", "sizes"),
    [
        pytest.param(64, 24, (22, 21, 21), id="even rather than 24, 24, 16"),
        pytest.param(64, 64, (64,), id="all at once"),
        pytest.param(64, 1000, (64,), id="never more than the batch"),
        pytest.param(64, 63, (32, 32), id="one short"),
        pytest.param(3, 1, (1, 1, 1), id="one by one"),
        pytest.param(1, 1, (1,), id="a batch of one"),
    ],
)
def test_a_batch_is_split_into_even_parts(batch: int, fit: int, sizes: tuple[int, ...]) -> None:
    plan = plan_with_room_for(fit, Line(7, 10), NOTHING, batch)
    assert plan.sizes == sizes
    assert plan.steps == len(sizes)
    assert plan.peak_bytes == 7 + 10 * sizes[0]


@given(lines, statics, batch_sizes, st.integers(1, 5000))
def test_the_batch_stays_whole_and_its_parts_differ_by_at_most_one(
    line: Line, static: StaticBytes, batch: int, fit: int
) -> None:
    sizes = plan_with_room_for(fit, line, static, batch).sizes
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(lines, statics, st.integers(0, 2**45), batch_sizes)
def test_a_plan_never_exceeds_the_limit(
    line: Line, static: StaticBytes, limit: int, batch: int
) -> None:
    try:
        plan = choose_micro_batch(line, static, limit, batch, resolution=224)
    except ResourceError:
        assert static.total + line.at(1) > limit
    else:
        assert static.total + line.at(max(plan.sizes)) == plan.peak_bytes <= limit


@given(lines, statics, batch_sizes, st.integers(1, 5000))
def test_one_step_fewer_would_not_fit(
    line: Line, static: StaticBytes, batch: int, fit: int
) -> None:
    plan = plan_with_room_for(fit, line, static, batch)
    if plan.steps > 1:
        larger = -(-batch // (plan.steps - 1))
        assert larger > fit


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


def failure(line: Line, static: StaticBytes, limit: int) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        choose_micro_batch(line, static, limit, 32, resolution=224)
    return caught.value


def test_what_does_not_fit_is_broken_down() -> None:
    static = StaticBytes(weights=20 * MIB, gradients=10 * MIB, optimizer=40 * MIB)
    error = failure(Line(10 * MIB, 100 * MIB), static, 100 * MIB)
    assert error.kind == "memory.does_not_fit"
    assert error.exit_code == 5
    assert error.message.splitlines() == [
        "a micro-batch of 1 image does not fit: it needs 180.0 MiB, the limit is 100.0 MiB",
        "weights 20.0 MiB · gradients 10.0 MiB · optimizer 40.0 MiB · one image 110.0 MiB",
    ]


def test_the_advised_resolution_fits_by_area_and_a_larger_one_does_not() -> None:
    line, limit = Line(10 * MIB, 100 * MIB), 40 * MIB
    advice = failure(line, NOTHING, limit).fix or ""
    resolution = int(re.findall(r"data\.resolution=(\d+)", advice)[0])
    assert line.fixed_bytes + line.bytes_per_image * (resolution / 224) ** 2 <= limit
    assert line.fixed_bytes + line.bytes_per_image * ((resolution + 32) / 224) ** 2 > limit


def test_no_resolution_is_advised_where_the_weights_alone_are_too_large() -> None:
    fix = failure(Line(0, MIB), StaticBytes(50 * MIB, 0, 0), 40 * MIB).fix or ""
    assert "resolution" not in fix


@given(lines, statics)
def test_the_advised_memory_is_enough(line: Line, static: StaticBytes) -> None:
    fix = failure(line, static, 0).fix or ""
    advised = parse_bytes(re.findall(r"train\.memory=(\w+)", fix)[0])
    assert choose_micro_batch(line, static, advised, 32, resolution=224).sizes
