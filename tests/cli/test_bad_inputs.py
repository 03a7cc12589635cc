"""What people do wrong, by the commands as they are typed: what is said, where, and the exit code.

The real program is started once, in tests/cli/test_finetune.py; here the commands run in process.
"""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files import model_file
from momconv.surgery.conversion import convert
from momconv.zoo.networks import build, replace_head

TINY = ["--model", "cifar_resnet20", "--weights", "none", "--device", "cpu", "--epochs", "1"]
TINY += ["--batch-size", "8", "--micro-batch", "8", "--set", "data.workers=0"]


def run(*args: str | Path) -> Result:
    ran = CliRunner().invoke(app, [str(arg) for arg in args])
    assert "Traceback" not in ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
    return ran


def hashes(root: Path) -> dict[str, str]:
    """Everything below ``root`` with its content or target."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in root.rglob("*")
    }


def save_noise(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (34, 36, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_classes(root: Path, *names: str, count: int = 2) -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            save_noise(root / name / f"{number}.png", 100 * label + number)
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    """A working directory with everything that the cases below need."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "photos").symlink_to(colours)
    for number in range(5):
        save_noise(root / "loose" / f"{number}.png", number)
    save_classes(root / "wolves" / "train", "cat", "dog")
    save_classes(root / "wolves" / "val", "cat", "wolf", count=1)
    save_classes(root / "one", "cat")
    for number in range(3):
        save_classes(root / "broken", "cat", "dog", count=5)
        (root / "broken" / "cat" / f"{number}.png").write_bytes(b"")
    save_classes(root / "junk", "cat", "dog", count=6)
    (root / "junk" / "zebra").mkdir()
    (root / "cfg.yaml").write_text("model: {}\ntrain:\n  epohcs: 3\n")
    network = build("cifar_resnet20")
    replace_head(network, ("blue", "green", "red"))
    torch.save(network.state_dict(), root / "plain.pth")
    model_file.save(convert(network), root / "model.safetensors")
    content = (root / "model.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (root / "text.safetensors").write_text("a poem")
    return root


FINETUNE = ["finetune", "--data", "photos", *TINY]


def finetune(data: str) -> list[str]:
    return ["finetune", "--data", data, *TINY]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (finetune("photo"), 3, ["does not exist: photo\n", "existing folder is {}/photos"]),
        (finetune("loose"), 3, ["found 5 images directly in loose/", "expected: loose/<class>/"]),
        (finetune("wolves"), 3, ["val has 1 class that train does not have: wolf (1 image)",
                                 "fix: --unknown-classes skip"]),
        (finetune("one"), 3, ["found 1 class in one: cat (2 images)"]),
        ([*finetune("junk"), "--strict"], 3, ["error: ignoring 1 folder with no images: zebra"]),
        (finetune("broken"), 3, ["images unreadable", "broken/cat/2.png: empty file",
                                 "fix: --max-bad-fraction 0."]),
        (finetune(""), 2, ["what follows --data is empty"]),
        (["eval", "model.safetensors", "--data="], 2, ["what follows --data is empty"]),
        (["predict", "model.safetensors", ""], 2, ["what follows model.safetensors is empty"]),
        ([*finetune("photos"), "-o", "photos/run"], 2, ["is inside the folder of images photos",
                                                        "fix: -o {}/runs/run"]),
        ([*FINETUNE, "--epohcs", "3"], 2, ["--epochs"]),
        ([*FINETUNE, "--recipe", "cfg.yaml"], 2, ["cfg.yaml:3: unknown key train.epohcs"]),
        ([*FINETUNE, "--lr", "abc"], 2, ["train.lr: 'abc' is not a number"]),
        ([*FINETUNE, "--unknown-classes", "x"], 2, ["'x' is not error or skip"]),
        ([*FINETUNE, "--model", "resnet5O"], 2, ["'resnet5O' — did you mean resnet50?"]),
        (["convert", "vgg16"], 2, ["vgg16 is not a residual network"]),
        (["convert", "resnet50", "--weights", "V9"], 2, ["IMAGENET1K_V2 (80.9 % top-1)"]),
        ([*FINETUNE, "--device", "cuda:99"], 5, ["--device cuda:99: this PyTorch"]),
        ([*FINETUNE, "--memory", "1MiB"], 5, ["limit is 1.0 MiB", "activations ", "fix: --mem"]),
        (["finetune", "--resume", "runs/x"], 4, ["run folder does not exist: runs/x (looked for"]),
        (["eval", "cut.safetensors", "--data", "photos"], 4, ["is truncated: header promises "]),
        (["eval", "text.safetensors", "--data", "photos"], 4, ["is a text, which begins with "]),
        (["eval", "plain.pth", "--data", "photos"], 4, ["is an unconverted cifar_resnet20",
                                                        "fix: momconv convert cifar_resnet20"]),
        (["eval", "model.safetensors", "--data", "wolves/train"], 3, ["model does not have: cat"]),
        (["convert", "resnet50"], 5, ["cannot download ResNet50_Weights.IMAGENET1K_V2",
                                      "hub/checkpoints/resnet50-11ad3fa6.pth"]),
        ([*FINETUNE, "-o", "wolves"], 2, ["already exists and is not empty", "-o wolves-2"]),
        ([*FINETUNE, "-o", "cfg.yaml/x"], 5, ["cannot make output folder"]),
        (["convert", "cifar_resnet20", "--weights", "none", "-o", "no/x"], 5, ["fix: mkdir -p no"]),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_on_stderr(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: int,
    said: list[str],
) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    before = hashes(inputs)
    ran = run(*args)
    assert ran.exit_code == code, ran.stderr
    assert ran.stdout == ""
    for text in said:
        assert text.format(inputs) in ran.stderr
    assert hashes(inputs) == before


ENDLESS = "x" * 100_000


@pytest.mark.parametrize(
    "args",
    [
        [ENDLESS],
        ["convert", ENDLESS],
        ["convert", "resnet50", "--weights", ENDLESS],
        ["convert", "resnet50", "--gamma", ENDLESS],
        ["eval", ENDLESS, "--data", "photos"],
        ["eval", "model.safetensors", "--data", "photos", "--split", ENDLESS],
        ["export", "model.safetensors", "--format", "torchvision", "-o", ENDLESS],
        ["models", ENDLESS],
        ["predict", "model.safetensors", "photos", ENDLESS],
        ["profile-memory", "resnet50", "--budget", ENDLESS],
        ["recipes", "show", ENDLESS],
        ["--log-file", ENDLESS, "models"],
        [*FINETUNE, f"--{ENDLESS}", "1"],
        [*FINETUNE, "--device", ENDLESS],
        [*FINETUNE, "--freeze", ENDLESS],
        [*FINETUNE, "--lr", ENDLESS],
        [*FINETUNE, "--model", ENDLESS],
        [*FINETUNE, "--network", f"{ENDLESS}:make"],
        [*FINETUNE, "--set", ENDLESS],
        [*FINETUNE, "--set", f"{ENDLESS}=1"],
        [*FINETUNE, "-o", ENDLESS],
        finetune(ENDLESS),
    ],
)
def test_a_message_fits_a_screen(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.chdir(inputs)
    ran = run(*args)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert len(ran.stderr) < 24 * 80
    assert ran.stderr.count("\n") < 24


def test_a_tilde_is_the_home_folder_in_every_command(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(inputs))
    monkeypatch.chdir(tmp_path)
    home = hashes(inputs)
    for args in (
        ["eval", "~/model.safetensors", "--data=~/photos", "--compare=~/plain.pth"],
        ["predict", "~/model.safetensors", "~/photos/red", "~/loose/0.png"],
        ["inspect", "~/model.safetensors"],
        ["export", "~/model.safetensors", "--format=torchvision", f"-o{tmp_path}/a.pth"],
        ["convert", "cifar_resnet20", "--weights=~/plain.pth", "--gamma=0", "-ob.safetensors"],
        ["finetune", "--data=~/photos", "--from=~/model.safetensors", *TINY[4:], "--dry-run"],
    ):
        ran = run(*args)
        assert ran.exit_code == 0, (args, ran.stderr)
    assert hashes(inputs) == home
    ran = run("recipes", "cp", "three-gib", "~/mine.yaml")
    assert (inputs / "mine.yaml").is_file(), ran.stderr
    (inputs / "mine.yaml").unlink()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (["eval", "model.safetensors", "--data", "nope", "--json"], 3, "data.missing_folder"),
        (["eval", "cut.safetensors", "--data", "photos", "--json"], 4, "model_file.truncated"),
        (["convert", "vgg16", "--json"], 2, "usage.unsupported_model"),
        (["profile-memory", "resnet5O", "--json"], 2, "usage.unknown_model"),
    ],
)
def test_with_json_it_is_a_document(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, kind: str
) -> None:
    monkeypatch.chdir(inputs)
    ran = run(*args)
    error = json.loads(ran.stdout)["error"]
    assert (ran.exit_code, error["code"], error["kind"]) == (code, code, kind)
    assert ran.stderr == ""


