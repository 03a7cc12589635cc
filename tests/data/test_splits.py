import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momconv.data.splits import hold_out, shuffle
from momconv.errors import UsageError

LABELS = st.lists(st.integers(0, 5), max_size=80)
FRACTIONS = st.floats(0.001, 0.999)
SEEDS = st.integers(0, 2**32)


@given(LABELS, FRACTIONS, SEEDS)
def test_every_image_is_on_exactly_one_side(labels: list[int], fraction: float, seed: int) -> None:
    train, val = hold_out(labels, fraction, seed)
    assert sorted(train + val) == list(range(len(labels)))
    assert train == sorted(train)
    assert val == sorted(val)


@given(LABELS, FRACTIONS, SEEDS)
def test_no_class_loses_all_its_images_to_one_side(
    labels: list[int], fraction: float, seed: int
) -> None:
    train, val = hold_out(labels, fraction, seed)
    in_train, in_val = (Counter(labels[i] for i in side) for side in (train, val))
    for label, count in Counter(labels).items():
        assert in_train[label] >= 1
        assert in_val[label] >= 1 or count == 1


@given(LABELS, FRACTIONS, SEEDS)
def test_each_class_gives_its_fraction(labels: list[int], fraction: float, seed: int) -> None:
    _, val = hold_out(labels, fraction, seed)
    held_out = Counter(labels[i] for i in val)
    for label, count in Counter(labels).items():
        wanted = count * fraction
        assert abs(held_out[label] - wanted) <= 0.5 or held_out[label] in (1, count - 1)


@given(LABELS, FRACTIONS, SEEDS)
def test_another_class_leaves_the_choice_as_it_was(
    labels: list[int], fraction: float, seed: int
) -> None:
    _, val = hold_out(labels, fraction, seed)
    _, wider = hold_out([*labels, 9, 9, 9], fraction, seed)
    assert [i for i in wider if i < len(labels)] == val


def test_the_seed_decides() -> None:
    labels = [0] * 50 + [1] * 50
    choices = {tuple(hold_out(labels, 0.2, seed)[1]) for seed in range(10)}
    assert len(choices) == 10


def test_classes_of_one_size_are_not_held_out_alike() -> None:
    _, val = hold_out([0] * 50 + [1] * 50, 0.2, 0)
    assert [i for i in val if i < 50] != [i - 50 for i in val if i >= 50]


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_choice_is_pinned_and_free_of_pythons_hash_seed(hash_seed: str) -> None:
    code = "from momconv.data.splits import hold_out; print(hold_out([0] * 9 + [1] * 6, 0.3, 7))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "([0, 1, 2, 5, 6, 8, 9, 11, 12, 14], [3, 4, 7, 10, 13])"


def test_the_fraction_zero_holds_nothing_out() -> None:
    assert hold_out([0, 0, 1, 1], 0, 0) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20, float("nan")])
def test_a_fraction_that_is_none_is_named(fraction: float) -> None:
    with pytest.raises(UsageError, match=f"{fraction:g}") as caught:
        hold_out([0, 0], fraction, 0)
    assert caught.value.fix


@given(st.lists(st.integers()), st.integers())
def test_nothing_is_lost_and_equal_items_stay_as_many(items: list[int], seed: int) -> None:
    assert sorted(shuffle(items, seed)) == sorted(items)


def test_the_seed_decides_the_order() -> None:
    assert len({tuple(shuffle(range(50), seed)) for seed in range(10)}) == 10
