"""Processes that work together, one after the other, as torchrun would start them."""

import os
import socket
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

Work = Callable[..., Any]  # what a process does, of a module that it can import

MOST = 4


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while job := pipe.recv():
        work, args, port, count = job
        os.environ.update(
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="test",
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        try:
            pipe.send(work(*args))
        except Exception as error:  # to be looked at by the test
            pipe.send(error)


class Team:
    """The processes, of which each piece of work takes the first few."""

    def __init__(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["momconv.training.finetuning", "torch.distributed.fsdp"])
        self._pipes = []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(rank, theirs), daemon=True).start()
            self._pipes.append(ours)

    def do(self, work: Work, *args: Any, count: int = 2) -> list[Any]:
        """Return what each of so many returns, or the error that it meets."""
        pipes = self._pipes[:count]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for pipe in pipes:
            pipe.send((work, args, port, count))
        return [pipe.recv() for pipe in pipes]


@cache
def find_team() -> Team:
    """The processes, which end with the tests."""
    return Team()
