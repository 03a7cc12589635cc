"""Gradients that two processes sum during backward, with faults in one of them."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from runs import assert_same_tensors, small
from teams import Team, find_team
from torch import Tensor, nn

from momconv.errors import RangeOverflow
from momconv.recipe import Recipe
from momconv.training import buckets, gradients, loop
from momconv.training.buckets import Buckets
from momconv.training.finetuning import finetune
from momconv.training.processes import Processes, joined
from momconv.training.run import TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state

PLACES = ("before", "during", "after")


@pytest.fixture(scope="module")
def team() -> Team:
    return find_team()


def fail(_gradient: object = None) -> None:
    raise RangeOverflow("for once", kind="inversion.range_overflow")


def run_out(_gradient: object = None) -> None:
    raise torch.OutOfMemoryError


def train(recipe: Recipe, folder: Path, place: str = "", fault: Any = fail) -> tuple[int, int]:
    """Run, with small pieces and a fault at the third step of the second process.

    How many sums there were in all, and how many passes.
    """
    sums, passes = 0, 0

    def count(self: Processes, tensor: Tensor) -> Any:
        nonlocal sums
        sums += 1
        return begin(self, tensor)

    def add(run: TrainingRun, *args: Any) -> Tensor:
        nonlocal passes
        passes += 1
        is_due = passes == 3 and os.environ["RANK"] == "1"
        if is_due and place == "before":
            fault()
        first: Any = next(run.model.parameters())  # whose gradient is the last
        hook = first.register_hook(fault) if is_due and place == "during" else None
        try:
            loss = gradients.add_gradients(run, *args)
        finally:
            if hook:
                hook.remove()
        if is_due and place == "after":
            fault()
        return loss

    begin = Processes.begin_adding
    with (
        patch.object(buckets, "_BYTES", 2**17),
        patch.object(loop, "add_gradients", add),
        patch.object(loop, "has_to_measure", lambda *_: False),
        patch.object(Processes, "begin_adding", count),
    ):
        finetune(recipe, folder)
    return sums, passes


def test_after_a_fault_in_one_process_both_do_the_step_again(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    """Before, during and after its backward pass, when the other has sent some gradients or all."""
    recipe = small(colours, "train.epochs=1", "train.save_every=1000")
    (sums, first), (_, second) = team.do(train, recipe, tmp_path / "whole")
    pieces = sums // 4
    assert pieces > 5
    for place in PLACES:
        done = team.do(train, recipe, tmp_path / place, place)
        assert done[0][0] == done[1][0] == sums + pieces
        assert done[1][1] == second + 1
        assert_same_tensors(tmp_path / "whole", tmp_path / place)
    assert first > second  # the larger share has more micro-batches


def test_if_memory_runs_out_during_backward_both_take_smaller_parts(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    recipe = small(colours, "train.freeze_bn=true", "train.epochs=1")
    team.do(train, recipe, tmp_path / "run", "during", run_out)
    progress = load_state(RunFolder(tmp_path / "run").state).progress
    assert [(h.step, h.micro_batch) for h in progress.halvings] == [(3, 1)]
    assert progress.epoch == 1


def add_up(rank_without: int) -> list[list[float] | None]:
    """Gradients of a used, an unused and a frozen weight; one process has no pass to make."""
    with joined() as processes:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "abc"})
        model["c"].requires_grad_(requires_grad=False)
        own = Buckets(processes)
        passes = 0 if processes.rank == rank_without else 2
        for _ in range(2):  # steps
            own.begin(model, passes)
            for _ in range(passes):
                (model["a"] * (1 + processes.rank)).sum().backward()
                own.end_pass()
            own.finish()
        return [None if p.grad is None else p.grad.tolist() for p in model.values()]


@pytest.mark.parametrize(("without", "total"), [(0, 4.0), (1, 2.0), (2, 6.0)])
def test_a_gradient_is_the_sum_of_all_passes_of_all_processes(
    team: Team, without: int, total: float
) -> None:
    """One that nobody has is none, as an optimiser would let a weight of 0 gradient decay."""
    expected = [[total, total], None, None]
    assert team.do(add_up, without) == [expected, expected]
