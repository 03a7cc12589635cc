import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files.model_file import save
from momconv.planner.profile import VARIANTS
from momconv.surgery.conversion import convert
from momconv.units import format_bytes
from momconv.zoo.networks import build

SMALL = ["cifar_resnet20", "--resolution", "16", "--device", "cpu"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["profile-memory", *map(str, args)])


def profiled(*args: str | Path) -> dict[str, Any]:
    ran = run(*args, "--json")
    assert ran.exit_code == 0, ran.output
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def test_the_real_program_prints_a_table() -> None:
    command = [sys.executable, "-m", "momconv", "profile-memory", *SMALL]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "resolution 16, precision fp32" in ran.stdout
    assert "alive at the peak of 32 images, predicted" in ran.stdout
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    assert max(len(line) for line in lines if "  " in line) <= 80  # those of tables
    first_words = [line.split()[0] for line in lines]
    for word in ("strategy", *VARIANTS):
        assert word in first_words
    assert "needs least" in ran.stdout
    assert "3GiB" in ran.stdout


def test_json_is_one_document() -> None:
    document = profiled(*SMALL, "--budget", "64MiB,1GiB", "--budget", "2GiB")
    assert document["ok"] is True
    assert list(document["variants"]) == list(VARIANTS)
    for variant in document["variants"].values():
        batches = list(variant["largest_batch"].values())
        assert list(variant["largest_batch"]) == ["64MiB", "1GiB", "2GiB"]
        assert 0 < batches[0] < batches[1] < batches[2]
        assert batches[1] * variant["bytes_per_image"] < 2**30


def test_the_peak_of_chosen_batches_is_told(tmp_path: Path) -> None:
    file = tmp_path / "memory.csv"
    asked = [*SMALL, "--batch-sizes", "32, 8"]
    document = profiled(*asked, "--csv", file)
    for variant in document["variants"].values():
        total = variant["peak_of_32"]["total"]
        assert variant["peak_bytes"]["32"] == pytest.approx(total, rel=1e-5)  # lines of whole bytes
        assert variant["peak_bytes"]["8"] < variant["peak_bytes"]["32"]
    assert file.read_text().splitlines()[0].endswith("with_32_images,peak_bytes_with_8_images")
    lines = run(*asked).stdout.splitlines()
    (start,) = (n for n, line in enumerate(lines) if "with so many images" in line)
    assert lines[start + 1].split() == ["strategy", "32", "8"]
    bytes_ = document["variants"]["plain"]["peak_bytes"]["32"]
    assert lines[start + 2].split()[:3] == ["plain", *format_bytes(bytes_).split()]


def test_larger_images_need_more_and_half_precision_less() -> None:
    def need(*args: str) -> int:
        document = profiled("cifar_resnet20", "--device", "cpu", *args)
        return int(document["variants"]["plain"]["bytes_per_image"])

    small = need("--resolution", "16")
    assert need("--resolution", "32") == pytest.approx(4 * small, rel=0.05)
    assert need("--resolution", "16", "--precision", "bf16") < small


def test_adamw_holds_another_copy() -> None:
    sgd, adamw = (
        profiled(*SMALL, "--optimizer", name)["static_bytes"] for name in ("sgd", "adamw")
    )
    assert adamw["optimizer"] == 2 * sgd["optimizer"] == 2 * sgd["gradients"]


def test_a_file_is_profiled_as_it_was_converted(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(convert(build("cifar_resnet20"), 0.5, stages=["layer1"]), path)
    own = profiled(path, *SMALL[1:])["variants"]["momentum"]
    everywhere = convert(build("cifar_resnet20"), 0.5, stages="all")
    save(everywhere, path)
    document = profiled(path, *SMALL[1:])
    assert document["gamma"] == 0.5
    assert document["variants"]["momentum"] != own


def test_a_plain_file_is_converted_first(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(convert(build("cifar_resnet20"), 0), path)
    variants = profiled(path, *SMALL[1:])["variants"]
    assert variants["momentum"]["bytes_per_image"] < variants["plain"]["bytes_per_image"]


def test_files_are_written_beside_the_report(tmp_path: Path) -> None:
    files = [tmp_path / "memory.csv", tmp_path / "memory.svg"]
    ran = run(*SMALL, "--measure", "--csv", files[0], "--plot", files[1])
    assert ran.exit_code == 0, ran.output
    assert "measured" in ran.stdout
    rounding = re.search(r"outputs within (\S+) of those .* in double precision", ran.stdout)
    assert rounding
    assert float(rounding[1]) < 1e-5
    assert [line.split(",")[0] for line in files[0].read_text().splitlines()[1:]] == [*VARIANTS]
    assert "<svg" in files[1].read_text()


def test_a_gpu_that_is_not_there_can_be_planned_for() -> None:
    document = profiled(*SMALL[:3], "--device", "cuda")
    assert document["variants"]["plain"]["peak_of_32"]["allowance"] > 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["renset152"], 2, "unknown model 'renset152' — did you mean resnet152?"),
        (["no.safetensors"], 4, "file does not exist: no.safetensors"),
        ([*SMALL, "--budget", "much"], 2, "'much' is not an amount of memory"),
        ([*SMALL, "--batch-sizes", "8,0"], 2, "'0' is not a number of images"),
        ([*SMALL, "--gamma", "0"], 2, "--gamma 0 is the plain network"),
        ([*SMALL, "--gamma", "2"], 2, "gamma is 2"),
        (["cifar_resnet20", "--device", "abacus"], 2, "unknown device 'abacus'"),
    ],
)
def test_mistakes_are_explained(args: list[str], code: int, message: str) -> None:
    ran = run(*args)
    assert ran.exit_code == code
    assert f"error: {message}" in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("words", [[], ["--measure", "--device", "cpu"]])
def test_a_snapshot_is_of_steps_on_a_gpu(tmp_path: Path, words: list[str]) -> None:
    ran = run("cifar_resnet20", *words, "--snapshot", str(tmp_path / "memory.pickle"))
    assert ran.exit_code == 2
    assert ran.stderr.startswith("error: --snapshot: ")
    assert list(tmp_path.iterdir()) == []
