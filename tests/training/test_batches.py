from hypothesis import given
from hypothesis import strategies as st

from momconv.planner.micro_batch import count_steps
from momconv.training.batches import MicroBatches, split_batch, split_epoch

counts = st.integers(2, 300)
sizes = st.integers(1, 70)


@given(counts, sizes, st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_has_every_image_once(count: int, size: int, seed: int, epoch: int) -> None:
    batches = split_epoch(count, size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == count_steps(count, size)


@given(counts, st.integers(2, 70))
def test_no_image_is_left_alone_and_only_the_last_batch_is_of_another_size(
    count: int, size: int
) -> None:
    *full, last = split_epoch(count, size, seed=0, epoch=0)
    assert {len(batch) for batch in full} <= {size}
    assert 2 <= len(last) <= size + 1


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first = split_epoch(50, 8, seed=1, epoch=2)
    assert split_epoch(50, 8, seed=1, epoch=2) == first
    assert split_epoch(50, 8, seed=2, epoch=1) != first
    assert split_epoch(50, 8, seed=1, epoch=3) != first


def test_the_order_is_the_same_on_every_machine() -> None:
    assert split_epoch(7, 3, seed=0, epoch=0) == [[3, 6, 5], [0, 4, 1, 2]]


@given(st.integers(1, 100), sizes)
def test_a_batch_keeps_its_images_and_their_order(count: int, micro_batch: int) -> None:
    parts = split_batch(range(count), micro_batch)
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(2, 100), st.integers(2, 70))
def test_a_micro_batch_is_never_one_image_where_two_are_possible(
    count: int, micro_batch: int
) -> None:
    parts = split_batch(range(count), micro_batch)
    assert min(map(len, parts)) >= 2
    assert max(map(len, parts)) <= max(3, micro_batch)


def test_the_sampler_gives_the_micro_batches_of_whatever_steps_it_has() -> None:
    sampler = MicroBatches()
    assert (len(sampler), list(sampler)) == (0, [])
    sampler.steps = [[[1, 2], [3]], [[4]]]
    assert (len(sampler), list(sampler)) == (3, [[1, 2], [3], [4]])
