"""Files that appear complete or not at all."""

import os
import shlex
import uuid
from collections.abc import Callable
from pathlib import Path

from momconv.errors import ResourceError, UsageError


def require_free(path: Path, *, overwrite: bool) -> None:
    """Do nothing if ``path`` can become a new file; for use before the work that leads to it.

    Raises:
        UsageError: There is such a file, which ``overwrite`` does not give up, or such a folder.
        ResourceError: The folder that it would be in does not exist.
    """
    _require_parent(path)
    if path.is_dir():
        raise UsageError(
            f"output is a folder: {path}", kind="usage.output_exists", fix=f"-o {path}/FILE"
        )
    if path.exists() and not overwrite:
        raise UsageError(
            f"output file already exists: {path}",
            kind="usage.output_exists",
            fix="--overwrite, or another name with -o",
        )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, and rename it once it is on the disk.

    Raises:
        ResourceError: The folder does not exist, or the file cannot be written.
    """
    _require_parent(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}", kind="output.unwritable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, all or nothing.

    Raises:
        ResourceError: The folder does not exist, or the file cannot be written.
    """
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def _require_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise ResourceError(
            f"folder does not exist: {path.parent}",
            kind="output.no_folder",
            fix=f"mkdir -p {shlex.quote(str(path.parent))}",
        )


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk, so that the rename cannot overtake them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
