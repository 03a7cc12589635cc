from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.kills import Damage, Kill, check_files, command, compare, make_images, torture
from momconv.cli import app
from momconv.files import model_file
from momconv.training.run_folder import RunFolder
from momconv.zoo.networks import build

BEFORE_THE_STATE = Kill(0, files=3)  # config.yaml, plan.json, split.json
WITHIN_THE_EPOCH = Kill(0, files=8)
NEVER = Kill(100)


def run_here(words: list[str]) -> None:
    """With as many threads as the processes have: sums depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert CliRunner().invoke(app, words[3:]).exit_code == 0
    torch.set_num_threads(threads)


def test_a_run_that_is_killed_twice_comes_to_the_same_as_one_that_is_not(tmp_path: Path) -> None:
    data, reference = tmp_path / "data", tmp_path / "reference"
    make_images(data)
    run_here(command(data, reference, 1))
    moments = [BEFORE_THE_STATE, WITHIN_THE_EPOCH, NEVER]
    first, second = torture(data, tmp_path / "run", 1, iter(moments))
    assert all("ms after temporary file" in kill for kill in (first, second))
    compare(tmp_path / "run", reference)

    state = RunFolder(tmp_path / "run").state
    tensors = load_file(state)
    tensors["random/cpu"][-1] ^= 1
    save_file(tensors, state)
    with pytest.raises(Damage, match="other values: state/random/cpu"):
        compare(tmp_path / "run", reference)


def test_a_half_written_file_would_be_noticed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert check_files(tmp_path) is None
    model = build("cifar_resnet20")
    model_file.save(model, run.last)
    check_files(tmp_path)
    run.last.write_bytes(run.last.read_bytes()[:-1])
    with pytest.raises(Damage, match="truncated"):
        check_files(tmp_path)
