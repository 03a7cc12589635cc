import csv
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files import model_file
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import build, replace_head
from momconv.zoo.preparation import parse_preparation, prepare_as

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, path = build("cifar_resnet20"), tmp_path_factory.mktemp("model") / "m.safetensors"
    replace_head(network, CLASSES)
    model_file.save(network, path)
    return path


def run(*args: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, args), "--device", "cpu"], input=stdin)


def test_the_formats_say_the_same(model: Path, colours: Path) -> None:
    document = json.loads(run(model, colours / "red", "--json").stdout)
    lines = run(model, colours / "red", "--format", "jsonl").stdout.splitlines()
    rows = list(csv.DictReader(io.StringIO(run(model, colours / "red", "--format", "csv").stdout)))

    assert document["ok"] is True
    assert document["unreadable"] == []
    assert [json.loads(line) for line in lines] == document["predictions"]
    assert len(rows) == 8
    for row, image in zip(rows, document["predictions"], strict=True):
        assert row["path"] == image["path"]
        assert sorted(guess["name"] for guess in image["guesses"]) == list(CLASSES)
        for rank, guess in enumerate(image["guesses"], 1):
            assert row[f"class_{rank}"] == guess["name"]
            assert float(row[f"probability_{rank}"]) == guess["probability"]


def test_a_csv_has_names_with_escape_sequences_whole(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    image = Path(shutil.copy(colours / "red" / "0.png", tmp_path / "\x1b[31mred.png"))
    rows = list(csv.DictReader(io.StringIO(run(model, image, "--format", "csv").stdout)))
    assert [row["path"] for row in rows] == [str(image)]


def test_without_a_format_there_is_a_table(model: Path, colours: Path) -> None:
    ran = run(model, colours / "red" / "0.png", "--top", "2")
    assert (ran.exit_code, ran.stderr) == (0, "")
    header, *rest = ran.stdout.splitlines()
    assert header.split() == ["image", "class", "probability", "then"]
    assert " ".join(rest).count("%") == 2


def test_each_unreadable_image_has_a_record(model: Path, colours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colours / "red", tmp_path / "red"))
    bad = folder / "bad.png"
    bad.touch()
    ran = run(model, folder, "--format", "csv")
    assert ran.exit_code == 0
    assert ran.stderr == f"warning: left out: {bad}: empty file\n"
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    assert [row["error"] for row in rows] == 8 * [""] + ["empty file"]
    lines = run(model, folder, "--format", "jsonl").stdout.splitlines()
    assert json.loads(lines[8]) == {"path": str(bad), "error": "empty file"}

    for n in range(20):
        (folder / f"bad-{n:02}.png").touch()
    many = run(model, folder, "--format", "csv")
    assert many.stderr.count("left out: /") == 10
    assert many.stderr.endswith("11 more; --format csv and jsonl have a record of each\n")
    assert many.stdout.count("empty file") == 21
    for n in range(20):
        (folder / f"bad-{n:02}.png").unlink()

    strict = run(model, folder, "--format", "csv", "--strict")
    assert (strict.exit_code, strict.stdout) == (3, ran.stdout)
    assert "error: 1 of 9 images have no answer (--strict)\n" in strict.stderr
    failed = run(model, folder, "--json", "--strict")
    document = json.loads(failed.stdout)
    assert (failed.exit_code, document["ok"], document["error"]["code"]) == (3, False, 3)
    assert document["unreadable"] == [json.loads(lines[8])]
    assert len(document["predictions"]) == 8
    assert run(model, colours / "red", "--strict").exit_code == 0


def test_an_empty_list_from_stdin_is_an_error(model: Path) -> None:
    ran = run(model, "-", stdin=b"\n")
    assert ran.exit_code == 3
    assert "the list of images is empty" in ran.stderr
    assert "fix:" in ran.stderr


def test_a_list_of_images_may_come_from_stdin(model: Path, colours: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copy(colours / "red" / "0.png", tmp_path / os.fsdecode(b"caf\xe9.png")))
    listed = b"\n".join([os.fsencode(colours / "blue"), b"", os.fsencode(odd), b""])
    ran = run(model, "-", colours / "red" / "1.png", "--json", stdin=listed)
    paths = [image["path"] for image in json.loads(ran.stdout)["predictions"]]
    assert paths[:8] == [str(colours / "blue" / f"{n}.png") for n in range(8)]
    assert [Path(path).name for path in paths[8:]] == [r"caf\xe9.png", "1.png"]


def test_classes_without_names_are_numbers(colours: Path, tmp_path: Path) -> None:
    model_file.save(build("cifar_resnet20", 3), tmp_path / "m.safetensors")
    ran = run(tmp_path / "m.safetensors", colours / "red" / "0.png", "--json")
    (image,) = json.loads(ran.stdout)["predictions"]
    assert sorted(guess["name"] for guess in image["guesses"]) == ["0", "1", "2"]
    assert "names no classes" in ran.stderr


def test_images_are_prepared_as_is_said_and_a_guess_is_told(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    network, image = model_file.load(model), colours / "red" / "0.png"
    said = parse_preparation(mean="0.1,0.2,0.3", std="0.5", resize="40", interpolation="bicubic")
    attach(network, replace(describe(network), assumed=True))
    model_file.save(network, tmp_path / "unsaid.safetensors")
    prepare_as(network, said)
    model_file.save(network, tmp_path / "said.safetensors")

    wanted, other, guessed = (
        run(path, image, "--format", "csv", *options)
        for path, options in (
            (tmp_path / "said.safetensors", ()),
            (tmp_path / "unsaid.safetensors", said.write_options()),
            (tmp_path / "unsaid.safetensors", ()),
        )
    )

    assert (other.stdout, other.stderr) == (wanted.stdout, "")
    assert guessed.stdout != wanted.stdout
    assert "does not say how its images are prepared" in guessed.stderr


def test_mistakes_are_explained(model: Path, colours: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.touch()
    mistakes: list[tuple[list[str | Path], int, str]] = [
        ([model, tmp_path / "nope.png"], 3, "no such image or folder"),
        ([model, bad], 3, "none of 1 images can be read"),
        ([tmp_path / "m.safetensors", colours], 4, "file does not exist"),
        ([model, colours, "--json", "--format", "csv"], 2, "exclude each other"),
        ([model, colours, "--top", "0"], 2, "--top"),
        ([model], 2, "PATH"),
    ]
    for args, code, message in mistakes:
        ran = run(*args)
        assert (ran.exit_code, message in ran.output) == (code, True), ran.output
