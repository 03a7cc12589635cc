"""Networks that somebody else wrote, by docs/own-network.md."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import momconv
from momconv.cli import app
from momconv.errors import ModelFileError, UsageError
from momconv.momentum.sequential import MomentumDict, momentum_stages
from momconv.zoo import own
from momconv.zoo.description import describe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-network.md"
MODULE, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
OPTIONS = "--network mine.py:make --arg depth=4 --arg width=8"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's module, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_the_commands_of_the_page_work_and_none_runs_code_because_of_a_file(
    mine: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.with_name("photos").symlink_to(colours)
    lines = COMMANDS.splitlines()
    for line in lines:
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    plain = momconv.load_network("mine.py:make", "plain.pth", {"depth": 4, "width": 8})
    assert describe(plain).num_classes == 3

    for path in mine.parent.glob("*plain*"):
        path.unlink()
    monkeypatch.setattr(own, "make", pytest.fail)
    without = [line.replace(OPTIONS, "").replace("-o run", "-o new") for line in lines]
    resuming = "momconv finetune --resume run --epochs 2"
    for line in (*(line for line in without if line not in lines), resuming):
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 2
        assert result.output.endswith(f"fix: {OPTIONS}\n")


def test_a_run_of_ones_own_network_goes_on_where_the_function_is_named_again(
    mine: Path, colours: Path
) -> None:
    words = ["--model", "mine.py:make", "--arg", "depth=4", "--resolution", "16"]
    begun = run("finetune", *words, "--data", str(colours), "--epochs", "1", "-o", "run")
    assert begun.exit_code == 0, begun.output
    options = ["--network", "mine.py:make", "--arg", "depth=4"]
    assert f"momconv eval run/best.safetensors --data {colours} {shlex.join(options)}" in " ".join(
        begun.output.split()
    )
    resumed = run("finetune", "--resume", "run", "--epochs", "2", *options)
    assert resumed.exit_code == 0, resumed.output
    loaded = momconv.load("run/last.safetensors", own.make("mine.py:make", {"depth": 4}))
    assert describe(loaded).classes == ("blue", "green", "red")


def test_a_file_does_not_fit_what_the_function_makes_with_other_arguments(mine: Path) -> None:
    model = momconv.convert(own.make("mine.py:make", {"depth": 4}, resolution=16))
    momconv.save(model, "mine.safetensors")
    with pytest.raises(ModelFileError, match="does not fit the network that was made") as error:
        momconv.load("mine.safetensors", own.make("mine.py:make"))
    assert error.value.fix is not None
    assert error.value.fix.endswith("--network mine.py:make --arg depth=4")


def test_the_python_of_the_page_works_and_its_gradients_are_exact(mine: Path) -> None:
    names: dict[str, Any] = {}
    exec(USE, names)
    model: nn.Module = names["model"]
    (stage,) = momentum_stages(model).values()
    assert [(run.start, run.stop) for run in stage.runs or ()] == [(0, 6)]
    assert names["plain"].state_dict().keys() == model.state_dict().keys()
    assert type(names["plain"].blocks) is nn.ModuleList
    gradients = []
    for strategy in ("store", "momentum"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(0)
        model(torch.ones(2, 3, 16, 16)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_loaded_network_of_ones_own_computes_what_was_saved(mine: Path) -> None:
    model = momconv.convert(own.make("mine:make", {"classes": 5}, resolution=16)).eval()
    momconv.save(model, "file.safetensors")
    loaded = momconv.load("file.safetensors", own.make("mine:make"))  # another number of classes
    assert torch.equal(loaded(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
    assert describe(loaded).architecture == "mine:make"


WITH_A_DICTIONARY = """
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

class Block(nn.Conv2d):
    def forward(self, x):
        return x + super().forward(x).tanh()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = nn.Sequential(*(Block(3, 3, 3, padding=1) for _ in range(5)))
        self.body, self.head = IntermediateLayerGetter(blocks, {"4": "last"}), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x)["last"].mean((2, 3)))
