"""The line of progress in a real terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress

from momconv.cli._console import _Line

CODE = """if True:
    import time
    from momconv.cli._console import progress

    text = "epoch 12/100 · {} · loss 1.234 · 31.5 images/s · peak 10.5 GiB"
    with progress("training", 1234567) as report:
        for doing in ("validating 123/4567", "loss 0.9"):
            for done in (1, 600_000, 1_200_000):
                report(done, text.format(doing))
                time.sleep(0.12)
"""


def show(columns: int) -> list[str]:
    """What a terminal so wide gets, a line each time."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=variables | {"TERM": "xterm"},
    )
    os.close(theirs)
    content = b""
    try:
        while part := os.read(ours, 65536):
            content += part
    except OSError:  # which is how a terminal ends
        pass
    assert process.wait() == 0
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", content.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("columns", [80, 60])
def test_epoch_count_and_time_left_are_never_cut(columns: int) -> None:
    lines = show(columns)
    assert len(lines) >= 4
    for line in lines:
        assert len(line) <= columns
        head = r"(training )?epoch 12/100 · \d+/1234567 · (-:--:--|\d+:\d\d:\d\d) left"
        assert re.match(head, line), line
    assert any("validating" in line for line in lines) or columns == 60
    assert any("1200000/1234567" in line for line in lines)


@pytest.mark.parametrize("columns", range(40, 81))
def test_the_head_is_whole_where_nothing_else_is_to_be_said(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=columns, file=StringIO())
    monkeypatch.setattr("momconv.cli._console.err", console)
    progress = Progress(_Line(), console=console)
    progress.add_task("describing the run", total=6, completed=6, text="")
    with console.capture() as shown:
        console.print(progress)
    assert shown.get().startswith("describing the run 6/6 · -:--:-- left")
