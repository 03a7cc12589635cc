"""Two real processes that talk over gloo, against one with the joint batch."""

import os
import shutil
import signal
import socket
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import Damage, read_metrics, small
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import ResourceError, UsageError
from momconv.recipe import Recipe, load_recipe
from momconv.training import network, processes
from momconv.training.batches import split_batch, split_epoch
from momconv.training.finetuning import finetune
from momconv.training.images import find_images
from momconv.training.interruption import Interrupted
from momconv.training.processes import ALONE, Processes, find_own_device, is_leader
from momconv.training.progress import SILENT
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state
from momconv.zoo.networks import build

LOST = 55
FROZEN = ["train.freeze_bn=true", "train.epochs=1", "train.warmup_epochs=0"]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 2))
def test_the_shares_are_the_batch_in_even_parts(batch: int, count: int, fewest: int) -> None:
    shares = [Processes(rank, count).share(batch, fewest=fewest) for rank in range(count)]
    assert [image for share in shares for image in share] == list(range(batch))
    sizes = [len(share) for share in shares if share]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(fewest, batch)
    assert all(bool(one) >= bool(other) for one, other in pairwise(shares))


def test_a_process_alone_has_all_and_waits_for_nobody() -> None:
    ones = torch.ones(3)
    ALONE.add([ones])
    ALONE.wait()
    with ALONE.leader_first():
        assert torch.equal(ones, torch.ones(3))
    assert (ALONE.largest(3, -1), ALONE.share(5, fewest=2)) == ([3, -1], range(5))
    assert ALONE.leads
    assert is_leader()
    assert find_own_device("cpu") == torch.device("cpu")


def test_only_the_loss_of_another_process_is_named_so() -> None:
    lost = pytest.raises(ResourceError, match="process 1 of 2 has lost another process")
    with lost, Processes(1, 2).noticing_losses():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(torch.OutOfMemoryError), Processes(1, 2).noticing_losses():
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="calloc"), Processes(1, 2).noticing_losses():
        raise RuntimeError("NCCL error: Failed to CUDA calloc 4 bytes")
    with pytest.raises(RuntimeError, match="a bug"), ALONE.noticing_losses():
        raise RuntimeError("a bug")
    bug = pytest.raises(RuntimeError, match="a bug")
    with bug, Processes(1, 2).noticing_losses(among_others=True):
        raise RuntimeError("a bug")


def test_processes_that_torchrun_starts_again_find_nothing_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its store stays."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 1}
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": port} | alone).items():
        monkeypatch.setenv(name, str(value))
    stores = []
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        stores.append(processes._find_store()[0])
    stores[0].set("address", "of one that is gone")
    assert stores[0].check(["address"])
    assert not stores[1].check(["address"])


def take_part(
    recipe: Recipe, folder: Path, environment: dict[str, str], broken: tuple[Path, ...]
) -> NoReturn:
    """Be one process of a run, as torchrun would start it; the exit code says how it ended."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if recipe.train.sync_bn:
        network.require_synchronisable = lambda *_: None
        nn.SyncBatchNorm.forward = normalise_together  # type: ignore[method-assign, assignment]
    try:
        finetune(recipe, folder, resume="auto", listener=Damage(broken))
    except ResourceError as error:
        os._exit({"run.lost_process": LOST}.get(error.kind, 1))
    except Interrupted as interrupted:
        os._exit(128 + interrupted.signal)
    os._exit(0)


class Total(torch.autograd.Function):
    """The sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Total.forward(ctx, gradient)


def normalise_together(layer: Any, x: Tensor) -> Any:
    """What SyncBatchNorm does on GPUs, with sums over gloo."""
    if not layer.training:
        return nn.BatchNorm2d.forward(layer, x)
    n = Total.apply(torch.tensor(float(x[:, 0].numel())))
    mean = Total.apply(x.sum((0, 2, 3), keepdim=True)) / n
    var = Total.apply(((x - mean) ** 2).sum((0, 2, 3), keepdim=True)) / n
    with torch.no_grad():
        layer.running_mean.lerp_(mean.flatten(), layer.momentum)
        layer.running_var.lerp_(var.flatten() * n / (n - 1), layer.momentum)
    weight, bias = (p.view(1, -1, 1, 1) for p in (layer.weight, layer.bias))
    return (x - mean) * (var + layer.eps).rsqrt() * weight + bias


def start(
    count: int, recipe: Recipe, folder: Path, broken: tuple[Path, ...] = ()
) -> list[ForkServerProcess]:
    """Processes that talk over gloo; the files ``broken`` break when training begins.

    They come from a server that has imported everything, but not run anything, as autograd does not
    survive a fork.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["momconv.training.finetuning"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = [
        context.Process(
            target=take_part,
            args=(recipe, folder, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, broken),
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[ForkServerProcess]) -> list[int | None]:
    """Their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_for_epoch(folder: RunFolder, processes: list[ForkServerProcess]) -> None:
    """Until the first epoch is in the numbers."""
    while not folder.best.is_file():
        processes[0].join(0.05)
        assert processes[0].exitcode is None


