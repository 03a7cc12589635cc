"""What else people do with a module: distributed training, scaling, compiling, exporting."""

import copy
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from networks import gradient_of, images, square, stack
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from momconv import MomentumSequential, set_strategy
from momconv.momentum.autograd import Strategy

PROCESSES = 2


def shard(rank: int) -> Tensor:
    return images(seed=10 + rank)


def start(work: Callable[[int, str], None], folder: Path) -> None:
    """Let each process do it."""
    get_context("forkserver").set_forkserver_preload([__name__])  # imported once for all
    start_processes(work, (str(folder),), nprocs=PROCESSES, start_method="forkserver")


def train_one_shard(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    net = DistributedDataParallel(stack(4).eval())  # BatchNorm apart, a mean over shards is exact
    square(net(shard(rank))).backward()
    if rank == 0:
        torch.save([gradient_of(p) for p in net.parameters()], f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_two_processes_compute_the_gradient_of_the_joint_batch(tmp_path: Path) -> None:
    start(train_one_shard, tmp_path)
    theirs = torch.load(tmp_path / "gradients.pt")
    net = stack(4).eval()

    square(net(torch.cat([shard(rank) for rank in range(PROCESSES)]))).backward()

    torch.testing.assert_close(theirs, [gradient_of(p) for p in net.parameters()])


def train_sharded(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    mesh, left = init_device_mesh("cpu", (PROCESSES,)), {}
    for strategy in get_args(Strategy):
        stage = stack(4, strategy=strategy)
        stage.find_runs(images())
        net = nn.Sequential(stage, nn.Flatten())
        for block in stage:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(net, mesh=mesh)
        for _ in range(2):
            square(net(shard(rank))).backward()
        left[strategy] = [gradient_of(p).full_tensor() for p in net.parameters()]  # type: ignore[attr-defined]
    if rank == 0:
        torch.save(left, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_sharded_blocks_that_keep_their_weights_are_exact(tmp_path: Path) -> None:
    start(train_sharded, tmp_path)
    stored, *others = torch.load(tmp_path / "gradients.pt").values()
    assert len(others) == len(get_args(Strategy)) - 1
    assert all(torch.equal(a, b) for other in others for a, b in zip(stored, other, strict=True))


def test_a_gradient_scaler_skips_the_step_after_an_overflow() -> None:
    net = stack(3)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)

    scaler.scale(square(net(images())) * 1e10).backward()
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() < 1e30
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_clipping_sees_the_gradients_of_storing_everything() -> None:
    norms = []
    for strategy in ("store", "momentum"):
        net = stack(4)
        net.strategy = strategy
        square(net(images())).backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))

    assert torch.equal(*norms)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize(("backend", "depth"), [("aot_eager", 4), ("inductor", 2)])
def test_compiled_blocks_stay_exact(backend: str, depth: int) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    options: Any = {"compile_threads": 1} if backend == "inductor" else None  # no processes
    net, gradients = stack(depth), []
    net.find_runs(images())
    blocks = [torch.compile(block, backend=backend, options=options) for block in net]
    compiled = MomentumSequential(*blocks, runs=net.runs)
    for strategy in ("store", "momentum"):
        set_strategy(compiled, strategy)
        square(compiled(images())).backward()
        gradients.append([gradient_of(p) for p in net.parameters()])
        net.zero_grad()

    assert all(map(torch.equal, *gradients))


def test_the_eval_network_can_be_exported() -> None:
    net = stack(4).eval()
    expected = net(images())

    program = torch.export.export(net, (images(),))

    torch.testing.assert_close(program.module()(images()), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the exporter's
def test_the_eval_network_runs_as_onnx(tmp_path: Path) -> None:
    net = stack(3).eval()
    expected = net(images())
    file = tmp_path / "net.onnx"

    torch.onnx.export(net, (images(),), file, dynamo=True, verbose=False)

    session = ReferenceEvaluator(str(file))
    (output,) = session.run(None, {session.input_names[0]: images().numpy()})
    # Another library's convolutions: a value may round to the next point of the grid.
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=2.0**-12)
