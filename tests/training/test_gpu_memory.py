"""What a run does about a GPU's memory, without one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import PLAN, Log, make_run

from momconv.determinism import describe_tf32
from momconv.planner.allowance import find_allowance
from momconv.training import validation
from momconv.training.memory import compare_peak, enforcing_limit
from momconv.training.validation import validate
from momconv.zoo.networks import build

GPU = torch.device("cuda:1")
GIB = 2**30


def test_a_gpu_gives_no_more_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator does not count the context of CUDA, which is part of the limit."""
    caps: list[tuple[float, int | None]] = []

    def cap(fraction: float, device: int | None) -> None:
        caps.append((fraction, device))

    found = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", cap)
    with enforcing_limit(GPU, "4GiB"):
        assert caps == [((4 * GIB - find_allowance(GPU).context) / (8 * GIB), 1)]
    assert caps[1:] == [(1.0, 1)]
    caps.clear()
    with enforcing_limit(GPU, "80GiB"), enforcing_limit(torch.device("cuda"), "1MiB"):
        assert caps == [(1.0, 1), (0.0, None)]
    caps.clear()
    with enforcing_limit(GPU, None), enforcing_limit(torch.device("cpu"), "4GiB"):
        assert caps == []


@pytest.mark.parametrize(
    ("device", "measured", "told"),
    [
        ("cpu", 1.005, []),
        ("cpu", 1.5, ["warning: the peak was 1.5 GiB, above the 1.0 GiB that were planned"]),
        (
            "cuda",
            0.5,
            ["note: the peak was 512.0 MiB; planned were 1.0 GiB, context and libraries"],
        ),
        ("cuda", None, []),
    ],
)
def test_the_peak_is_compared_with_the_plan(
    colours: Path, device: str, measured: float | None, told: list[str]
) -> None:
    peak = None if measured is None else int(measured * GIB)
    run = make_run(colours, build("cifar_resnet20", 3))
    run.plan = replace(PLAN, predicted_bytes=GIB, measured_bytes=peak)
    log = Log()
    run.listener, run.device = log, torch.device(device)
    compare_peak(run)
    assert len(log.told) == len(told)
    assert all(text.startswith(start) for text, start in zip(log.told, told, strict=True))


@pytest.mark.parametrize(("device", "precision"), [("cuda", "bf16"), ("cpu", "fp32")])
def test_on_a_gpu_validation_computes_as_training_does(
    colours: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(validation, "evaluate", lambda *_, **options: asked.update(options))
    run = make_run(colours, build("cifar_resnet20", 3))
    run.plan = replace(PLAN, request=replace(PLAN.request, precision="bf16"))
    run.device = torch.device(device)
    validate(run, lambda *_: None, lambda: None)
    assert asked["precision"] == precision


IEEE, TF32 = "ieee", "tf32"


@pytest.mark.parametrize(
    ("capability", "convolutions", "linear", "text"),
    [
        ((9, 0), TF32, IEEE, "TF32 in convolutions"),
        ((8, 0), TF32, TF32, "TF32 in convolutions and linear layers"),
        ((9, 0), IEEE, IEEE, "fp32 throughout"),
        ((7, 5), TF32, TF32, "fp32 throughout"),
    ],
)
def test_it_is_told_where_a_gpu_rounds_factors(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    convolutions: str,
    linear: str,
    text: str,
) -> None:
    """Also where these were set, after which PyTorch refuses to say allow_tf32."""
    backends = SimpleNamespace(
        cudnn=SimpleNamespace(conv=SimpleNamespace(fp32_precision=convolutions)),
        cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=linear)),
    )
    cuda = SimpleNamespace(get_device_capability=lambda _: capability)
    monkeypatch.setattr("momconv.determinism.torch", SimpleNamespace(backends=backends, cuda=cuda))
    assert describe_tf32(GPU) == text


def test_by_default_convolutions_are_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert describe_tf32(GPU) == "TF32 in convolutions"
