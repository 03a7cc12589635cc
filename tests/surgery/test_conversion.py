import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from momconv.errors import ModelFileError, UsageError
from momconv.momentum.equations import Velocity, coefficients, weights
from momconv.momentum.sequential import MomentumSequential, momentum_stages, set_strategy
from momconv.surgery.conversion import (
    apply_schemes,
    convert,
    read_schemes,
    revert,
    set_gamma,
    summarise,
)
from momconv.zoo.description import describe
from momconv.zoo.networks import build

SIDES = {"cifar_resnet32": 32, "resnet34": 64}


@pytest.fixture(params=SIDES)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


def make(name: str = "cifar_resnet32") -> nn.Module:
    """A network with random weights and BatchNorm statistics of some images."""
    torch.manual_seed(0)
    network = build(name, num_classes=5)
    network(torch.randn(4, 3, SIDES[name], SIDES[name]))
    return network.eval()


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_keys_and_values_are_those_of_the_plain_network(plain: nn.Module) -> None:
    before, after = plain.state_dict(), convert(plain).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_original_stays_as_it_is(plain: nn.Module) -> None:
    images = pictures()
    types, output = [type(m) for m in plain.modules()], plain(images)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    converted = convert(plain)
    for parameter in converted.parameters():
        parameter.data.zero_()
    assert [type(m) for m in plain.modules()] == types
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(plain(images), output)


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_kept(training: bool) -> None:
    assert {m.training for m in convert(make().train(training)).modules()} == {training}


@pytest.mark.parametrize("stages", ["auto", "all"])
def test_gamma_0_is_the_plain_network_bit_for_bit(plain: nn.Module, stages: Any) -> None:
    kept = convert(plain, gamma=0, stages=stages)
    images = pictures()
    assert torch.equal(kept(images), plain(images))
    assert not torch.equal(convert(plain, gamma=0.5, stages=stages)(images), plain(images))


@pytest.mark.parametrize("gamma", [1e-6, 0.5, 0.9, 1])
@pytest.mark.parametrize("velocity", ["zero", "residual"])
def test_gains_give_every_residual_its_weight_back(gamma: float, velocity: Velocity) -> None:
    stage = momentum_stages(convert(make(), gamma, velocity=velocity))["layer1"]
    (run,) = stage.runs or ()
    assert len(run.gains) == 5
    regained = weights(gamma, coefficients(gamma, run.gains, velocity))
    assert regained == pytest.approx([1] * 5)
    if gamma == 0.9:
        assert weights(gamma, coefficients(gamma, [1] * 5, velocity))[-1] == pytest.approx(0.1)


def test_without_gains_every_gain_is_1() -> None:
    stages = momentum_stages(convert(make(), gain=False)).values()
    assert {gain for stage in stages for run in stage.runs or () for gain in run.gains} == {1.0}


@pytest.mark.parametrize("first", [0, 0.5])
def test_converting_twice_is_converting_the_original(plain: nn.Module, first: float) -> None:
    once, twice = convert(plain, 0.9), convert(convert(plain, first), 0.9)
    assert read_schemes(twice) == read_schemes(once)
    images = pictures()
    assert torch.equal(twice(images), once(images))


def test_the_velocity_matters_and_is_kept() -> None:
    network, images = make(), pictures()
    zero, residual = (convert(network, velocity=v, gain=False) for v in ("zero", "residual"))
    assert {s.velocity for s in momentum_stages(residual).values()} == {"residual"}
    assert not torch.equal(zero(images), residual(images))


# Which stages


def spans(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {stage.name: stage.momentum for stage in summarise(network)}


def test_auto_leaves_short_runs_alone_and_all_takes_them() -> None:
    plain = make("resnet34")  # 3, 4, 6 and 3 blocks, of which all but layer1's first fit
    auto, every = spans(convert(plain)), spans(convert(plain, stages="all"))
    assert every == {"layer1": (0, 1, 2), "layer2": (1, 2, 3)} | {
        "layer3": (1, 2, 3, 4, 5),
        "layer4": (1, 2),
    }
    assert auto == every | {"layer4": ()}


@pytest.mark.parametrize("stages", [["layer4"], "layer4"])
def test_only_the_named_stages_get_momentum(stages: str | list[str]) -> None:
    network = convert(make("resnet34"), stages=stages)
    assert spans(network) == {"layer1": (), "layer2": (), "layer3": (), "layer4": (1, 2)}
    assert [stage.gamma for stage in summarise(network)] == [0, 0, 0, 0.9]


def test_a_summary_counts_blocks_and_parameters() -> None:
    stages = summarise(make("resnet34"))
    assert [stage.blocks for stage in stages] == [3, 4, 6, 3]
    assert [stage.parameters for stage in stages] == [221_952, 1_116_416, 6_822_400, 13_114_368]


def convnext() -> nn.Module:
    torch.manual_seed(0)
    setting = (CNBlockConfig(8, 16, 3), CNBlockConfig(16, None, 3))
    network: nn.Module = ConvNeXt(list(setting), num_classes=5)
    return network


def test_stages_inside_a_sequential_are_found_and_it_recomputes_what_is_between_them() -> None:
    plain = convnext()
    network = convert(plain)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert spans(network) == {
        "features.1": (0, 1, 2),
        "features.2": (),
        "features.3": (0, 1, 2),
    } | {"classifier": ()}

    calls: list[None] = []
    for transition in map(network.get_submodule, ("features.0", "features.2")):
        transition.register_forward_hook(lambda *_: calls.append(None))
    gradients = []
    for strategy in ("store", "auto"):
        set_strategy(network, strategy)
        network.zero_grad()
        network(pictures()).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])

    assert len(calls) == 2 + 4  # once each where all is stored, else twice
    assert all(map(torch.equal, *gradients))


