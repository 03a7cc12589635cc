import errno
import os
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from momconv.errors import ResourceError, UsageError
from momconv.files.atomic import (
    is_temporary,
    require_free,
    require_writable,
    sweep,
    write_atomically,
    write_text,
)
from momconv.files.plain_file import save_plain
from momconv.files.tensor_file import write_tensors


def test_the_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("aft")
        assert temporary.parent == tmp_path
        assert path.read_text() == "before"
        temporary.write_text("after")

    write_atomically(path, write)
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can have more than 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_tensors(path: Path) -> None:
    write_tensors(path, {"x": torch.zeros(1000)}, {})


def _save_bytes(path: Path) -> None:
    path.write_bytes(bytes(4000))


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("write", [_save_tensors, _save_bytes])
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(ResourceError, match=r"cannot write .*/a: .*File too large") as caught:
        write_atomically(tmp_path / "a", write)
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_that_does_not_fit_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        save_plain(nn.Linear(100, 100), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.ENOSPC, "output.no_space", "-o PATH"),
        (errno.EACCES, "output.unwritable", "chmod u+w {}\n-o PATH"),
        (errno.EROFS, "output.unwritable", "-o PATH"),
    ],
)
def test_what_the_system_refuses_has_a_fix(
    tmp_path: Path, number: int, kind: str, fix: str
) -> None:
    def write(temporary: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError, match=os.strerror(number)) as caught:
        write_atomically(tmp_path / "a.txt", write)
    assert caught.value.kind == kind
    assert caught.value.fix == fix.format(tmp_path)


def test_the_fix_names_the_option_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for option in ("--csv", "--plot"):
        with pytest.raises(ResourceError, match="Read-only file system") as caught:
            require_writable(tmp_path / "a.csv", option)
        assert caught.value.fix == f"{option} PATH"


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="folder does not exist") as caught:
        write_text(tmp_path / "my runs" / "a.txt", "text")
    assert caught.value.fix == f"mkdir -p '{tmp_path / 'my runs'}'"


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a.old").touch()
    with pytest.raises(ResourceError, match=r"cannot write .*/a: it is a folder") as refused:
        write_text(tmp_path / "a", "text")
    assert refused.value.fix == f"mv {tmp_path}/a {tmp_path}/a.old1\n-o PATH"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.old"]


def test_text_is_utf8_with_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "γ × σ\n")
    assert (tmp_path / "a.txt").read_bytes() == "γ × σ\n".encode()
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(os.stat(p).st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_new_file_in_an_existing_folder_is_free(tmp_path: Path) -> None:
    require_free(tmp_path / "new", overwrite=False)


def test_an_existing_file_is_free_only_to_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    require_free(tmp_path / "old", overwrite=True)
    with pytest.raises(UsageError, match=r"already exists: .*old") as error:
        require_free(tmp_path / "old", overwrite=False)
    assert error.value.fix == "--overwrite\n-o FILE"


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output is a folder"):
        require_free(tmp_path, overwrite=True)


def test_nothing_is_free_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="folder does not exist"):
        require_free(tmp_path / "nope" / "new", overwrite=False)


def test_nothing_is_free_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "open", refuse)  # root, who may run this, may write anywhere else
    with pytest.raises(ResourceError, match=f"cannot write {tmp_path}/new: Read-only") as refused:
        require_free(tmp_path / "new", overwrite=False)
    assert refused.value.exit_code == 5


def test_to_ask_whether_a_file_is_free_leaves_nothing(tmp_path: Path) -> None:
    require_free(tmp_path / ("x" * 250), overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_the_file_and_then_its_name_are_on_the_disk_before_it_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(f"replace {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "a", "text")
    assert done == ["file", "replace a", "folder"]


def test_the_old_file_can_be_kept_under_another_name(tmp_path: Path) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    for text in ("1", "2", "3"):
        write_atomically(path, lambda target, t=text: target.write_text(t), previous=previous)  # type: ignore[misc]
    assert (path.read_text(), previous.read_text()) == ("3", "2")


def test_one_of_both_is_there_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    path.write_text("old")

    def die(*_: Path) -> None:
        raise SystemExit

    def replace_once(source: Path, target: Path) -> None:
        source.rename(target)
        monkeypatch.setattr(os, "replace", die)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(SystemExit):
        write_atomically(path, lambda target: target.touch(), previous=previous)
    assert previous.read_text() == "old"


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("a", ".a.tmp", "mine.tmp", ".env", ".tmp", ".tmpfile")]
    left = [tmp_path / name for name in (f".a.{'0a' * 16}.tmp", ".tmpQ7xA2b")]
    for path in (*kept, *left):
        path.touch()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("name", ["a", "x" * 250, "\u00e4" * 120, "l\udce4rche"])
def test_what_a_killed_process_left_of_a_file_goes_when_it_is_written(
    tmp_path: Path, name: str
) -> None:
    path, others = tmp_path / name, [tmp_path / "b", tmp_path / f".b.{'0a' * 16}.tmp"]
    for other in others:
        other.touch()

    def write_and_die(temporary: Path) -> None:
        temporary.write_text("half")
        os._exit(9)

    def write(temporary: Path) -> None:
        assert sorted(tmp_path.iterdir()) == sorted(others)
        temporary.touch()
        write_text(path, "by another, meanwhile")  # which leaves the file of the living
        assert temporary.exists()

    child = os.fork()
    if child == 0:
        write_atomically(path, write_and_die)
    os.waitpid(child, 0)
    (left,) = {*tmp_path.iterdir()} - {*others}
    assert left.read_text() == "half"
    assert is_temporary(left)
    write_atomically(path, write)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
