import pytest
import torch
from torch import nn

from benchmarks.isolation import attempt
from benchmarks.methods import METHODS, make_network, select


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def loss_and_gradient(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(images).square().mean()
    loss.backward()
    first = next(model.parameters())
    assert first.grad is not None
    return loss.detach(), first.grad


@pytest.mark.parametrize("key", ["checkpoint", "checkpoint-sqrt"])
def test_checkpointing_trains_the_very_same_network(key: str, images: torch.Tensor) -> None:
    name = "cifar_resnet20"
    expected = loss_and_gradient(make_network(name), images)
    actual = loss_and_gradient(METHODS[key].prepare(make_network(name)), images)
    torch.testing.assert_close(actual, expected)


def test_couplings_and_compilation_are_for_the_networks_they_are_made_for() -> None:
    assert not {"memcnn", "revtorch", "compile-0"} & set(select("vit_l_16", []))
    assert "compile-0" in select("cifar_resnet20", [])
    assert "compile-0" not in select("resnet152", [])
    assert select("resnet152", ["momconv", "compile-0"]) == ["momconv"]


def test_a_failure_is_a_result_with_its_reason() -> None:
    assert attempt(int, "7") == 7
    assert str(attempt(int, "seven")).startswith("failed: ValueError: invalid literal")
