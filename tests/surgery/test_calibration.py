import copy
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.data.folder import read_classes_folder
from momconv.data.source import ImageSet
from momconv.errors import DataError
from momconv.evaluation import evaluate
from momconv.momentum.sequential import MomentumSequential
from momconv.surgery.calibration import calibrate
from momconv.surgery.conversion import convert
from momconv.surgery.imitation import trainable_gains
from momconv.zoo.description import describe
from momconv.zoo.networks import build
from momconv.zoo.weights import load_network


def small() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=0.3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout())


def statistics(net: nn.Sequential, index: int) -> tuple[Tensor, Tensor]:
    """The running mean and variance of one layer."""
    layer = net[index]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def batches(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 6, 6) * (n + 1) for n in range(count)]


def test_one_batch_gives_its_own_statistics() -> None:
    net, (images,) = small(), batches(1)
    assert calibrate(net, [images]).layers == 2
    features = net[0](images).transpose(0, 1).flatten(1)
    mean, variance = statistics(net, 1)
    assert torch.allclose(mean, features.mean(1), atol=1e-6)
    assert torch.allclose(variance, features.var(1), rtol=1e-5)


def test_batches_count_the_same() -> None:
    net, images = small(), batches(3)
    calibrate(net, images)
    features = [net[0](batch).transpose(0, 1).flatten(1) for batch in images]
    variance = torch.stack([part.var(1) for part in features]).mean(0)
    assert torch.allclose(statistics(net, 1)[1], variance, rtol=1e-5)


def test_what_was_estimated_before_is_forgotten() -> None:
    net, other = small(), small()
    calibrate(other, [10 * batch for batch in batches(2)])
    calibrate(net, batches(2))
    calibrate(other, batches(2))
    assert all(map(torch.equal, statistics(net, 3), statistics(other, 3)))


def test_only_batchnorm_s_buffers_change() -> None:
    net = convert(build("cifar_resnet20"))
    before = copy.deepcopy(net.state_dict())
    calibrate(net, [torch.randn(4, 3, 32, 32)])
    buffers = dict(net.named_buffers())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) != (key in buffers), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_flags_are_as_before_also_after_a_failure(training: bool, fails: bool) -> None:
    net = small().train(training)
    net[2].train(not training)
    flags = [module.training for module in net.modules()]
    if fails:
        with pytest.raises(RuntimeError):
            calibrate(net, [*batches(1), torch.randn(1, 5, 6, 6)])
    else:
        calibrate(net, batches(1))
    assert [module.training for module in net.modules()] == flags
    assert [layer.momentum for layer in net if isinstance(layer, nn.BatchNorm2d)] == [0.3, 0.1]


def interrupted() -> Iterator[Tensor]:
    yield from batches(1)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("images", "error"), [(iter([]), DataError), (interrupted(), KeyboardInterrupt)]
)
def test_statistics_stay_unless_all_images_were_seen(
    images: Iterator[Tensor], error: type[BaseException]
) -> None:
    net = small()
    calibrate(net, batches(2))
    before = copy.deepcopy(net.state_dict())

    with pytest.raises(error):
        calibrate(net, images)

    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_dropout_is_off_and_nothing_is_kept_for_backward() -> None:
    net, seen = small(), list[tuple[bool, bool]]()
    net[4].register_forward_hook(
        lambda _, args, out: seen.append((torch.equal(args[0], out), out.requires_grad))
    )
    calibrate(net, batches(1))
    assert seen == [(True, False)]


def test_layers_that_keep_no_statistics_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert calibrate(net, batches(1)).layers == 0


