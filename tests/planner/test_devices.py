from pathlib import Path

import pytest
import torch

from momconv.data.folder import Folder
from momconv.data.source import ImageSet
from momconv.errors import ResourceError, UsageError
from momconv.evaluation import evaluate
from momconv.planner.devices import find_device, is_there, make_current, parse_device
from momconv.planner.search import plan
from momconv.prediction import predict
from momconv.zoo.networks import build


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "sees", "fix"),
    [
        (0, "cuda", "sees no GPU", "--device cpu"),
        (2, "cuda:2", "sees 2 GPUs, numbered from 0", "--device cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str, sees: str, fix: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ResourceError, match=sees) as refused:
        find_device(name)
    assert refused.value.message.startswith(f"--device {name}: this PyTorch ({torch.__version__})")
    assert refused.value.message.endswith("CUDA_VISIBLE_DEVICES: unset")
    assert refused.value.fix == fix


def test_who_computes_there_names_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = build("cifar_resnet20")
    images = ImageSet(Folder(Path()), ("a",), ())
    for work in (
        lambda: plan(model, 2, device="cuda"),
        lambda: evaluate(model, images, device="cuda:1"),
        lambda: predict(model, [], device=torch.device("cuda")),
    ):
        with pytest.raises(ResourceError, match="sees no GPU"):
            work()


def test_a_gpu_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert find_device("cuda") == torch.device("cuda")
    assert current == []
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert make_current(torch.device("cuda:0")) == torch.device("cuda:0")
    assert current == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert make_current("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name",
    ["gpu", "cuda:x", "cuda:-1", "tpu", "", "cuda:", "cpu:", "cpu:1", "cuda:01", "cuda:٣", "CUDA"],
)
def test_what_is_no_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        find_device(name)


def test_a_gpu_may_be_asked_about_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = ("cpu", "cuda", "cuda:0", "cuda:1")
    assert [is_there(parse_device(name)) for name in names] == [True, True, True, False]