"""


def test_a_network_with_a_dictionary_of_blocks_is_saved_and_loaded(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WITH_A_DICTIONARY, encoding="utf-8")
    name, images = f"{tmp_path}/net.py:Net", torch.randn(2, 3, 16, 16)
    model = momconv.convert(own.make(name, {}, resolution=16)).eval()
    momconv.save(model, tmp_path / "net.safetensors")
    loaded = momconv.load(tmp_path / "net.safetensors", own.make(name, {}))
    assert isinstance(loaded.get_submodule("body"), MomentumDict)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mine.py:made", {}, "has no function 'made'"),
        ("other.py:make", {}, "file does not exist: other.py"),
        ("no.such.module:make", {}, "no module 'no.such.module'"),
        ("mine.py:make", {"depht": 3}, "unexpected keyword argument 'depht'"),
        ("mine.py:torch", {}, "has no function 'torch'"),
        ("fractions:Fraction", {}, "makes a Fraction"),
    ],
)
def test_what_makes_no_network_is_explained(
    mine: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        own.make(name, arguments)


class Loop(nn.Module):
    """Six blocks, called in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        blocks = [Conditioned() for _ in range(6)]
        self.blocks = (
            nn.Sequential(*blocks) if way == "over a Sequential" else nn.ModuleList(blocks)
        )

    def forward(self, x: Tensor) -> Any:
        collected, condition = [], x.mean()
        if self.way == "by index":
            for n in range(len(self.blocks)):
                x = self.call(self.blocks[n], x, condition, n)
            return x
        for n, block in enumerate(self.blocks):
            if n == 3 and self.way in ("pool in between", f"in training {self.training}"):
                x = x.roll(1)
            x = self.call(block, x, condition, n)
            collected.append(x)
        if self.way == "take the mean":
            return torch.stack(collected).mean(0)
        return torch.cat(collected) if self.way == "collect" else x

    def call(self, block: nn.Module, x: Tensor, condition: Tensor, n: int) -> Any:
        if self.way == "by keyword":
            return block(x, condition=condition, mask=None, power=1)
        if self.way == "all by keyword":
            return block(x=x, condition=condition)
        return block(x, condition, power=n if self.way == "a number for each" else 1)


class Conditioned(nn.Module):
    """A block with other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, condition: Tensor, power: int = 1, mask: Tensor | None = None
    ) -> Tensor:
        assert mask is None
        return x + torch.tanh(self.layer(x) * condition**power)


@pytest.mark.parametrize("way", ["plain", "by keyword", "a number for each"])
def test_a_loop_may_pass_further_arguments(way: str) -> None:
    x = torch.randn(3, 4)
    model = momconv.convert(Loop(way), inputs=[x])
    assert {name: len(stage.runs or ()) for name, stage in momentum_stages(model).items()} == {
        "blocks": 1
    }
    gradients = []
    for strategy in ("store", "momentum"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("collect", "the loop over it does more"),
        ("take the mean", "the loop over it does more"),
        ("in training True", "the loop over it does more"),
        ("in training False", "the loop over it does more"),
        ("by index", "the loop over it does more"),
        ("pool in between", "the loop over it does more"),
        ("over a Sequential", "a loop calls its blocks, which belong in a ModuleList then"),
        ("all by keyword", "Conditioned 5 gets no tensor as its first positional argument"),
    ],
)
def test_blocks_that_are_called_in_another_way_are_refused_by_name(way: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"no two consecutive residual blocks.*\nblocks: {reason}"):
        momconv.convert(Loop(way), inputs=[torch.randn(3, 4)])


class Pyramid(nn.Module):
    """Hands out what each stage returns, by a loop over a Sequential around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.Sequential(*(nn.Sequential(Plain(), Plain(), Plain()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x, outputs = torch.tanh(self.stem(x)), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return torch.cat(outputs)


class Plain(Conditioned):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Staged(nn.Module):
    """Does something after each of its stages, which keep the shape of their input as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Plain(), Plain(), Plain()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for stage in self.stages:
            x = stage(x)
            total = total + x
        return total


def test_a_loop_over_stages_goes_on_doing_what_it_does_after_each() -> None:
    model, x = Staged(), torch.randn(3, 4)
    converted = momconv.convert(model, gamma=0, inputs=[x])
    assert list(momentum_stages(converted)) == ["stages.0", "stages.1"]
    assert torch.equal(converted(x), model(x))


def test_a_loop_over_stages_does_not_keep_them_from_being_converted() -> None:
    x, gradients = torch.randn(3, 4), []
    model = momconv.convert(Pyramid(), inputs=[x])
    assert list(momentum_stages(model)) == ["stages.0", "stages.1"]
    for strategy in ("store", "auto"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_a_network_that_does_not_take_the_images_is_refused_with_its_own_words(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=r"it: cannot be called with 2×3×224×224 .*: RuntimeError"):
        momconv.convert(Loop("plain"))
    assert capfd.readouterr().err == ""


TIMM: dict[str, dict[str, Any]] = {
    "resnet34": {},
    "vit_tiny_patch16_224": {"depth": 4, "drop_path_rate": 0.2},
    "mobilenetv3_small_050": {},
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 32, "num_heads": 2},  # called by keyword
    "pvt_v2_b0": {},  # called with the sides of the feature map
}


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timms_is_converted(name: str) -> None:
    torch.manual_seed(0)
    plain = own.make(f"timm:{name}", {"num_classes": 3} | TIMM[name])
    model = momconv.convert(plain, stages="all").train()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert any(stage.runs for stage in momentum_stages(model).values())
    assert describe(model).num_classes == 3
    side = 224 if name.endswith("224") else 32
    images = torch.randn(2, 3, side, side)
    gradients = []
    for strategy in ("store", "momentum", "auto"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(0)
        model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    stored, *others = gradients
    assert all(all(map(torch.equal, stored, other)) for other in others)


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError) as error:
        own.make("timm:resnet26")
    assert error.value.fix == "pip install timm"
