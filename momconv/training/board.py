"""The numbers of a run for TensorBoard, an optional package."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

from momconv.errors import UsageError
from momconv.recipe import Recipe
from momconv.training.progress import EpochRow
from momconv.training.run_folder import RunFolder


def require_tensorboard(recipe: Recipe) -> None:
    """Do nothing if TensorBoard is there, or not asked for.

    Raises:
        UsageError: It is missing.
    """
    if recipe.log.tensorboard and find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard needs tensorboard, which is not installed",
            kind="usage.missing_extra",
            fix="pip install 'momconv[tensorboard]'",
        )


def write_board(folder: RunFolder, history: Sequence[EpochRow]) -> None:
    """Write what metrics.csv has, whole, in place of what was there."""
    from torch.utils.tensorboard import SummaryWriter

    before = [*folder.board.glob("events.out.*")]
    # purge_step: a TensorBoard that is running forgets what it has read.
    with SummaryWriter(folder.board, purge_step=0) as writer:
        for row in history:
            numbers = asdict(row)
            epoch = numbers.pop("epoch")
            for name, number in numbers.items():
                if number is not None:
                    writer.add_scalar(name, number, epoch)
    for file in before:
        file.unlink()
