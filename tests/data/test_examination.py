import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import save_picture

from momconv.data import examination
from momconv.data.examination import examine_all
from momconv.data.findings import Finding
from momconv.data.folder import Folder


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that are opened, with an empty cache."""
    monkeypatch.setenv("MOMCONV_CACHE", str(tmp_path / "cache"))
    names: list[str] = []
    examine = examination.examine

    def remember(path: Path, read: Callable[[Path], bytes]) -> Finding:
        names.append(path.name)
        return examine(path, read)

    monkeypatch.setattr(examination, "examine", remember)
    return names


def save_old(path: Path, number: int) -> Path:
    """A picture that was not written just now."""
    save_picture(path, number)
    os.utime(path, (10**9, 10**9))
    return path


def test_a_file_is_opened_again_only_when_it_changed(tmp_path: Path, looked_at: list[str]) -> None:
    paths = [save_old(tmp_path / "data" / f"{n}.png", n) for n in range(3)]
    (tmp_path / "data" / "4.png").touch()
    first = examine_all(Folder(tmp_path / "data"), paths)
    assert first[paths[0]].stored == "PNG RGB"
    assert first[paths[0]].size == (12, 10)
    save_old(paths[1], 7)
    paths.append(save_old(tmp_path / "data" / "3.png", 3))
    looked_at.clear()
    seen: list[tuple[int, int]] = []
    second = examine_all(Folder(tmp_path / "data"), paths, lambda *done: seen.append(done))
    assert looked_at == ["1.png", "3.png"]
    assert seen == [(3, 4), (4, 4)]
    assert second[paths[0]] == first[paths[0]]
    assert second[paths[1]].sha256 != first[paths[1]].sha256


def test_what_was_written_just_now_is_not_believed_to_stay(
    tmp_path: Path, looked_at: list[str]
) -> None:
    path = save_picture(tmp_path / "data" / "0.png")
    os.utime(path, (2**33, 2**33))
    for _ in range(2):
        examine_all(Folder(tmp_path / "data"), [path])
    assert looked_at == ["0.png", "0.png"]


@pytest.mark.parametrize("text", [b"", b"{}", b'{"decoder": "0", "files": {}}', b"\xff"])
def test_a_damaged_or_old_cache_is_not_used(
    tmp_path: Path, looked_at: list[str], text: bytes
) -> None:
    path = save_old(tmp_path / "data" / "0.png", 0)
    expected = examine_all(Folder(tmp_path / "data"), [path])
    (cache,) = (tmp_path / "cache").glob("images/*.npz")
    cache.write_bytes(text)
    assert examine_all(Folder(tmp_path / "data"), [path]) == expected
    assert looked_at == ["0.png", "0.png"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, looked_at: list[str]
) -> None:
    (tmp_path / "cache").touch()
    path = save_old(tmp_path / "data" / "0.png", 0)
    assert examine_all(Folder(tmp_path / "data"), [path])[path].problem is None


def test_what_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    missing = tmp_path / "0.png"
    found = examine_all(Folder(tmp_path), [missing])[missing]
    assert found == Finding("", "No such file or directory")


def test_processes_that_look_at_parts_share_what_they_found(
    tmp_path: Path, looked_at: list[str]
) -> None:
    paths = [save_old(tmp_path / "data" / f"{n}.png", n) for n in range(5)]
    parts = [examine_all(Folder(tmp_path / "data"), paths[rank::2]) for rank in range(2)]
    looked_at.clear()
    every = examine_all(Folder(tmp_path / "data"), paths)
    assert not looked_at
    assert list(every) == paths
    assert every == {**parts[0], **parts[1]}
