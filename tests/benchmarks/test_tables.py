from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from benchmarks import tables
from benchmarks.tables import Log, Out, find_logs, number, ratio
from momconv.planner import devices

PROGRAMS = Path(tables.__file__).parent
KEY = ("network", "method")


def row(network: str, method: str, cell: str) -> dict[str, str]:
    return {"network": network, "method": method, "MiB": cell}


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log.of("memory", torch.device("cpu"), tmp_path / "results")


def test_a_new_row_replaces_the_row_of_its_key_and_keeps_all_others(log: Log) -> None:
    log.merge([row("a", "ours", "1"), row("a", "theirs", "2"), row("b", "ours", "3")], KEY)
    log.merge([row("a", "theirs", "4"), row("c", "ours", "5")], KEY)
    log.merge([row("a", "third", "6")], KEY)
    assert log.read() == [
        row("a", "ours", "1"),
        row("a", "theirs", "4"),
        row("a", "third", "6"),
        row("b", "ours", "3"),
        row("c", "ours", "5"),
    ]


def test_a_log_is_found_again_with_the_machine_and_the_torch_in_its_name(log: Log) -> None:
    assert log.read() == []
    log.merge([row("a", "ours", "1")], KEY)
    assert list(find_logs("memory", log.path.parent)) == [log]
    assert (log.title, log.torch) == ("memory", f"torch-{torch.__version__.partition('+')[0]}")
    assert log.machine.endswith(f"{torch.get_num_threads()}-threads")


def test_a_processor_is_named_without_parentheses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("cores: 2\nmodel name\t: Intel(R) Core(TM) i7 CPU @ 3 GHz\n")
    assert tables.machine(torch.device("cpu")).startswith("Intel-Core-i7-CPU-@-3-GHz-")


def test_a_machine_may_have_underscores_in_its_name() -> None:
    log = Log(Path("speed_cpu-x86_64_torch-2.11.0.csv"))
    assert (log.title, log.machine, log.torch) == ("speed", "cpu-x86_64", "torch-2.11.0")


def test_a_failure_has_no_number_and_no_ratio() -> None:
    failure, result = row("a", "theirs", "failed: KeyError: 'x'"), row("a", "ours", "3.0")
    assert number(failure, "MiB") is None
    assert ratio(failure, result, "MiB") == ratio(result, failure, "MiB") == "–"
    assert ratio(result, row("a", "store", "2.0"), "MiB") == "1.50"


def test_every_program_that_writes_results_takes_a_folder_for_them() -> None:
    programs = {path.stem for path in PROGRAMS.glob("*.py") if "Log.of(" in path.read_text()}
    assert {"fuzz", "gpu", "memory"} <= programs
    for name in programs - {"tables"}:
        main = import_module(f"benchmarks.{name}").main
        assert get_type_hints(main, include_extras=True)["out"] == Out, name
