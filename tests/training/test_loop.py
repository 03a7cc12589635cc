from pathlib import Path

import pytest
import torch
from runs import small
from torch import nn
from torch.nn import functional as F

from momconv.data.folder import find_splits
from momconv.training.loop import Job, add_gradients
from momconv.training.optimisation import make_optimizer
from momconv.training.planning import BatchPlan, Setting
from momconv.training.progress import SILENT
from momconv.training.run_folder import RunFolder
from momconv.zoo.networks import build

CPU = torch.device("cpu")
SETTING = Setting(18, 5, 5, 32, "store", "fp32", "sgd", "cpu", None)


def make_job(colours: Path, model: nn.Module) -> Job:
    recipe, splits = small(colours), find_splits(colours)
    optimizer, plan = make_optimizer(model, recipe.train), BatchPlan(SETTING, 5)
    return Job(recipe, RunFolder(Path()), splits, model, optimizer, plan, CPU, 0, SILENT)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (3, 2, 2), (5, 1, 1)])
def test_micro_batches_of_any_sizes_add_up_to_the_gradient_of_the_mean(
    colours: Path, sizes: tuple[int, ...]
) -> None:
    """In eval mode, where an image does not depend on the others, and in double precision."""
    torch.manual_seed(0)
    model = build("cifar_resnet20").double().eval()
    images, labels = torch.randn(7, 3, 32, 32, dtype=torch.float64), torch.randint(10, (7,))
    F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    theirs = gradients(model)
    model.zero_grad()
    job, parts = (
        make_job(colours, model),
        zip(images.split(sizes), labels.split(sizes), strict=True),
    )
    loss = sum(add_gradients(job, x, y, len(y) / 7) for x, y in parts)
    ours = gradients(model)
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-12)
    expected = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach())


def test_in_bf16_the_network_computes_in_bf16(colours: Path) -> None:
    model = build("cifar_resnet20")
    seen = []
    model.get_submodule("conv1").register_forward_hook(
        lambda _m, _a, output: seen.append(output.dtype)
    )
    job = make_job(colours, model)
    setting = Setting(18, 5, 5, 32, "store", "bf16", "sgd", "cpu", None)
    half = Job(
        job.recipe,
        job.folder,
        job.splits,
        model,
        job.optimizer,
        BatchPlan(setting, 5),
        CPU,
        0,
        SILENT,
    )
    add_gradients(half, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), 1.0)
    assert seen == [torch.bfloat16]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
