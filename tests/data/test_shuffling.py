from hypothesis import given
from hypothesis import strategies as st

from momconv.data.shuffling import shuffle


@given(st.lists(st.integers()), st.integers())
def test_nothing_is_lost_and_equal_items_stay_as_many(items: list[int], seed: int) -> None:
    assert sorted(shuffle(items, seed)) == sorted(items)


def test_the_seed_decides() -> None:
    assert len({tuple(shuffle(range(50), seed)) for seed in range(10)}) == 10
