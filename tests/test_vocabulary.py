from typing import get_args

import pytest
import torch

from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.measurement import static_bytes
from momconv.recipe import MomentumRecipe, TrainRecipe
from momconv.surgery.conversion import convert
from momconv.training.optimisation import make_optimizer
from momconv.vocabulary import (
    OPTIMIZERS,
    STRATEGIES,
    OptimizerName,
    Strategy,
    StrategyChoice,
)
from momconv.zoo.networks import build


def test_every_name_has_a_row() -> None:
    assert list(OPTIMIZERS) == list(get_args(OptimizerName))
    assert set(STRATEGIES) == set(get_args(StrategyChoice)) == {*get_args(Strategy), "auto"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_keeps_the_states_of_its_row(name: OptimizerName) -> None:
    recipe = TrainRecipe(optimizer=name)
    model = build("cifar_resnet20")
    optimizer = make_optimizer(model, recipe)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    kept = (item for values in optimizer.state.values() for item in values.items())
    small = ("step", "order")  # a few numbers for each parameter
    large = sum(state.nbytes for key, state in kept if torch.is_tensor(state) and key not in small)
    assert large == static_bytes(model, name).optimizer
    low, high = OPTIMIZERS[name].rates
    assert low < recipe.resolved_lr < high


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_can_be_asked_for_and_set(name: StrategyChoice) -> None:
    assert MomentumRecipe(strategy=name).strategy == name
    model = convert(build("cifar_resnet20"))
    set_strategy(model, name)
    own = {stage.strategy for stage in momentum_stages(model).values()}
    assert own == {name} or name == "auto"


def test_the_planner_tries_strategies_one_after_another() -> None:
    turns = [row.turn for row in STRATEGIES.values() if row.turn is not None]
    assert sorted(turns) == list(range(len(turns)))
