"""A folder that belongs to one process at a time.

The claim is a lock of the operating system on a file in the folder: it ends with the process, also
with one that is killed, whose file then stays but claims nothing.
"""

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from momconv.errors import ResourceError

NAME = ".momconv.lock"
_PATIENCE = 0.5  # seconds; another process may be asking just now
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of some network file systems


@contextmanager
def claim(folder: Path, tell: Callable[[str], None], *, fix: str | None = None) -> Iterator[None]:
    """Keep other processes that claim ``folder`` out of it inside; a claim may be within another.

    The folder is made, with those above it; of what was made, nothing stays that is still empty.

    Args:
        folder: The folder.
        tell: Hears if its file system knows no locks, so that nobody is kept out.
        fix: What helps if another process has it.

    Raises:
        ResourceError: Another process has it.
        OSError: It cannot be made, or not be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / NAME
    lock = FileLock(file, _PATIENCE, is_singleton=True, fallback_to_soft=False, on_acquired=_sign)
    with ExitStack() as undo:
        for path in reversed(made):
            undo.callback(_remove_if_empty, path)
        # In this order, after what is inside: the lock's file goes, the lock is given up, the
        # empty folders go.
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            undo.callback(lock.release)
            if lock.lock_counter == 1:
                undo.callback(_remove, file)
        except Timeout:
            raise _in_use(folder, file, fix) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            undo.callback(_remove, file)
            tell(f"warning: {folder} is where files have no locks: start nothing else into it")
        yield


def is_claimed(folder: Path) -> bool:
    """Return whether another process has ``folder`` just now."""
    if not (folder / NAME).is_file():
        return False
    try:
        with claim(folder, lambda _: None):
            return False
    except ResourceError:
        return True


def _sign(descriptor: int) -> None:
    """Write down who has the lock."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _in_use(folder: Path, file: Path, fix: str | None) -> ResourceError:
    who = "another process"
    with suppress(OSError, ValueError, KeyError, TypeError):  # it may have gone, or be starting
        holder = json.loads(file.read_bytes())
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    return ResourceError(
        f"{folder} is in use by {who}\none run at a time writes into a folder; wait until that one "
        "ends (Ctrl-C there, or kill, ends and saves it)",
        kind="output.in_use",
        fix=fix,
    )


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
