"""Files that appear complete or not at all."""

import errno
import itertools
import os
import re
import shlex
import shutil
import socket
import tempfile
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from momconv.errors import ResourceError, UsageError
from momconv.exhaustion import is_exhaustion
from momconv.opening import is_special
from momconv.units import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota, and limit of a process
# These, those of tempfile, and those of the safetensors library, which earlier versions wrote with.
_TEMPORARY = re.compile(r"\..+\.[0-9a-z_]{8,32}\.tmp|\.tmp[0-9A-Za-z]{6}")


def require_free(path: Path, *, overwrite: bool) -> None:
    """Do nothing if ``path`` can become a new file; for use before the work that leads to it.

    Raises:
        UsageError: There is such a file, which ``overwrite`` does not give up, or such a folder.
        ResourceError: The folder that it would be in does not exist, or takes no new files.
    """
    if path.is_dir():
        raise UsageError(
            f"output is a folder: {path}", kind="usage.output_exists", fix=f"-o {path}/FILE"
        )
    require_writable(path)
    if path.exists() and not overwrite:
        raise UsageError(
            f"output file already exists: {path}",
            kind="usage.output_exists",
            fix="--overwrite\n-o FILE",
        )


def require_writable(path: Path, option: str = "-o") -> None:
    """Do nothing if the folder of ``path`` takes new files, which is tried; none is left.

    The ``option`` is what gives another path.

    Raises:
        ResourceError: It does not, or does not exist.
    """
    _require_place(path)
    try:
        with tempfile.TemporaryFile(prefix=f".{path.name}."[:100], suffix=".tmp", dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error, option) from error


def write_atomically(
    path: Path, write: Callable[[Path], None], *, previous: Path | None = None
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, and rename it once it is on the disk.

    After that, not even a loss of power brings the old file back. What ``write`` raises leaves it
    in place. If ``previous`` is given, the old file gets that name instead of being given up; at
    any moment at least one of the two is there, and whole. What a process that was killed here left
    of the same file is removed.

    Raises:
        ResourceError: The folder does not exist, or the file cannot be written.
    """
    for place in filter(None, (path, previous)):
        _require_place(place)
    temporary = path.with_name(f"{_begin(path)}{os.getpid()}_{uuid.uuid4().hex[:8]}.tmp")
    try:
        _remove_left(path)
        write(temporary)
        _flush(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        if is_exhaustion(error):
            raise
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def _begin(path: Path) -> str:
    """Return how names of the temporary files of ``path`` begin: its name, then this machine.

    >>> import re
    >>> bool(re.fullmatch("[.]a[.]txt[.][0-9a-f]{8}_", _begin(Path("a.txt"))))
    True
    """
    return f".{path.name[:50]}.{_here()}_"


@cache
def _here() -> str:
    """Return where the numbers of processes mean what they do here: this machine, or container."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {numbers}'.encode()):08x}"


def _remove_left(path: Path) -> None:
    """Remove the temporary files of ``path`` whose process is gone."""
    begin = re.escape(_begin(path))
    for other in path.parent.iterdir():
        match = re.fullmatch(rf"{begin}([0-9]+)_[0-9a-f]{{8}}\.tmp", other.name)
        if match and not psutil.pid_exists(int(match[1])):
            with suppress(OSError):
                other.unlink()


def is_temporary(path: Path) -> bool:
    """Return whether ``path`` is named like a file on its way to another name."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a process left in ``folder`` when it was killed.

    Raises:
        ResourceError: One cannot be removed.
    """
    for path in filter(is_temporary, folder.iterdir()):
        try:
            remove(path)
        except OSError as error:
            raise ResourceError(
                f"cannot remove {path}: {error.strerror}", kind="output.unwritable"
            ) from error


def remove(path: Path) -> None:
    """Remove a file or a link, or a folder with what is in it; nothing, if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, all or nothing.

    Raises:
        ResourceError: The folder does not exist, or the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, all or nothing.

    Raises:
        ResourceError: The folder does not exist, or the file cannot be written.
    """
    write_atomically(path, lambda temporary: _write(temporary, content))


def _require_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise ResourceError(
            f"folder does not exist: {path.parent}",
            kind="output.no_folder",
            fix=f"mkdir -p {shlex.quote(str(path.parent))}",
        )
    if is_special(path):  # which a file would take the place of
        raise ResourceError(
            f"cannot write {path}: not a regular file", kind="output.unwritable", fix="-o PATH"
        )
    if path.is_dir():
        here, aside = (shlex.quote(str(place)) for place in (path, find_aside(path)))
        raise ResourceError(
            f"cannot write {path}: it is a folder",
            kind="output.unwritable",
            fix=f"mv {here} {aside}\n-o PATH",
        )


def find_aside(path: Path) -> Path:
    """Return the first unused name beside ``path`` for what is in its place."""
    names = (path.with_name(f"{path.name}.old{n or ''}") for n in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _unwritable(path: Path, error: OSError, option: str = "-o") -> ResourceError:
    """Return the error for a file that cannot be written, with the free space if that is why."""
    if error.errno in _FULL:
        free = format_bytes(shutil.disk_usage(path.parent).free)
        return ResourceError(
            f"cannot write {path}: {error.strerror}\n{free} free on its disk",
            kind="output.no_space",
            fix=f"{option} PATH",
        )
    return ResourceError(
        f"cannot write {path}: {error.strerror or error}",
        kind="output.unwritable",
        fix=f"{option} PATH"
        if error.errno == errno.EROFS
        else f"{_allow(path.parent)}\n{option} PATH",
    )


def _allow(folder: Path) -> str:
    return f"chmod u+w {shlex.quote(str(folder))}"


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk, so that the rename cannot overtake them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where a folder can be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