def test_a_sequential_around_stages_is_no_stage() -> None:
    with pytest.raises(UsageError) as error:
        convert(convnext(), stages=["features"])
    assert error.value.fix == "--stages with some of features.1, features.3"


@pytest.mark.parametrize("stages", [["layer9"], ["conv1"], ["layer2.0.downsample"], [""]])
def test_a_stage_without_a_run_is_named_with_those_that_have_one(stages: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        convert(make("resnet34"), stages=stages)
    assert repr(stages[0]) in error.value.message
    assert error.value.fix == "--stages with some of layer1, layer2, layer3, layer4"


def test_a_part_of_a_stage_s_name_is_no_name() -> None:
    with pytest.raises(UsageError, match="in 'layer12'"):
        convert(make("resnet34"), stages="layer12")


def test_a_network_without_runs_is_refused() -> None:
    with pytest.raises(UsageError, match="no two consecutive residual blocks"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, 1e-9, float("nan")])
def test_gamma_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(UsageError, match="gamma is"):
        convert(make(), gamma)
    with pytest.raises(UsageError, match="gamma is"):
        set_gamma(convert(make()), gamma)
    with pytest.raises(ModelFileError, match="gamma is"):
        apply_schemes(build("cifar_resnet20"), {"layer1": GOOD | {"gamma": gamma}})


# Schemes


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("velocity", ["zero", "residual"])
def test_schemes_convert_the_plain_network_again(gamma: float, velocity: Velocity) -> None:
    plain = make()
    converted = convert(plain, gamma, velocity=velocity)
    schemes = read_schemes(converted)
    again = copy.deepcopy(plain)
    apply_schemes(again, schemes)
    assert read_schemes(again) == schemes
    images = pictures()
    assert torch.equal(again(images), converted(images))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)
NAMES = st.sampled_from(["layer1", "layer2", "fc", "conv1", ""]) | st.text()
GOOD = {"gamma": 0.9, "velocity": "zero", "runs": []}


@given(NAMES, st.dictionaries(st.sampled_from(list(GOOD)) | st.text(), JSON, max_size=4))
@settings(max_examples=100, deadline=None)
def test_nonsense_is_refused(name: str, scheme: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        apply_schemes(build("cifar_resnet20"), {name: scheme})


@given(st.sampled_from(list(GOOD)), JSON)
@settings(max_examples=100, deadline=None)
def test_a_wrong_value_is_refused_or_a_right_one(key: str, value: Any) -> None:
    network = build("cifar_resnet20")
    try:
        apply_schemes(network, {"layer1": {**GOOD, key: value}})
    except ModelFileError:
        return
    stage = network.get_submodule("layer1")
    assert isinstance(stage, MomentumSequential)
    assert 0 <= stage.gamma <= 1


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 4, 4)],
        [(-1, 2, 3)],
        [(2, 2, 0)],
        [(2, 1, 1)],
        [(0, 2, 3)],
        [(0, 2, 2), (1, 3, 2)],
        [(1, 3, 2), (0, 1, 1)],
    ],
    ids=["too long", "negative", "empty", "backwards", "too many gains", "overlap", "out of order"],
)
def test_a_run_that_the_stage_does_not_have_is_refused(runs: list[tuple[int, int, int]]) -> None:
    listed = [{"start": a, "stop": b, "gains": [1.0] * n} for a, b, n in runs]
    with pytest.raises(ModelFileError, match="in layer1 there are 3 blocks"):
        apply_schemes(build("cifar_resnet20"), {"layer1": {**GOOD, "runs": listed}})


def test_what_was_reverted_is_the_plain_network_again() -> None:
    plain = build("resnet18", 7).eval()
    momentum = convert(plain, 0.9, stages="all")
    again = revert(momentum)
    images = torch.randn(2, 3, 64, 64)
    assert type(again) is type(plain)
    assert torch.equal(again(images), plain(images))
    assert not torch.equal(again(images), momentum(images))
    assert describe(again) == describe(plain)
    assert not again.training


def test_a_network_without_a_description_is_reverted_to_its_own_class() -> None:
    plain = resnet18(num_classes=5).eval()
    again = revert(convert(plain, stages="all"))
    images = pictures()
    assert [type(module) for module in again.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(again(images), plain(images))


def test_an_encoder_with_a_padding_mask_computes_the_same_in_inference() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain, x = nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    converted = convert(plain, stages="all", inputs=[x])
    y = converted(x, src_key_padding_mask=padding)[~padding]

    again = apply_schemes(copy.deepcopy(plain), read_schemes(converted))
    for network in (converted, again, copy.deepcopy(converted).requires_grad_(False)):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                inferred = network(x, src_key_padding_mask=padding)
            assert torch.allclose(inferred[~padding], y, atol=1e-6)
    assert revert(convert(converted, stages="all", inputs=[x])).use_nested_tensor
    assert plain.use_nested_tensor


def test_the_range_can_be_told() -> None:
    stages = momentum_stages(convert(make(), largest=100.0))
    assert [run.exponent for stage in stages.values() for run in stage.runs or ()] == [9, 9, 9]
    for largest in (0.0, -1.0, float("nan"), float("inf"), "a"):
        with pytest.raises(UsageError, match="must be a number above 0"):
            convert(make(), largest=largest)  # type: ignore[arg-type]
