import os
import signal
import subprocess
import sys

import psutil

from benchmarks.isolation import attempt

STARTS_ONE_AND_WAITS = """
import os, time
from benchmarks.isolation import start_process

if __name__ == "__main__":
    with start_process() as process:
        print(process.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_what_fails_in_a_process_of_its_own_is_a_result() -> None:
    assert attempt(int, "12") == 12
    assert str(attempt(int, "twelve")).startswith("failed: ValueError: invalid literal")
    assert str(attempt(os.abort)).startswith("failed: BrokenProcessPool")


def test_a_process_ends_with_the_one_that_started_it_even_if_that_is_killed() -> None:
    command = [sys.executable, "-c", STARTS_ONE_AND_WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        psutil.wait_procs([worker], timeout=30)
        assert not worker.is_running()
