from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momconv.errors import UsageError
from momconv.units import (
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0.5KiB", 512),
        ("3GiB", 3 * 2**30),
        ("3gib", 3 * 2**30),
        ("3G", 3 * 2**30),
        ("3GB", 3 * 10**9),
        (" 1.5  MB ", 1_500_000),
        (".5k", 512),
        ("2TiB", 2**41),
        ("12", 12),
        ("12B", 12),
    ],
)
def test_an_amount_of_memory_is_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "0.0GiB", "-1GiB", "3 elephants", "3GiB!", "1e9"])
def test_what_is_not_an_amount_of_memory_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_bytes(text)
    assert repr(text) in refused.value.message
    assert refused.value.kind == "usage.bad_value"
    assert refused.value.fix


@given(st.integers(1, 2**50))
def test_a_printed_size_reads_back_within_its_rounding(count: int) -> None:
    printed = parse_bytes(format_bytes(count))
    assert abs(printed - count) <= 0.05 * count + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.0004, "0.4 ms"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_061, "25 h 1 min"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("text", "fix"), [("90", "90%"), ("150%", "1%"), ("many", "1%")])
def test_what_is_no_share_is_refused_with_what_may_be_meant(text: str, fix: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_share(text)
    assert refused.value.fix == fix


@pytest.mark.parametrize("parse", [parse_bytes, parse_duration, parse_share])
def test_a_value_of_an_option_is_corrected_with_the_option(parse: Callable[..., object]) -> None:
    with pytest.raises(UsageError) as refused:
        parse("lots", "--budget")
    option, value = (refused.value.fix or "").split()
    assert option == "--budget"
    parse(value)
