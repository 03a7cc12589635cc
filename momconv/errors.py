"""The errors a user can meet.

    MomconvError            exit code 1
    ├── UsageError          2   a wrong option, model name, recipe key or value
    ├── DataError           3   the image folder
    ├── ModelFileError      4   a checkpoint or model file
    ├── ResourceError       5   memory, disk, device or network
    │   └── OutOfMemory         memory ran out, on a GPU or a CPU
    ├── ThresholdNotMet     6   a result that is worse than what was asked for
    └── InversionError      1   the backward pass could not reconstruct an activation exactly
        ├── RangeOverflow       an activation left the fixed-point range
        └── NotReproducible     a block computed something else the second time

Every error carries a stable ``kind`` (for scripts), a message whose first line names the value
that is wrong, and, where one exists, a ``fix`` that can be pasted.
"""

from typing import ClassVar

from momconv.words import fit_screen


class MomconvError(Exception):
    """Base of all errors that are explained to the user instead of shown as a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, kind: str, fix: str | None = None) -> None:
        self.message = fit_screen(message)
        self.kind = kind
        self.fix = fix and fit_screen(fix)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\nfix: {self.fix}"


class UsageError(MomconvError):
    """A wrong option, model name, recipe key or value."""

    exit_code = 2


class DataError(MomconvError):
    """An image folder that cannot be used as it is."""

    exit_code = 3


class ModelFileError(MomconvError):
    """A checkpoint or model file that is damaged, or is not what it was taken for."""

    exit_code = 4


class ResourceError(MomconvError):
    """Memory, disk, device or network that the job needs and does not have."""

    exit_code = 5


class OutOfMemory(ResourceError):
    """Memory ran out, on a GPU or a CPU."""


class ThresholdNotMet(MomconvError):
    """A result that is worse than what was asked for."""

    exit_code = 6


class InversionError(MomconvError):
    """The backward pass did not arrive exactly where the forward pass began."""


class RangeOverflow(InversionError):
    """An activation left the range in which fixed-point addition is exact."""


class NotReproducible(InversionError):
    """A block computed something else when it was run again during the backward pass."""


class UncheckedFile(UserWarning):
    """A file of an earlier momconv, which kept no checksum in it."""
