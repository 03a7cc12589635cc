"""A GPU's types and memory on a CPU; the list of functions is PyTorch's documentation's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from momconv.planner.gpu_rules import AsOnGpu
from momconv.planner.prediction import peak_memory

X = torch.randn(4, 6).bfloat16()
SINGLE: dict[str, Any] = {
    "a layer": lambda x: nn.LayerNorm(6)(x),
    "a function": lambda x: F.layer_norm(x, (6,)),
    "of torch": lambda x: torch.softmax(x, 1),
    "a method": lambda x: x.sum(),
    "an operator": lambda x: x**2,
    "a keyword": lambda x: F.cross_entropy(input=x, target=torch.zeros(4, dtype=torch.long)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_autocast_computes_it_in_single_precision(name: str) -> None:
    with torch.autocast("cpu"), AsOnGpu():
        assert SINGLE[name](X).dtype == torch.float32
        assert nn.Linear(6, 6)(X).dtype == torch.bfloat16
    with AsOnGpu():  # without autocast, as on any device
        assert X.sum().dtype == torch.bfloat16


def test_dropout_keeps_a_byte_for_each_element() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(100, requires_grad=True)
    with AsOnGpu(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        y = F.dropout(x, 0.5)
        assert {*y.tolist()} == {0.0, 2.0}
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
    assert [tensor.dtype for tensor in kept] == [torch.bool]


def test_the_peak_of_a_gpu_has_the_types_of_a_gpu() -> None:
    """Normalisations keep their inputs in single precision, which a CPU's autocast does not."""
    model: Any = ConvNeXt([CNBlockConfig(32, None, 6)], num_classes=10).train()
    in_bf16, on_gpu = (peak_memory(model, 8, 64, "bf16", device=d) for d in ("cpu", "cuda"))
    fp32_copies = 6 * 8 * 32 * 16 * 16 * 4  # of each block's input of the normalisation
    copied = sum(kind.bytes for kind in on_gpu.alive if kind.operation == "_to_copy")
    before = sum(kind.bytes for kind in in_bf16.alive if kind.operation == "_to_copy")
    assert copied - before >= fp32_copies


def test_what_does_not_cast_is_the_same_for_both() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 10))
    cpu, gpu = (peak_memory(model, 512, 2, device=device) for device in ("cpu", "cuda"))
    assert 0 <= gpu.step - cpu.step < 512 * len(gpu.alive)  # to which a GPU rounds up
