"""Momentum is chosen where it helps, by predictions that are checked elsewhere."""

import deep
import pytest
import torch
from torch import nn

import momconv
from momconv.errors import ResourceError
from momconv.planner.choice import WORTH, NetworkChoice, choose
from momconv.planner.plan import Plan, Request
from momconv.planner.prediction import peak_memory
from momconv.recipe import TrainRecipe
from momconv.training.network import start_training

SIDE, BATCH = 32, 8


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """Deep enough for inversion to need less than checkpoints of any number of blocks."""
    with torch.device("meta"):
        plain = deep.make()
        return momconv.convert(plain, 0).train(), momconv.convert(plain, 0.9).train()


def ask(memory: int, **asked: object) -> Request:
    return Request(SIDE, batch_size=BATCH, memory=memory, **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def least(networks: tuple[nn.Module, nn.Module]) -> int:
    """A little more than momentum takes at least for the whole batch."""
    return int(peak_memory(networks[1], BATCH, SIDE, strategy="auto").total * 1.015)


@pytest.fixture(scope="module")
def needy(networks: tuple[nn.Module, nn.Module], least: int) -> NetworkChoice:
    return choose(*networks, ask(least))


@pytest.fixture(scope="module")
def rich(networks: tuple[nn.Module, nn.Module]) -> NetworkChoice:
    return choose(*networks, ask(2**32, images=80, held_out=20, epochs=3))


def test_the_plain_network_is_chosen_where_the_batch_can_be_stored(rich: NetworkChoice) -> None:
    chosen, made = rich
    assert (chosen, made.strategy, made.micro_batch) == ("plain", "store", BATCH)
    stored, recomputed, momentum = made.alternatives
    assert (stored.network, stored.is_stored, stored.fits) == ("plain", True, True)
    assert stored.predicted_bytes == made.predicted_bytes
    assert recomputed.predicted_bytes < stored.predicted_bytes
    assert (momentum.network, momentum.fits) == ("momentum", True)
    assert momentum.seconds_per_image > stored.seconds_per_image
    assert made.reason.startswith("the plain network, 8 images at once")


def test_momentum_is_chosen_where_only_it_lets_the_batch_through(needy: NetworkChoice) -> None:
    chosen, made = needy
    assert (chosen, made.micro_batch) == ("momentum", BATCH)
    stored, recomputed, momentum = made.alternatives
    assert [stored.fits, recomputed.fits, momentum.fits] == [False, True, True]
    assert recomputed.micro_batch < BATCH == momentum.micro_batch
    assert momentum.predicted_bytes == made.predicted_bytes
    assert made.reason == (
        f"momentum, 8 images at once, where the plain network has room for {recomputed.micro_batch}"
    )


def test_where_both_let_it_through_momentum_has_to_save_a_tenth_of_the_time(
    networks: tuple[nn.Module, nn.Module], least: int
) -> None:
    stored = peak_memory(networks[0], BATCH, SIDE, strategy="store").total
    chosen, made = choose(*networks, ask((least + stored) // 2))
    _, plain, momentum = made.alternatives
    assert (plain.micro_batch, momentum.micro_batch) == (BATCH, BATCH)
    assert momentum.seconds_per_image * WORTH > plain.seconds_per_image
    assert chosen == "plain"


def test_without_batch_statistics_micro_batches_cost_nothing(
    networks: tuple[nn.Module, nn.Module], least: int
) -> None:
    """So momentum would have to be faster, and is not with fewer images at once."""
    for model in networks:
        start_training(model, TrainRecipe(freeze_bn=True))
    try:
        chosen, made = choose(*networks, ask(2 * least, images=64), None)
    finally:
        for model in networks:
            start_training(model, TrainRecipe())
            model.requires_grad_(requires_grad=True)
    _, plain, momentum = made.alternatives
    is_faster = momentum.seconds_per_image * WORTH < plain.seconds_per_image
    assert chosen == ("momentum" if is_faster else "plain")


def test_where_nothing_fits_the_error_is_that_of_the_momentum_network(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    with pytest.raises(ResourceError, match=r"does not fit: it needs .* \((auto|segment)\)"):
        choose(*networks, ask(2**19))


def test_what_was_considered_is_kept_in_the_file(rich: NetworkChoice) -> None:
    made = rich.plan
    again = Plan.from_json(made.to_json())
    assert again == made
    assert len(again.alternatives) == 3
    assert again.seconds_per_image
    assert again.epoch_seconds == pytest.approx(86 * again.seconds_per_image)
