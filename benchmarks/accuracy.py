"""How far the forward pass and the gradients are from the same network in double precision.

‖y − y*‖ / ‖y*‖ of the output, and over the gradients of all parameters, where y* comes from the
same momentum network in double precision, γ as given and the gains of ``momconv.convert``. Strategy
"momentum", BatchNorm in evaluation mode. "loop" is the same of equation (2) as it is written, in
single precision, with ordinary autograd. Networks have torchvision's random weights (heads are not
zero) and reduced widths; ``cifar_resnet20`` and ``cifar_resnet32`` the published ones if
MOMCONV_WEIGHTS names a folder that has them. Stacks are x + c B tanh(A x / s) s of 32 channels.
"""

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from benchmarks.exactness import relative_error
from benchmarks.tables import Log, Out, Row, show
from momconv import MomentumSequential, convert, load_network, set_strategy
from momconv.momentum.sequential import momentum_stages

TITLE = "accuracy"
KEY = ("network", "γ")
GAMMAS = (0.5, 0.9, 0.99)
DEEP = (0.9, 0.999, 1.0)


class Tanh(nn.Module):
    """The same function at every scale of its input."""

    def __init__(self, scale: float, weight: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.scale, self.weight = scale, weight

    def forward(self, x: Tensor) -> Tensor:
        """X + f(x)."""
        f: Tensor = self.b(torch.tanh(self.a(x / self.scale)))
        return x + self.weight * self.scale * f


class Decoder(nn.Module):
    """A small network in the manner of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 64), nn.Parameter(0.02 * torch.randn(24, 64))
        layers = (
            nn.TransformerEncoderLayer(
                64, 4, 256, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
            )
            for _ in range(12)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(64)

    def forward(self, words: Tensor) -> Tensor:
        """The logits of each next word."""
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=words.device)
        x = self.words(words) + self.places[:length]
        for layer in self.layers:
            x = layer(x, mask.to(x.dtype))
        logits: Tensor = self.norm(x) @ self.words.weight.T
        return logits


class Loop(nn.Module):
    """A stage of a plain network that follows equation (2) as it is written."""

    def __init__(self, stage: MomentumSequential) -> None:
        super().__init__()
        for name, block in stage.named_children():
            self.add_module(name, block)
        self.gamma, self.runs = stage.gamma, stage.followed

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """The blocks in turn."""
        gains = {
            n: gain for run in self.runs for n, gain in zip(run.blocks, run.gains, strict=True)
        }
        starts = {run.start for run in self.runs}
        rate, v = 1 - self.gamma if self.gamma < 1 else 1.0, torch.zeros_like(x)
        for n, block in enumerate(self.children()):
            if n not in gains:
                x = block(x, *args)
                continue
            v = self.gamma * (torch.zeros_like(x) if n in starts else v)
            v = v + rate * gains[n] * (block(x, *args) - x)
            x = x + v
        return x


class Repeated(Loop):
    """One that a loop over a list finds."""

    def __iter__(self) -> Iterator[nn.Module]:
        yield self


def written_down(model: nn.Module) -> nn.Module:
    """The network with loops in place of its stages."""
    model = copy.deepcopy(model)
    for name, stage in momentum_stages(model).items():
        loop = (Repeated if issubclass(stage.kind, nn.ModuleList) else Loop)(stage)
        if not name:
            return loop
        model.set_submodule(name, loop)
    return model


def images(side: int = 32) -> Tensor:
    """Two."""
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def make_vit() -> tuple[nn.Module, Tensor]:
    """Twelve blocks of width 64."""
    model = VisionTransformer(32, 8, 12, 2, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.get_submodule("head").weight, std=0.02)
    return model, images()


def make_convnext() -> tuple[nn.Module, Tensor]:
    """Three and nine blocks."""
    stages = [CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 9)]
    return ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=10), images()


def make_swin() -> tuple[nn.Module, Tensor]:
    """Two, two and eight blocks."""
    options = {"window_size": [4, 4], "stochastic_depth_prob": 0.0, "num_classes": 10}
    model = SwinTransformer([2, 2], 24, [2, 2, 8], [2, 4, 8], **options)
    return model, images(64)


def make_decoder() -> tuple[nn.Module, Tensor]:
    """Twelve blocks of width 64."""
    return Decoder(), torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))


def make_published(name: str, file: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A ResNet with its published weights."""
    folder = Path(os.environ.get("MOMCONV_WEIGHTS", ""))
    return lambda: (load_network(name, folder / file), images())


def make_stack(depth: int, scale: float, *, outliers: bool = False) -> tuple[nn.Module, Tensor]:
    """Blocks, and what they get, of which three channels may be 300 times as large."""
    weight = 0.3 if depth == 12 else 0.06
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)) * scale
    if outliers:
        x[:, :3] *= 300
    return nn.Sequential(*(Tanh(scale, weight) for _ in range(depth))), x


Make = Callable[[], tuple[nn.Module, Tensor]]

CASES: dict[str, tuple[Make, tuple[float, ...]]] = {
    "ViT": (make_vit, GAMMAS),
    "ConvNeXt": (make_convnext, GAMMAS),
    "Swin": (make_swin, GAMMAS),
    "GPT-2": (make_decoder, GAMMAS),
    "ResNet-20, published": (make_published("cifar_resnet20", "resnet20-12fca82f.th"), GAMMAS),
    "ResNet-32, published": (make_published("cifar_resnet32", "resnet32-d509ac18.th"), GAMMAS),
    "12 blocks, |x| ~ 1, outliers of 300": (partial(make_stack, 12, 1.0, outliers=True), GAMMAS),
}
for _depth, _gammas in ((12, GAMMAS), (300, DEEP)):
    for _scale in (1e-6, 1e-2, 1.0, 1e4):
        make = partial(make_stack, _depth, _scale)
        CASES[f"{_depth} blocks, |x| ~ {_scale:g}"] = make, _gammas


def measure(name: str) -> Iterator[Row]:
    """The rows of one network."""
    make, gammas = CASES[name]
    for gamma in gammas:
        torch.manual_seed(0)
        plain, x = make()
        model = convert(plain.eval(), gamma, stages="all", inputs=[x])
        loop = written_down(model)
        set_strategy(model, "momentum")
        truth = run(copy.deepcopy(loop).double(), x.double() if x.is_floating_point() else x)
        ours, theirs = run(model, x), run(loop, x)
        yield {"network": name, "γ": f"{gamma:g}"} | {
            f"{what}{whose}": f"{relative_error(result[n], truth[n]):.1e}"
            for n, what in enumerate(("output", "gradients"))
            for whose, result in (("", ours), (", loop", theirs))
        }


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The output and all gradients, in double precision."""
    y = model(x)
    (y / y.detach().abs().max()).sin().sum().backward()
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    return [y.detach().double()], gradients


def main(out: Out = None) -> None:
    """Compare all networks, on the CPU."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in CASES:
        try:
            rows = [*measure(name)]
        except FileNotFoundError:
            continue
        for row in rows:
            Console(stderr=True).print(*row.values())
        log.merge(rows, KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