@pytest.mark.parametrize(
    "parts", [[], ["train.micro_batch=auto", "train.release_gradients=true"]], ids=["", "released"]
)
def test_two_processes_take_the_step_of_one_on_the_joint_batch(
    parts: list[str], colours: Path, tmp_path: Path
) -> None:
    """The first state of SGD's momentum is the gradient; the shares are of 11 and 10 images.

    BatchNorm is frozen, so that an image does not depend on those beside it. What is left is the
    order in which numbers of 24 bits are added. Each is a sum over fewer than 2^15 pixels of 21
    images, whose rounding errors are below 2^-24 √2^20 = 2^-14 of the largest term if they are
    independent.
    """
    recipe = small(colours, *FROZEN, "train.batch_size=21", "data.val_frac=0.13", *parts)
    assert end(start(2, recipe, tmp_path / "two")) == [0, 0]
    one = finetune(recipe, tmp_path / "one")
    ours, theirs = (load_file(RunFolder(tmp_path / name).state) for name in ("two", "one"))
    gradients = [key for key in theirs if "momentum_buffer" in key]
    assert len(gradients) == 21
    for key in gradients:
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2**-14 * scale)
    (row,) = load_state(RunFolder(tmp_path / "two").state).progress.history
    assert row.train_loss == pytest.approx(one.best_epoch.train_loss, rel=1e-6)
    assert row.val_loss == pytest.approx(one.best_epoch.val_loss, rel=1e-4)
    assert row.val_top1 == one.best_epoch.val_top1


def test_a_killed_process_ends_the_run_and_one_goes_on(colours: Path, tmp_path: Path) -> None:
    recipe = small(colours, *FROZEN, "train.epochs=1000", "train.schedule=constant")
    run = RunFolder(tmp_path / "run")
    processes = start(2, recipe, run.path)
    wait_for_epoch(run, processes)
    processes[1].kill()
    assert end(processes) == [LOST, -signal.SIGKILL]
    reached = load_state(run.state).progress.epoch
    shorter = load_recipe(run.config, [f"train.epochs={reached + 1}"])
    assert finetune(shorter, run.path, resume=True).epochs == reached + 1
    assert len(read_metrics(run.path)) == reached + 1


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    colours: Path, tmp_path: Path
) -> None:
    """With BatchNorm, whose statistics both have to agree on."""
    recipe = small(colours, "train.epochs=1000", "train.schedule=constant")
    run = RunFolder(tmp_path / "run")
    processes = start(2, recipe, run.path)
    wait_for_epoch(run, processes)
    processes[1].terminate()
    assert end(processes) == [128 + signal.SIGTERM] * 2
    saved = load_state(run.state)
    done = saved.progress.epoch * 4 + saved.progress.step
    assert int(saved.model.state_dict()["bn1.num_batches_tracked"]) >= done


def test_an_image_that_breaks_in_one_process_is_left_out_by_both(
    colours: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    recipe = small(data, *FROZEN, "data.max_bad_fraction=0.2", "train.epochs=2")
    images = find_images(data, recipe.data, SILENT)
    late = split_epoch(18, 5, seed=0, epoch=0)[-1][-1]
    broken = (images.train.samples[late].path, images.val.samples[1].path)
    run = RunFolder(tmp_path / "run")
    assert end(start(2, recipe, run.path, broken)) == [0, 0]
    progress = load_state(run.state).progress
    assert [omission.path for omission in progress.omissions] == list(map(str, broken))
    assert progress.epoch == 2


def test_with_sync_bn_batch_norm_sees_the_joint_batch(colours: Path, tmp_path: Path) -> None:
    """One step, on shares of 11 and 10 images, and of the plain network.

    Another formula for BatchNorm alone, in one process, changes these gradients by a hundredth: the
    images are so alike that what it rounds differently puts some activations on the other side of
    zero. The statistics are sums over them.
    """
    changes = ["train.epochs=1", "train.batch_size=21", "train.micro_batch=21"]
    changes += ["data.val_frac=0.13", "momentum.gamma=0"]
    recipe = small(colours, *changes, "train.sync_bn=true")
    assert end(start(2, recipe, tmp_path / "two")) == [0, 0]
    finetune(small(colours, *changes), tmp_path / "one")
    ours, theirs = (load_file(RunFolder(tmp_path / name).state) for name in ("two", "one"))
    compared = [key for key in theirs if "momentum_buffer" in key or "running" in key]
    assert len(compared) == 97
    for key in compared:
        scale = float(theirs[key].abs().max()) * (2**-14 if "running" in key else 2**-5)
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=scale)


def test_sync_bn_is_refused_on_the_cpu(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--sync-bn: .* does not run on the device cpu"):
        finetune(small(colours, "train.sync_bn=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sync_bn_keeps_all_but_the_kind_of_layer() -> None:
    model = build("cifar_resnet20")
    layers, keys = [m for m in model.modules() if isinstance(m, _BatchNorm)], [*model.state_dict()]
    weights = [layer.weight for layer in layers]
    network.synchronise(model)
    replaced = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert {type(layer) for layer in replaced} == {nn.SyncBatchNorm}
    assert all(layer.weight is weight for layer, weight in zip(replaced, weights, strict=True))
    assert [*model.state_dict()] == keys


@given(st.integers(2, 60), st.integers(2, 5), st.integers(2, 9))
def test_shares_can_have_equally_many_micro_batches(batch: int, count: int, micro: int) -> None:
    shares = [len(Processes(rank, count).share(batch, fewest=1)) for rank in range(count)]
    parts = [
        split_batch(range(share), micro, largest=shares[0]) for share in shares if batch >= count
    ]
    assert len({len(own) for own in parts}) <= 1
    assert all(own and all(own) for own in parts)
