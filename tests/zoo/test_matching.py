import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from momconv.errors import ModelFileError
from momconv.zoo.matching import recognise
from momconv.zoo.networks import build, outline
from momconv.zoo.weights import load_network

NAME = "cifar_resnet20"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A network's, of five classes."""
    torch.manual_seed(0)
    return build(NAME, 5).state_dict()


def _before(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("linear.")}


def _other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in state.items()}


def _load(path: Path, content: object, *, new_head: bool = False) -> tuple[nn.Module, list[str]]:
    torch.save(content, path)
    told: list[str] = []
    return load_network(NAME, path, new_head=new_head, tell=told.append), told


def _is_loaded(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = network.state_dict()
    return all(torch.equal(state[name], value) for name, value in weights.items())


def test_plain_containers_need_no_word(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pth"
    for content in (
        weights,
        {"model": {"state_dict": weights}},
        Namespace(net=weights),
        (weights,),
    ):
        network, told = _load(path, content)
        assert _is_loaded(network, weights)
        assert told == []


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "_orig_mod.module.net.", "module.module.", "a-b_c.0."]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_any_prefix_is_found_and_told(
    tmp_path: Path, weights: dict[str, Tensor], prefix: str, suffix: str
) -> None:
    path, told = tmp_path / f"net{suffix}", list[str]()
    content = _before(prefix, weights) | {"loss.weight": torch.ones(5)}
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    network = load_network(NAME, path, tell=told.append)
    assert _is_loaded(network, weights)
    assert told == [
        f"note: {path}: took the network with the prefix {prefix!r}, and dropped that; "
        "1 tensor beside it left out: loss.weight"
    ]


@pytest.mark.parametrize(
    ("leading", "following"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("model/", "model_ema/"),
        ("state_dict/student.", "state_dict/teacher."),
        ("online_network.", "target_network."),
        ("", "ema."),
    ],
)
def test_of_two_networks_the_one_that_was_trained_is_taken(
    tmp_path: Path, weights: dict[str, Tensor], leading: str, following: str
) -> None:
    content: dict[str, object] = {}
    for prefix, state in ((following, _other(weights)), (leading, weights)):
        place, slash, own = prefix.rpartition("/")
        inside = content.setdefault(place, {}) if slash else content
        assert isinstance(inside, dict)
        inside |= _before(own, state)
    network, (told,) = _load(tmp_path / "net.pth", content)
    assert _is_loaded(network, weights)
    assert "; not that " in told


def test_two_networks_that_are_alike_have_to_be_told_apart(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"a": weights, "b": _other(weights)}
    with pytest.raises(ModelFileError, match="holds 2 networks that fit, in 'a', in 'b'") as caught:
        _load(tmp_path / "net.pth", content)
    monkeypatch.chdir(tmp_path)
    _, *arguments = shlex.split(str(caught.value.fix))
    subprocess.run([sys.executable, *arguments], check=True)
    assert _is_loaded(load_network(NAME, "weights.pth"), weights)


def test_the_same_network_twice_is_one(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    network, _ = _load(tmp_path / "net.pth", {"a": weights, "b": dict(weights)})
    assert _is_loaded(network, weights)


def test_wrappers_inside_a_network_are_taken_off(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    wrapped = {k.replace("layer1.", "layer1._orig_mod."): v for k, v in weights.items()}
    network, _ = _load(tmp_path / "net.pth", wrapped)
    assert _is_loaded(network, weights)


@pytest.mark.parametrize("name", ["layer1.3.conv1.weight", "layer4.0.conv1.weight", "conv2.weight"])
def test_a_further_layer_is_nothing_beside(
    tmp_path: Path, weights: dict[str, Tensor], name: str
) -> None:
    with pytest.raises(ModelFileError, match=f"1 unexpected: {name}"):
        _load(tmp_path / "net.pth", weights | {name: torch.ones(1)})


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"linear.weight": torch.ones(5, 7), "linear.bias": torch.ones(5)},
        {"linear.0.weight": torch.ones(64, 64), "linear.2.weight": torch.ones(5, 64)},
        {"linear.weight": torch.full((5, 64), torch.nan), "linear.bias": torch.ones(5)},
    ],
    ids=["none", "of-other-features", "of-two-layers", "spoilt"],
)
def test_a_network_without_a_head_of_use_serves_only_where_that_is_new(
    tmp_path: Path, weights: dict[str, Tensor], head: dict[str, Tensor]
) -> None:
    path, content = tmp_path / "net.pth", _body(weights) | head
    network, told = _load(path, content, new_head=True)
    assert _is_loaded(network, _body(weights))
    assert told == [f"note: {path} has no head that fits; the new one begins at random"]
    with pytest.raises(ModelFileError):
        _load(path, content)


@pytest.mark.parametrize("name", ["layer2.1.conv1.weight", "bn1.running_var", "linear.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor], name: str, value: float
) -> None:
    spoilt = weights[name].clone()
    spoilt.view(-1)[:3] = value
    with pytest.raises(ModelFileError) as caught:
        _load(tmp_path / "net.pth", weights | {name: spoilt})
    assert caught.value.kind == "model_file.not_finite"
    assert f"in 1 tensor: {name} (3 of {spoilt.numel():,})" in caught.value.message


def test_without_a_head_finetune_is_the_way_out(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pth"
    with pytest.raises(ModelFileError, match=f"has no head of {NAME}: linear.weight, ") as caught:
        _load(path, _before("backbone.", _body(weights)))
    assert caught.value.fix == f"momconv finetune --model {NAME} --weights {path} --data FOLDER"


def test_what_ends_with_the_head_may_be_missing_with_it(tmp_path: Path) -> None:
    state = build("convnext_tiny", 3).state_dict()
    torch.save({k: v for k, v in state.items() if "classifier" not in k}, tmp_path / "net.pth")
    network = load_network("convnext_tiny", tmp_path / "net.pth", new_head=True)
    assert torch.equal(network.get_parameter("features.0.0.weight"), state["features.0.0.weight"])
    assert network.get_parameter("classifier.0.weight").isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet44", "wide_resnet50_2"])
def test_a_network_is_recognised_whatever_its_classes(name: str) -> None:
    state = outline(name, 3).state_dict()
    assert recognise(state) == name
    assert recognise(_before("model/module.", state)) == name


def test_unknown_tensors_are_not_recognised() -> None:
    assert recognise({"a.weight": torch.ones(2, 3)}) is None
    assert recognise({"fc.weight": torch.zeros(3, 512)}) is None
