"""Momentum is chosen where it helps, by predictions that are checked elsewhere."""

from pathlib import Path

import pytest
import torch
from torch import nn

import momconv
from momconv.errors import ResourceError
from momconv.planner.choice import WORTH, choose
from momconv.planner.plan import Plan, Request
from momconv.planner.prediction import peak_memory
from momconv.planner.search import plan
from momconv.recipe import TrainRecipe
from momconv.training.network import start_training
from momconv.zoo.networks import build

SIDE, BATCH = 32, 8


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """Deep enough for inversion to need less than checkpoints of any number of blocks."""
    with torch.device("meta"):
        plain = build("cifar_resnet110")
        return momconv.convert(plain, 0).train(), momconv.convert(plain, 0.9).train()


def ask(memory: int, **asked: object) -> Request:
    return Request(SIDE, batch_size=BATCH, memory=memory, **asked)  # type: ignore[arg-type]


def least(model: nn.Module) -> int:
    """A little more than the whole batch takes in the way with the least memory."""
    return int(peak_memory(model, BATCH, SIDE, strategy="auto").total * 1.015)


def test_the_plain_network_is_chosen_where_the_batch_can_be_stored(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    chosen, made = choose(*networks, ask(2**32))
    assert (chosen, made.strategy, made.micro_batch) == ("plain", "store", BATCH)
    stored, recomputed, momentum = made.alternatives
    assert (stored.network, stored.is_stored, stored.fits) == ("plain", True, True)
    assert stored.predicted_bytes == made.predicted_bytes
    assert recomputed.predicted_bytes < stored.predicted_bytes
    assert (momentum.network, momentum.fits) == ("momentum", True)
    assert momentum.seconds_per_image > stored.seconds_per_image
    assert made.reason.startswith("the plain network, 8 images at once")


def test_momentum_is_chosen_where_only_it_lets_the_batch_through(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    limit = least(networks[1])
    assert plan(networks[0], SIDE, limit, BATCH).micro_batch < BATCH
    chosen, made = choose(*networks, ask(limit))
    assert (chosen, made.micro_batch) == ("momentum", BATCH)
    stored, recomputed, momentum = made.alternatives
    assert [stored.fits, recomputed.fits, momentum.fits] == [False, True, True]
    assert recomputed.micro_batch < BATCH == momentum.micro_batch
    assert momentum.predicted_bytes == made.predicted_bytes
    assert made.reason == (
        f"momentum, 8 images at once, where the plain network has room for {recomputed.micro_batch}"
    )


def test_between_the_two_it_has_to_save_a_tenth_of_the_time(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    stored = peak_memory(networks[0], BATCH, SIDE, strategy="store").total
    for share in (0.25, 0.5, 0.9):
        limit = int(least(networks[1]) + share * (stored - least(networks[1])))
        chosen, made = choose(*networks, ask(limit))
        _, plain, momentum = made.alternatives
        assert (plain.micro_batch, momentum.micro_batch) == (BATCH, BATCH)
        is_worth_it = momentum.seconds_per_image * WORTH < plain.seconds_per_image
        assert chosen == ("momentum" if is_worth_it else "plain")


def test_without_batch_statistics_micro_batches_cost_nothing(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    limit = least(networks[1])
    for model in networks:
        start_training(model, TrainRecipe(freeze_bn=True))
    try:
        made = choose(*networks, ask(limit, images=64))
    finally:
        for model in networks:
            start_training(model, TrainRecipe())
            model.requires_grad_(requires_grad=True)
    assert made.plan.alternatives[1].micro_batch <= BATCH


def test_where_nothing_fits_the_error_is_that_of_the_momentum_network(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    with pytest.raises(ResourceError, match=r"does not fit: it needs .* \((auto|segment)\)"):
        choose(*networks, ask(8 * 2**20))


def test_what_was_considered_is_kept_in_the_file(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    request = ask(2**32, images=80, held_out=20, epochs=3)
    made = choose(*networks, request).plan
    path = tmp_path / "plan.json"
    path.write_text(made.to_json())
    again = Plan.from_json(path.read_text())
    assert again == made
    assert again.alternatives == made.alternatives
    assert again.epoch_seconds == pytest.approx(
        made.seconds_per_image and 86 * made.seconds_per_image
    )
