"""Opening the files that people name, without ever waiting for what comes out of a pipe."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # a named pipe that nobody writes to opens too


# In the folder of a run, the model of its best epoch, as it was last saved, and before training.
BEST, LAST, PROBE = "best.safetensors", "last.safetensors", "probe.safetensors"


def find_model_file(path: Path) -> Path:
    """Return ``path``, or the best model in it where it is the folder of a run."""
    inside = path / BEST
    return inside if inside.is_file() else path


def name_after(model: Path) -> str:
    """Return what is made of a ``model`` file may be called: by its run, if it is one of a run.

    >>> [name_after(Path("runs/ants", name)) for name in ("best.safetensors", "last.safetensors")]
    ['ants', 'ants-last']
    >>> name_after(Path("ants.safetensors"))
    'ants'
    """
    run = model.absolute().parent.name
    return {BEST: run, LAST: f"{run}-last", PROBE: f"{run}-probe"}.get(model.name, model.stem)


def is_special(path: Path) -> bool:
    """Return whether ``path`` is a named pipe, a socket or a device, or a link to one."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_regular(path: Path) -> BufferedReader:
    """Return the file ``path``, open for reading.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    if is_special(path):  # to open some devices does something
        raise _special(path)
    file = open(path, "rb", opener=open_at_once)  # noqa: SIM115 (it is for the caller to close)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it has become something else just now
        file.close()
        raise _special(path)
    return file


def read_regular(path: Path) -> bytes:
    """Return the content of the file ``path``.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


def open_at_once(name: str, flags: int) -> int:
    """Return an ``opener`` for :func:`open` that waits for nobody at the other end of a pipe."""
    return os.open(name, flags | _AT_ONCE)


def _special(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))
