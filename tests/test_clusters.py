"""The job of docs/clusters.md, with torchrun, against stand-ins of Slurm's commands."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

CLUSTERS = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
(JOB,) = re.findall(r"```sh\n(#!/bin/bash\n#SBATCH .*?)```", CLUSTERS, re.DOTALL)
STAND_INS = {
    # The last minutes of a job, which runs once more if it is put back.
    "sbatch": """
export SLURM_JOB_ID=7 SLURM_NNODES=1 SLURM_JOB_END_TIME=$(($(date +%s) + 60))
MOMCONV_TRAIN__EPOCHS=1000 bash "$1"
[ "$(cat requeued)" = 7 ] && MOMCONV_TRAIN__EPOCHS=1 bash "$1" """,
    "srun": 'echo $$ > step; exec "$@"',
    "scontrol": '[ "$1" = requeue ] && echo "$2" > requeued || echo localhost',
}


def read_until(lines: Iterator[str], text: str) -> list[str]:
    """The lines up to the first one with ``text``."""
    read: list[str] = []
    for line in lines:
        read.append(line)
        if text in line:
            return read
    pytest.fail(f"{text} did not come:\n{''.join(read)}")


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm is of Linux")
def test_a_job_goes_on_when_a_process_dies_and_when_it_is_requeued(
    colours: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = JOB.replace("/shared/photos", str(colours)).replace("/shared/runs", str(tmp_path))
    job = job.replace("29500", str(port)).replace("--nproc-per-node 4", "--nproc-per-node 1")
    (tmp_path / "job").write_text(job)
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    recipe = {"MODEL__NAME": "cifar_resnet20", "MODEL__WEIGHTS": "none", "MOMENTUM__USE": "never"}
    recipe |= {"DATA__WORKERS": "0", "LOG__PLOTS": "false", "TRAIN__SCHEDULE": "constant"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        ["sbatch", "job"],
        cwd=tmp_path,
        env=os.environ | {f"MOMCONV_{key}": text for key, text in recipe.items()} | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as queue:
        assert queue.stdout
        read_until(queue.stdout, "epoch 1/1000")
        (process,) = psutil.Process(int((tmp_path / "step").read_text())).children()
        process.kill()
        read_until(queue.stdout, "note: going on in epoch")
        read_until(queue.stdout, "epoch ")
        os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
        read_until(queue.stdout, "and saved. To go on")
        read_until(queue.stdout, "/1)")
        read_until(queue.stdout, "best top-1")
        queue.stdout.read()  # it could not write to what is closed
    assert queue.returncode == 0
    assert (tmp_path / "photos" / "report.html").is_file()
