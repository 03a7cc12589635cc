import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from momconv.recipe import TrainRecipe
from momconv.training.optimisation import (
    choose_precision,
    make_optimizer,
    rate_at,
    set_rate,
    share_of_rate,
)
from momconv.zoo.networks import build


@given(st.integers(0, 50), st.integers(1, 200))
def test_the_rate_rises_to_its_top_and_then_falls_without_reaching_zero(
    warmup: int, total: int
) -> None:
    shares = [share_of_rate(step, warmup=warmup, total=total + warmup) for step in range(total)]
    assert shares[: warmup + 1] == sorted(shares[: warmup + 1])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert all(0 < share <= 1 for share in shares)


def test_the_warm_up_takes_at_most_half_of_a_short_run() -> None:
    recipe = TrainRecipe(epochs=1, lr=1, warmup_epochs=5)
    assert [rate_at(recipe, step, 4) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])


def test_more_epochs_stretch_the_schedule() -> None:
    short, long = (TrainRecipe(epochs=epochs, lr=1, warmup_epochs=0) for epochs in (2, 4))
    assert rate_at(short, 10, 5) == 0
    assert rate_at(long, 10, 5) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "kind"), [("sgd", SGD), ("adamw", AdamW)])
def test_norms_and_biases_do_not_decay(name: str, kind: type) -> None:
    model = build("cifar_resnet20")
    recipe = TrainRecipe.model_validate({"optimizer": name, "weight_decay": 0.1, "lr": 0.5})
    optimizer = make_optimizer(model, recipe)
    assert type(optimizer) is kind
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        is_weight = "bn" not in parameter_name and not parameter_name.endswith("bias")
        assert (decay[parameter] == 0.1) is (is_weight and parameter.dim() > 1), parameter_name
    assert len(decay) == len(list(model.parameters()))
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_sgd_has_momentum_as_nesterov() -> None:
    model = build("cifar_resnet20")
    group = make_optimizer(model, TrainRecipe(momentum=0.8)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    assert not make_optimizer(model, TrainRecipe(momentum=0)).param_groups[0]["nesterov"]


def test_the_cpu_computes_in_fp32_unless_told_otherwise() -> None:
    cpu = torch.device("cpu")
    assert choose_precision(TrainRecipe(), cpu) == "fp32"
    assert choose_precision(TrainRecipe(precision="bf16"), cpu) == "bf16"


def test_a_constant_rate_stays_at_its_top_after_the_warm_up() -> None:
    recipe = TrainRecipe(epochs=4, lr=1, warmup_epochs=1, schedule="constant")
    assert [rate_at(recipe, step, 2) for step in range(8)] == [0.5, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize("total", [1, 2, 3, 4, 40])
def test_one_cycle_is_pytorch_s(total: int) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = OneCycleLR(optimizer, 0.5, total_steps=total, cycle_momentum=False)
    recipe = TrainRecipe(epochs=total, lr=0.5, schedule="onecycle")
    for step in range(total):
        assert rate_at(recipe, step, 1) == pytest.approx(theirs.get_last_lr()[0])
        if step < total - 1:
            theirs.step()
