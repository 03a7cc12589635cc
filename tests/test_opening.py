import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from momconv.cli import app
from momconv.opening import find_model_file, is_special, open_regular, read_regular

pytestmark = pytest.mark.timeout(60)  # nobody ever writes to these pipes

FINETUNE = ["finetune", "--data", "images", "--model", "cifar_resnet20"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with named pipes in place of files."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        image = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(image)
    (tmp_path / "run").mkdir()
    names = ("w", "w.pth", "m.safetensors", "r.yaml", "l.csv", "log", "run/state.safetensors")
    for name in names:
        os.mkfifo(tmp_path / name)
    yield tmp_path
    assert all(is_special(tmp_path / name) for name in names)


@pytest.mark.parametrize(
    ("words", "name", "code"),
    [
        (["convert", "cifar_resnet20", "--weights", "w.pth", "-o", "o.safetensors"], "w.pth", 4),
        (["convert", "cifar_resnet20", "--weights", "w", "-o", "o.safetensors"], "w", 4),
        (["convert", "resnet18", "--weights", "/dev/zero", "-o", "o.safetensors"], "/dev/zero", 4),
        (["inspect", "m.safetensors"], "m.safetensors", 4),
        (["predict", "m.safetensors", "w"], "m.safetensors", 4),
        (["eval", "m.safetensors", "--data", "images"], "m.safetensors", 4),
        (["profile-memory", "w"], "w", 4),
        (["finetune", "--resume", "run"], "run/state.safetensors", 4),
        ([*FINETUNE, "--weights", "w.pth"], "w.pth", 4),
        ([*FINETUNE, "--recipe", "r.yaml"], "r.yaml", 2),
        ([*FINETUNE, "--recipe", "/dev/zero"], "/dev/zero", 2),
        ([*FINETUNE, "--labels", "l.csv"], "l.csv", 3),
        (["recipes", "cp", "three-gib", "r.yaml", "--overwrite"], "r.yaml", 5),
        (["--log-file", "log", "models"], "log", 5),
    ],
)
def test_a_pipe_or_device_is_named_and_not_waited_for(
    here: Path, words: list[str], name: str, code: int
) -> None:
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == code
    (error,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith((f"{name}: not a regular file", f"{name}: No such device or address"))


def test_links_to_files_are_read_and_links_to_pipes_are_not(here: Path) -> None:
    (here / "file").write_bytes(b"content")
    (here / "link").symlink_to("file")
    assert read_regular(here / "link") == b"content"
    (here / "other").symlink_to("w")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(here / "other")


def test_what_becomes_a_pipe_after_it_was_looked_at_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("momconv.opening.is_special", lambda path: False)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(here / "w")


def test_the_folder_of_a_run_stands_for_its_best_model(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (run / "best.safetensors").touch()
    assert find_model_file(run) == run / "best.safetensors"
    assert [find_model_file(path) for path in (other, tmp_path / "none")] == [
        other,
        tmp_path / "none",
    ]
