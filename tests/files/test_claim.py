import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from momconv.errors import ResourceError
from momconv.files.claim import NAME, claim, is_claimed

# Claims the folder, says so, and waits; a child that it forks inherits no claim.
HOLDER = """
import os, sys, time
from pathlib import Path
from momconv.files.claim import claim
with claim(Path(sys.argv[1]), print):
    if os.fork() == 0:
        time.sleep(60)
    print("claimed", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process has ``folder`` inside."""
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_claim_keeps_others_out_names_who_has_it_and_ends_with_its_process(
    tmp_path: Path,
) -> None:
    with holding(tmp_path) as holder:
        assert is_claimed(tmp_path)
        with (
            pytest.raises(ResourceError) as refused,
            claim(tmp_path, pytest.fail, fix="-o elsewhere"),
        ):
            pytest.fail("two have it")
        who = f"process {holder.pid} on {socket.gethostname()}, since 20"
        assert refused.value.message.startswith(f"{tmp_path} is in use by {who}")
        assert (refused.value.kind, refused.value.exit_code) == ("output.in_use", 5)
        assert refused.value.fix == "-o elsewhere"
        holder.kill()  # but not its child
        holder.wait()
        assert (tmp_path / NAME).is_file()
        assert not is_claimed(tmp_path)
        with claim(tmp_path, pytest.fail):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_claim_may_be_within_another_of_the_same_thread_only(tmp_path: Path) -> None:
    seen: list[bool] = []
    with claim(tmp_path, pytest.fail):
        with claim(tmp_path, pytest.fail):
            pass
        assert (tmp_path / NAME).is_file()
        other = threading.Thread(target=lambda: seen.append(is_claimed(tmp_path)))
        other.start()
        other.join()
        assert not is_claimed(tmp_path)
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_the_folders_that_were_made_go_again_unless_there_is_something_in_them(
    tmp_path: Path,
) -> None:
    with claim(tmp_path / "a" / "b", pytest.fail):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]
    with pytest.raises(NotADirectoryError), claim(tmp_path / "a" / "kept" / "b", pytest.fail):
        pass
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "c" / "d", pytest.fail):
        _ = 1 / 0
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_where_files_have_no_locks_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(37, "No locks available")  # what NFS without its lock service answers

    monkeypatch.setattr("fcntl.flock", refuse)
    told: list[str] = []
    with claim(tmp_path, told.append):
        pass
    assert told == [f"warning: {tmp_path} is where files have no locks: start nothing else into it"]
    assert list(tmp_path.iterdir()) == []
