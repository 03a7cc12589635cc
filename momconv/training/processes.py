"""The processes of one run, as torchrun starts them. Each has a share of every batch.

They sum their gradients within the last backward pass of a step (gradients.py). Each loss is
weighted by its images, so the sum is the gradient of the joint batch, also where shares differ by
an image, or a small last batch has none for some process. Then all agree on what to do where one
ran out of memory, or met an image that cannot be read: the step is done again (lockstep.py).

Gradients that are released in backward are summed as they come. By then all agree that no forward
pass has failed. A process that fails later ends, and so do those that wait for it; the run goes on
from its last saved state.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import ResourceError
from momconv.exhaustion import is_exhaustion
from momconv.planner.devices import find_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that dies is noticed at once, so this is only for those that do not answer. Before the
# first step they wait while the leader looks at all images and calibrates the network.
_PATIENCE = timedelta(days=1)
_BACKENDS = re.compile("gloo|nccl", re.IGNORECASE)  # what their errors name


@dataclass(frozen=True, slots=True)
class Processes:
    """This process and the others of its run. The first one leads: it alone writes and speaks."""

    rank: int = 0
    count: int = 1
    on_this_machine: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, batch: int, *, fewest: int) -> range:
        """Return this process's images of a ``batch``: an even share, ``fewest`` or more, or none.

        >>> [Processes(rank, 4).share(7, fewest=2) for rank in range(4)]
        [range(0, 3), range(3, 5), range(5, 7), range(0, 0)]
        """
        shares = min(self.count, max(1, batch // fewest))
        if self.rank >= shares:
            return range(0)
        size, larger = divmod(batch, shares)
        start = self.rank * size + min(self.rank, larger)
        return range(start, start + size + (self.rank < larger))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, which is the same in all, bit for bit.

        Raises:
            ResourceError: A process is gone.
        """
        if self.count == 1:
            return
        with self.noticing_losses():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                assert work is not None
                work.wait()

    def begin_adding(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace ``tensor`` by its sum over the processes; return what waits for that.

        All processes must do so in the same order.

        Raises:
            ResourceError: A process is gone, which may be noticed later.
        """
        if self.count == 1:
            return lambda: None
        with self.noticing_losses():
            work = dist.all_reduce(tensor, async_op=True)
            assert work is not None
            if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                work.wait()  # else its thread may tell a profiler that is gone, and crash

        def wait() -> None:
            with self.noticing_losses():
                work.wait()

        return wait

    def average_statistics(self, model: nn.Module) -> None:
        """Average the statistics that BatchNorm has learnt in this step.

        Raises:
            ResourceError: A process is gone.
        """
        if self.count == 1:
            return
        statistics = list(_learnt_statistics(model))
        self.add(statistics)
        for tensor in statistics:
            tensor /= self.count

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each number among the processes.

        Raises:
            ResourceError: A process is gone.
        """
        if self.count == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        with self.noticing_losses():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(number) for number in found]

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            ResourceError: A process is gone.
        """
        self.largest(0)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the leader do what is inside, then the others; all go on together."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()
        self.wait()

    @contextmanager
    def noticing_losses(self, *, among_others: bool = False) -> Iterator[None]:
        """Name what happens when another process is gone.

        ``among_others`` is for where there are other errors too: those of backends are meant.

        Raises:
            ResourceError: It is.
        """
        try:
            yield
        except RuntimeError as error:  # what the backends raise
            if self.count == 1 or is_exhaustion(error):
                raise
            if among_others and not _BACKENDS.search(str(error)):
                raise
            raise ResourceError(
                f"process {self.rank} of {self.count} has lost another process of this run, "
                "which ended or was killed\n"
                "the run goes on once all are started again, with --resume",
                kind="run.lost_process",
                fix="torchrun … -m momconv finetune --resume FOLDER",
            ) from error


ALONE = Processes()


def is_alone() -> bool:
    """Return whether torchrun did not start this process, perhaps with others."""
    return not dist.is_torchelastic_launched()


def is_leader() -> bool:
    """Return whether this is the process that writes and speaks, if torchrun started several."""
    return is_alone() or os.environ["RANK"] == "0"


def find_own_device(name: str) -> torch.device:
    """Return the device ``name``; of several processes on one machine, each gets a GPU of its own.

    Raises:
        UsageError: ``name`` is not a device that momconv computes on.
        ResourceError: This machine has no such device, or not one for each process.
    """
    device = find_device(name)
    if device.type == "cuda" and device.index is None and not is_alone():
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return device


@contextmanager
def joined() -> Iterator[Processes]:
    """Give the processes that torchrun started, which can talk inside; else this one alone."""
    if is_alone():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, count = _find_store()
    dist.init_process_group(backend, timeout=_PATIENCE, store=store, rank=rank, world_size=count)
    try:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        yield Processes(rank, count, local)
    finally:
        dist.destroy_process_group()


def _find_store() -> "tuple[Store, int, int]":
    """Return where the processes find one another, this one's rank, and how many there are.

    torchrun keeps its store when it starts processes again, and in it the addresses of those that
    are gone. On one machine, its count of starts tells them apart; each machine has its own count.
    """
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store, rank, count


def _learnt_statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):  # has those of all processes already
            continue
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            assert module.running_mean is not None
            assert module.running_var is not None
            yield from (module.running_mean, module.running_var)
