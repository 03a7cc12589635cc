import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from momconv.planner import allowance
from momconv.planner.allowance import DEFAULT, TABLE, Allowance, find_allowance, held_bytes
from momconv.planner.search import plan

GPU = torch.device("cuda")
MIB = 2**20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU that was measured."""
    table = tmp_path / "gpus.json"
    row = {"context": 300 * MIB, "workspace": 40 * MIB, "fragmentation": 0.01}
    table.write_text(json.dumps({"NVIDIA A": row}))
    monkeypatch.setattr(allowance, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A")
    allowance.read_table.cache_clear()
    yield
    allowance.read_table.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_was_measured_has_its_own_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    own = find_allowance(GPU)
    assert own == Allowance(context=300 * MIB, workspace=40 * MIB, fragmentation=0.01)
    assert own.total(1000 * MIB) == 350 * MIB
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B")
    assert find_allowance(GPU) == DEFAULT


def test_a_gpu_that_is_not_there_has_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_allowance(torch.device("cuda:1")) == DEFAULT
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_allowance(GPU) == DEFAULT
    assert DEFAULT.total(0) > 2**28


def test_the_table_can_be_read() -> None:
    assert all(Allowance(**row).context > 0 for row in json.loads(TABLE.read_text()).values())
    allowance.read_table()


@pytest.mark.usefixtures("gpu")
def test_what_is_held_is_counted_once() -> None:
    """Free memory is asked for when the context exists; a plan counts it, and the weights."""
    with torch.device("meta"):
        nowhere = nn.Linear(3, 5)
    here = nn.Linear(3, 5)
    cpu = torch.device("cpu")
    assert held_bytes(here, cpu) == 4 * (15 + 5)
    assert held_bytes(nowhere, cpu) == held_bytes(here, torch.device("meta")) == 0
    assert held_bytes(here, GPU) == 300 * MIB


@pytest.mark.usefixtures("gpu")
def test_a_plan_within_free_memory_has_all_of_it_beside_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * MIB)
    limits: list[int] = []
    monkeypatch.setattr(
        "momconv.planner.search.search",
        lambda model, request: limits.append(request.find_limit(model)),
    )
    plan(nn.Linear(3, 5), 32, device="cuda")
    assert limits == [int(1020 * MIB * 0.9) + 300 * MIB]