def save_odd_pictures(root: Path) -> Path:
    """A folder with all that a folder from elsewhere may hold."""
    save_classes(root, "cat", "dog", count=20)
    for junk in ("zebra", ".ipynb_checkpoints", "__MACOSX"):
        (root / junk).mkdir()
    (root / "cat" / "up").symlink_to(root)
    deep = np.linspace(0, 65535, 36 * 34).reshape(34, 36).astype(np.uint16)
    Image.fromarray(deep).save(root / "cat" / "deep.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (36, 34)).save(root / "cat" / "turned.jpg", exif=exif)
    Image.new("CMYK", (36, 34)).save(root / "dog" / "print.jpg")
    Image.new("RGBA", (36, 34)).save(root / "dog" / "logo.png")
    frames = [Image.new("P", (36, 34), index) for index in range(3)]
    frames[0].save(root / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "cat" / "empty.png").touch()
    (root / "dog" / "page.jpg").write_text("<html>not found</html>")
    shutil.copy(root / "dog" / "1.png", root / "dog" / "again.png")
    # 20 000 × 20 000 pixels in a header of 33 bytes.
    header = b"IHDR\0\0\x4e\x20\0\0\x4e\x20\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
    (root / "dog" / "bomb.png").write_bytes(bomb + bytes(4) + b"IDAT" + bytes(8))
    return root


def test_odd_images_are_converted_or_left_out_and_nothing_is_written_beside_them(
    tmp_path: Path,
) -> None:
    data, folder = save_odd_pictures(tmp_path / "data"), tmp_path / "run"
    before = hashes(data)
    limit = ["--max-bad-fraction", "0.2"]
    ran = run("finetune", "--data", data, *TINY, *limit, "-o", folder)
    assert ran.exit_code == 0, ran.stderr
    assert "note: no val/ folder; holding out 20% per class (seed 0): " in ran.stderr
    assert "warning: ignoring 1 folder with no images: zebra\n" in ran.stderr
    assert f"listed in {folder}/data-report.json" in ran.stderr
    report = json.loads((folder / "data-report.json").read_text())
    found = report["train"]["unreadable"] | report["val"]["unreadable"]
    reasons = {str(Path(path).relative_to(data)): reason for path, reason in found.items()}
    assert reasons == {
        "cat/empty.png": "empty file",
        "dog/page.jpg": "not an image: looks like text",
        "dog/bomb.png": "image too large",
    }
    assert report["train"]["images"] + report["val"]["images"] == 46
    assert report["train"]["converted"] | report["val"]["converted"] == {
        "16-bit grey, rescaled to 0-255": 1,
        "CMYK": 1,
        "transparent, put on white": 1,
        "turned upright by EXIF": 1,
    }
    scored = run("eval", folder / "best.safetensors", "--data", data, "--json", *limit)
    assert json.loads(scored.stdout)["n"] == report["val"]["images"]
    assert hashes(data) == before


def test_names_from_elsewhere_cannot_harm_a_terminal(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    evil, long = "a\x1b[2J\rx\n\u202eerror: all is lost", "b" * 255
    save_classes(data, evil, long, "[bold red]c", count=4)
    (data / evil / "\x1b]0;title\x07.png").write_text("nothing")
    os.mkdir(os.fsencode(data) + b"/caf\xe9")
    save_noise(tmp_path / "z.png", 999)
    os.rename(tmp_path / "z.png", os.fsencode(data / long) + b"/caf\xe9.png")
    trained = run("finetune", "--data", data, *TINY, "--max-bad-fraction", "0.5", "-o", folder)
    assert trained.exit_code == 0, trained.stderr
    scored = run("eval", folder / "best.safetensors", "--data", data, "--max-bad-fraction", "1")
    assert scored.exit_code == 0, scored.stderr
    for split in ("train", "val"):
        save_classes(data / split, evil + "2", count=1)
    refused = run(
        "eval", folder / "best.safetensors", "--data", data / "..", "--max-bad-fraction", "1"
    )
    assert refused.exit_code == 3
    for ran in (trained, scored, refused):
        assert not any(line.startswith("error: all") for line in ran.output.splitlines())
        assert all(char.isprintable() or char == "\n" for char in ran.output)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run"}
