"""Measured bytes are compared with what can be counted by hand, to the byte."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from momconv.planner import measurement
from momconv.planner.measurement import (
    available_bytes,
    measure,
    measure_step,
    per_image,
    static_bytes,
)
from momconv.planner.micro_batch import Line

CPU = torch.device("cpu")
FLOAT = 4  # bytes
SCALARS = 2 * FLOAT  # at the peak: the loss, and its gradient 1.0
WIDTH = 64


def sigmoids(count: int) -> nn.Sequential:
    """A chain in which every sigmoid keeps its output, and nothing else is kept."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3, WIDTH), *(nn.Sigmoid() for _ in range(count)))


def step(model: nn.Module, batch: int = 16, resolution: int = 1, **options: Any) -> int:
    return measure_step(model, batch, resolution, **{"precision": "fp32", "device": CPU, **options})


# Any work


def test_the_peak_is_what_is_alive_together() -> None:
    def work() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(900)
        del second, third

    assert measure(work, CPU) == 1500 * FLOAT


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_work_that_holds_twice_as_much_needs_twice_as_much(copies: int) -> None:
    assert measure(lambda: [torch.empty(1000) for _ in range(copies)], CPU) == (
        copies * 1000 * FLOAT
    )


def test_what_was_alive_before_does_not_count() -> None:
    before = torch.ones(100_000)
    assert measure(before[:10].clone, CPU) == 10 * FLOAT


def test_what_is_released_of_an_earlier_measurement_does_not_count() -> None:
    kept = list[Tensor]()
    measure(lambda: kept.append(torch.zeros(1000)), CPU)

    def work() -> None:
        kept.clear()
        torch.zeros(1000)

    assert measure(work, CPU) == 4000


def test_work_that_allocates_nothing_has_no_peak() -> None:
    assert measure(lambda: None, CPU) == 0


def test_reading_a_long_record_keeps_its_order() -> None:
    def work() -> None:
        for _ in range(5000):
            torch.empty(10)

    assert measure(work, CPU) <= 2 * 10 * FLOAT


# A step of networks that can be counted by hand


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_chain_of_sigmoids_peaks_in_the_loss(count: int) -> None:
    batch = 16
    activation = batch * WIDTH * FLOAT
    # The sigmoids' outputs, the logarithm of the softmax, and the gradients of it and its input.
    assert step(sigmoids(count), batch) == (count + 3) * activation + SCALARS


@pytest.mark.parametrize("count", [2, 5])
def test_gradients_of_weights_are_added_in_place(count: int) -> None:
    batch, width = 2, 64
    activation, weight = batch * width * FLOAT, width * width * FLOAT
    layers = (nn.Linear(width, width, bias=False) for _ in range(count))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, width, bias=False), *layers)
    # All outputs, the gradients of a layer's output and input, and of one weight, not of all.
    assert step(model, batch) == (count + 3) * activation + weight + SCALARS


def test_more_blocks_need_as_much_more_as_they_hold() -> None:
    short, long = (step(sigmoids(count)) for count in (2, 12))
    assert long - short == 10 * 16 * WIDTH * FLOAT