# With published weights and real images


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training and 50 test images of each of CIFAR-10's classes."""
    root = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(shared / "data" / "cifar10-images.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        random.Random(0).shuffle(names)
        taken: dict[str, int] = {}
        for name in names:
            folder = name.rpartition("/")[0]
            taken[folder] = taken.get(folder, 0) + 1
            if taken[folder] <= 50:
                archive.extract(name, root)
    return root / "cifar10"


def test_calibration_and_gains_keep_a_pretrained_network(shared: Path, cifar: Path) -> None:
    plain = load_network("cifar_resnet20", shared / "weights" / "resnet20-12fca82f.th")
    held_out = read_classes_folder(cifar / "val")
    assert len(held_out.samples) == 500
    original = top1(plain, held_out)
    swapped = top1(convert(plain, stages="all", gain=False), held_out)
    compensated = convert(plain, stages="all")
    files = choose_images(cifar / "train", 500, seed=0)
    calibrate(compensated, CalibrationImages(files, describe(plain).preprocessing))
    assert original > 0.75
    assert swapped < 0.4
    assert top1(compensated, held_out) > original - 0.05


def test_the_original_s_outputs_bring_it_closer_still(shared: Path, cifar: Path) -> None:
    plain = load_network("cifar_resnet20", shared / "weights" / "resnet20-12fca82f.th")
    model = convert(plain, stages="all")
    files = choose_images(cifar / "train", 200, seed=0)
    images = CalibrationImages(files, describe(plain).preprocessing)
    imitation = calibrate(model, images, plain).imitation
    assert imitation is not None
    assert imitation.after < 0.7 * imitation.before


def top1(network: nn.Module, images: ImageSet) -> float:
    return evaluate(network, images, batch_size=100).top1


def adapted(scale: float) -> nn.Module:
    """A network whose statistics are those of images of some scale."""
    torch.manual_seed(0)
    network = build("cifar_resnet20", num_classes=5)
    calibrate(network, pictures(scale))
    return network


def pictures(scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(20, 3, 16, 16, generator=generator) for _ in range(2)]


def test_statistics_that_bring_the_network_closer_to_the_original_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 1)
    original = adapted(1)
    model = convert(original, 0.9, stages="all", gain=False)
    assert calibrate(model, pictures(1), original).layers == 19
    assert dict(model.named_buffers())["bn1.num_batches_tracked"] == 2


def test_statistics_of_unlike_images_are_not_taken_where_the_rule_changes_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 1)
    original = adapted(1)
    model = convert(original, 1e-3, stages="all")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert calibrate(model, pictures(5), original).layers == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_gains_are_kept_as_they_were_trained_where_a_block_is_used_several_times() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(super().forward(x))

    torch.manual_seed(0)
    shared, other, x = Block(4, 4), Block(4, 4), torch.randn(3, 4)
    net = MomentumSequential(shared, shared, other, shared)
    net(x)
    with trainable_gains(net) as factors, torch.no_grad():
        for n, factor in enumerate(factors):
            factor.fill_(1.5 + n)
        trained = net(x)
    # On the grid a residual counts in whole steps, before its gain or after it.
    assert torch.allclose(net(x), trained, atol=1e-3)
    assert [run.gains for run in net.runs or ()] == [(1.5, 1.5, 2.5, 1.5)]


@pytest.mark.parametrize(("most", "steps"), [(10, 2), (60, 4), (None, 8)])
def test_it_reads_no_more_images_than_it_may(most: int | None, steps: int) -> None:
    original = adapted(1)
    done = calibrate(convert(original), pictures(1), original, most_images=most)
    assert done.imitation is not None
    assert done.imitation.steps == steps


def test_where_memory_runs_out_statistics_are_those_of_smaller_batches() -> None:
    """A pass that fails counts for no layer, also not for those before the one that failed."""
    net, images = small(), batches(3)
    expected = copy.deepcopy(net)
    calibrate(expected, [part for batch in images for part in batch.split(4)])

    def exhaust(_module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 4:
            raise RuntimeError("bad allocation")

    hook = net[3].register_forward_pre_hook(exhaust)
    calibrate(net, images)
    hook.remove()
    ours, theirs = net.state_dict(), expected.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
