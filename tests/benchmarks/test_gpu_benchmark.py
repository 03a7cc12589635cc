"""The checks of a GPU check themselves on the CPU."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_checks import CHECKS, TABLE, Check, Figure, Place
from benchmarks.results import render_section
from benchmarks.tables import Log, Row
from momconv.momentum.faster import fused
from momconv.planner import allowance

SMALL = Place(torch.device("cpu"), is_small=True)


def succeed(_: Place) -> Iterator[Figure]:
    yield Figure("a", "number", 1.5, goal=True)
    yield Figure("b", "number", 2.0, goal=False, note="why")


def fail(_: Place) -> Iterator[Figure]:
    yield Figure("a", "number", 1.0)
    raise torch.OutOfMemoryError("CUDA out of memory.\nmore")


def die(_: Place) -> Iterator[Figure]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Figure("never", "sent")


def hang(_: Place) -> Iterator[Figure]:
    yield Figure("a", "number", 3.0)
    signal.pause()


def run(*checks: Check, seconds: float = 100) -> list[Row]:
    return [row for row in gpu.run(checks, SMALL, seconds) if row["figure"] != "seconds"]


def test_no_check_stops_another() -> None:
    names = {"fail": fail, "die": die, "hang": hang, "succeed": succeed}
    rows = run(*(Check(name, look, 2 if name == "hang" else 60) for name, look in names.items()))
    found = [(row["check"], row["value"], row["goal"], row["note"]) for row in rows]
    assert [cells for cells in found if cells[:2] != ("hang", "3")] == [  # if it came in time
        ("fail", "1", "–", ""),
        ("fail", "–", "missed", "OutOfMemoryError: CUDA out of memory."),
        ("die", "–", "missed", "the process died with exit code -9"),
        ("hang", "–", "missed", "stopped after 2 s"),
        ("succeed", "1.5", "reached", ""),
        ("succeed", "2", "missed", "why"),
    ]
    summary = {row["check"]: row for row in gpu.summarise(rows)}
    assert list(summary) == list(names)
    assert (summary["succeed"]["goals reached"], summary["succeed"]["goals missed"]) == ("1", "1")
    assert summary["succeed"]["the first of them"] == "b: number 2 why"


def test_what_a_gpu_gave_is_shown_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
    rows = run(Check("succeed", succeed, 60), Check("fail", fail, 60))
    Log.of(gpu.TITLE, torch.device("cuda", 0), tmp_path).merge(rows, gpu.KEY)
    text = render_section("gpu", tmp_path)
    assert "### Gpu on NVIDIA-GeForce-RTX-3060, torch-" in text
    first, second, third, fourth = text.strip().splitlines()[-4:]
    assert first == "| succeed | a | number | 1.5 | reached |  |"
    assert second == "| succeed | b | number | 2 | missed | why |"
    assert third == "| fail | a | number | 1 | – |  |"
    assert fourth.endswith("| missed | OutOfMemoryError: CUDA out of memory. |")


def test_when_time_is_up_the_rest_is_left_out() -> None:
    (row,) = run(Check("late", succeed, 60), seconds=0)
    assert (row["goal"], row["note"]) == ("missed", "no time was left")


def test_the_checks_fit_eight_minutes() -> None:
    assert sum(check.seconds for check in CHECKS) <= gpu.SECONDS == 480


@pytest.mark.parametrize(
    "look",
    [
        gpu_checks.look_at_environment,
        gpu_checks.compare_bits,
        gpu_checks.compare_strategies,
        gpu_checks.compare_predictions,
        gpu_checks.run_out_of_memory,
        gpu_checks.fill_three_gib,
    ],
)
def test_a_check_finds_all_as_it_should_be(look: gpu_checks.Look) -> None:
    figures = list(look(SMALL))
    assert figures
    assert [figure for figure in figures if figure.goal is False] == []


def test_the_methods_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_compare_speeds", lambda *_: ())
    figures = list(gpu_checks.compare_methods(SMALL))
    ratios = {f.case: f.value for f in figures if f.name == "of the same network storing all"}
    assert ratios["cifar_resnet20 32² ×2 fp32, store all, momentum"] == 1
    assert any("momconv" in case for case in ratios)
    assert all(value is not None and value > 0 for value in ratios.values())


def test_bits_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    state, y = gpu_checks.make_state((1025,), 0.9, torch.int8, torch.float32, SMALL.device)
    assert gpu_checks.count_differences(state, y, 0.9) == 0
    advance = fused.advance

    def off_by_one(
        x: torch.Tensor, low: torch.Tensor, v: torch.Tensor, *rest: object
    ) -> torch.Tensor:
        x_next = advance(x, low, v, *rest)
        v[7] += 1
        return x_next  # type: ignore[no-any-return]

    monkeypatch.setattr(fused, "advance", off_by_one)
    assert gpu_checks.count_differences(state, y, 0.9) > 0


def test_the_allowance_of_a_gpu_is_added_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    row = {"context": 5, "workspace": 7, "fragmentation": 0.25}
    rows = [
        gpu._to_row("predictions", Figure("all so far", TABLE, note=json.dumps(cells)))
        for cells in ({**row, "context": 1}, row)
    ]
    gpu.write_table(rows, SMALL, tmp_path)
    assert not list(tmp_path.iterdir())  # a CPU has none
    gpu.write_table(rows, Place(torch.device("cuda"), is_small=False), tmp_path)
    written = json.loads((tmp_path / "gpus.json").read_text())
    assert written["NVIDIA H200"] == row
    assert {*written} == {"NVIDIA H200", *allowance.read_table()}
