from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from momconv import demo
from momconv.cli import app
from momconv.training.progress import Listener

pytest.importorskip("sklearn")


def run(folder: Path) -> Result:
    return CliRunner().invoke(app, ["demo", "-o", str(folder)])


def test_it_ends_with_a_table_and_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(folder: Path, listener: Listener) -> demo.Demo:
        return demonstrate(folder, images=120, epochs=(1, 1), listener=listener)

    demonstrate = demo.demonstrate
    monkeypatch.setattr(demo, "demonstrate", short)
    monkeypatch.chdir(tmp_path)
    ran = run(Path("out"))
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["network", "top-1", "MiB", "an", "image", "file"]
    for line in lines[1:4]:
        name, top1, need, path = line.split()
        assert name in ("original", "converted", "fine-tuned")
        assert top1.endswith("%")
        assert 0.1 < float(need) < 3
        assert Path(path).is_file()
    assert "momconv eval out/finetuning/best.safetensors --data out/digits/val" in lines[-1]
    assert "note: fine-tuning it with momentum" in ran.stderr


def test_it_does_not_touch_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    ran = run(tmp_path)
    assert ran.exit_code == 2
    assert f"error: folder is not empty, and no demo made it: {tmp_path}" in ran.stderr
    assert "fix: -o FOLDER" in ran.stderr