class Hoarder(torch.autograd.Function):
    """The identity, with ``copies`` of its input saved for no reason."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(*(x.clone() for _ in range(copies)))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        assert ctx.saved_tensors
        return gradients[0], None


class Hoarding(nn.Module):
    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return Hoarder.apply(x, self.copies)  # type: ignore[no-any-return]


def test_a_block_that_saves_more_needs_more() -> None:
    few, many = (step(nn.Sequential(*sigmoids(1), Hoarding(copies))) for copies in (1, 2))
    assert many - few == 16 * WIDTH * FLOAT


def test_bf16_halves_what_is_held() -> None:
    few, many = (step(sigmoids(count), precision="bf16") for count in (6, 12))
    assert many - few == 6 * 16 * WIDTH * FLOAT // 2


def test_the_line_predicts_other_batches_exactly() -> None:
    model = sigmoids(3)
    line = per_image(model, 1, precision="fp32", device=CPU)
    assert line == Line(SCALARS, 6 * WIDTH * FLOAT)
    assert line.at(50) == step(model, batch=50)


# What a measurement leaves behind


@pytest.fixture
def normed() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout())


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(normed: nn.Sequential, training: bool) -> None:
    normed.train(training)
    normed[1].bias.requires_grad_(False)
    gradient = normed[1].weight.grad = torch.full((8, 3), 7.0)
    before = clone_state(normed)
    step(normed)
    assert_state(normed, before)
    assert normed[1].weight.grad is gradient
    assert torch.equal(gradient, torch.full((8, 3), 7.0))
    assert normed[1].bias.grad is None
    assert normed[2].weight.grad is None
    assert [module.training for module in normed.modules()] == [training] * 5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in normed.modules())


def test_the_random_state_is_left_as_it_was(normed: nn.Sequential) -> None:
    before = torch.get_rng_state()
    step(normed)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_restored_after_a_failure(normed: nn.Sequential) -> None:
    before = clone_state(normed)
    broken = nn.Sequential(*normed, nn.Linear(5, 5))  # 8 features arrive
    with pytest.raises(RuntimeError):
        step(broken)
    assert_state(normed, before)
    assert normed[1].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_a_step_is_measured_under_no_grad_all_the_same() -> None:
    usual = step(sigmoids(2))
    with torch.no_grad():
        assert step(sigmoids(2)) == usual


# What is there whatever the batch, and what is free


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_static_bytes_are_weights_gradients_and_states(optimizer: Any, states: int) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model[0].bias.requires_grad_(False)
    static = static_bytes(model, optimizer)
    trained = (15 + 5 + 5) * FLOAT
    assert static.weights == trained + 5 * FLOAT + (10 * FLOAT + 8)  # bias; two means, a counter
    assert static.gradients == trained
    assert static.optimizer == states * trained
    assert static.total == static.weights + (1 + states) * trained


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000,000 free bytes, and a process in the group /pod/job."""
    memory = SimpleNamespace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(measurement, "_CGROUPS", tmp_path)
    monkeypatch.setattr(measurement, "_OWN_CGROUPS", tmp_path / "self")
    return tmp_path


def write_group(folder: Path, names: tuple[str, str, str], values: tuple[str, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, used, cache = values
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


V2, V1 = measurement._CGROUP_NAMES


def test_a_tenth_of_the_free_memory_is_kept_back(cgroups: Path) -> None:
    assert available_bytes(CPU) == 900_000
    assert available_bytes(CPU, headroom=0.25) == 750_000


def test_the_limit_of_a_container_counts_without_its_file_cache(cgroups: Path) -> None:
    (cgroups / "self").write_text("0::/pod/job\n")
    write_group(cgroups / "pod/job", V2, ("max", 10, 0))
    write_group(cgroups / "pod", V2, ("600000", 300_000, 100_000))
    assert available_bytes(CPU) == 360_000


def test_a_container_of_version_1_counts_too(cgroups: Path) -> None:
    (cgroups / "self").write_text("9:name=systemd:/\n4:memory:/pod/job\n0::/\n")
    write_group(cgroups / "memory", V1, ("500000", 100_000, 0))
    assert available_bytes(CPU) == 360_000


def test_a_container_roomier_than_the_machine_changes_nothing(cgroups: Path) -> None:
    (cgroups / "self").write_text("0::/\n")
    write_group(cgroups, V2, ("9000000", 0, 0))
    assert available_bytes(CPU) == 900_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_the_bytes_of_its_own_allocator() -> None:
    cuda = torch.device("cuda")
    assert measure(lambda: torch.empty(2**20, device=cuda), cuda) == 4 * 2**20
    model = sigmoids(6).to(cuda)
    assert step(model, batch=1024, device=cuda) >= 6 * 1024 * WIDTH * FLOAT
    assert available_bytes(cuda) > 0
