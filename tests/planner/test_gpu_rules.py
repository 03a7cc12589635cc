"""A GPU's types and memory on a CPU; the list of functions is PyTorch's documentation's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from momconv.planner import gpu_rules
from momconv.planner.gpu_rules import as_on_gpu
from momconv.planner.prediction import peak_memory

X = torch.randn(4, 6).bfloat16()
SINGLE: dict[str, Any] = {
    "a layer": lambda x: nn.LayerNorm(6)(x),
    "a function": lambda x: F.layer_norm(x, (6,)),
    "of torch": lambda x: torch.softmax(x, 1),
    "a method": lambda x: x.sum(),
    "an operator": lambda x: x**2,
    "an operator of the right": lambda x: 2**x,
    "a quotient": lambda x: 1 / x,
    "a keyword": lambda x: F.cross_entropy(input=x, target=torch.zeros(4, dtype=torch.long)),
    "part of another": lambda x: nn.MultiheadAttention(6, 2)(x, x, x)[1],
    "a norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "a picture": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
}
HALF: dict[str, Any] = {
    "a layer": lambda x: nn.Linear(6, 6)(x.float()),
    "an activation": lambda x: nn.PReLU()(x),
    "a product": lambda x: torch.einsum("bi,bi->b", x.float(), x),
    "padding": lambda x: F.pad(x[None], (1, 1, 1, 1), mode="reflect"),
    "a sum with a type": lambda x: x.sum(dtype=x.dtype),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], None, 0.5),
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_chooses_the_precision_of_a_gpu(half: torch.dtype) -> None:
    with FakeTensorMode(), torch.autocast("cpu", half), as_on_gpu():
        x = torch.empty(4, 6, dtype=half)
        assert {name: call(x).dtype for name, call in SINGLE.items()} == dict.fromkeys(
            SINGLE, torch.float32
        )
        assert {name: call(x).dtype for name, call in HALF.items()} == dict.fromkeys(HALF, half)
        assert torch.addcmul(x, x, x.float()).dtype == torch.float32
        assert torch.addcmul(x, x, x).dtype == half
        assert x.double().exp().dtype == torch.float64
    with as_on_gpu():  # without autocast, as on any device
        assert X.sum().dtype == torch.bfloat16
    with torch.autocast("cpu"):  # and afterwards
        assert X.softmax(1).dtype == torch.bfloat16
        assert F.pad(X[None], (1, 1, 1, 1), mode="reflect").dtype == torch.float32


def test_autocast_for_a_gpu_knows_the_functions_that_are_listed() -> None:
    listed = gpu_rules._IN_FP32 | gpu_rules._TO_FP32 | gpu_rules._IN_WIDEST
    known = gpu_rules._list_known("AutocastCUDA")
    assert listed <= known
    narrowed = known - listed
    assert {"linear", "conv2d", "matmul", "prelu", "scaled_dot_product_attention"} <= narrowed
    assert not [name for name in narrowed if "norm" in name or "loss" in name]


def test_dropout_keeps_a_byte_for_each_element() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(100, requires_grad=True)
    with as_on_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        y = F.dropout(x, 0.5)
        assert {*y.tolist()} == {0.0, 2.0}
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
    assert [tensor.dtype for tensor in kept] == [torch.bool]


def test_attention_with_dropout_takes_what_it_takes_without() -> None:
    def need(dropout: float, *, weights: bool) -> int:
        attention = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        model = Attending(attention, weights=weights)
        return peak_memory(model, 8, 64, "bf16", device="cuda").step

    assert need(0.1, weights=False) == need(0.0, weights=False)
    matrix = 8 * 4 * 256 * 256  # images, heads, tokens
    # Of weights that are asked for there are the softmax in fp32 and its copy in bf16.
    assert need(0.0, weights=True) - need(0.0, weights=False) >= 6 * matrix


class Attending(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, *, weights: bool) -> None:
        super().__init__()
        self.stem, self.attention, self.weights = nn.Conv2d(3, 32, 4, 4), attention, weights

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(x, x, x, need_weights=self.weights)
        return mixed.mean(1)  # type: ignore[no-any-return]


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
