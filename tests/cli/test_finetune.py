"""What people type. The runs themselves are tested in tests/training/test_finetuning.py."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from momconv import cli
from momconv.cli import app
from momconv.cli._display import Display
from momconv.planner.prediction import Predictor
from momconv.recipe import load_recipe
from momconv.zoo.networks import build

SMALL = ["--model", "cifar_resnet20", "--weights", "none", "--device", "cpu"]
SMALL += ["--batch-size", "5", "--micro-batch", "2"]
IN_PROCESS = ["--set", "data.workers=0", "--no-plots"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, args)])


def start(*args: str | Path) -> subprocess.Popen[str]:
    """The real program, in a group of its own as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "momconv", "finetune", *map(str, args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_while_a_run_is_described_says_that_it_is_saved(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("momconv.reports.run.report_run", interrupt)
        stopped = run("--data", colours, *SMALL, *IN_PROCESS, "--epochs", "1", "-o", tmp_path / "r")
    assert stopped.exit_code == 130
    assert (
        f"the run is done, and saved. To describe it: momconv finetune --resume {tmp_path}/r"
        in (stopped.stderr)
    )
    assert not (tmp_path / "r" / "README.md").exists()
    assert run("--resume", tmp_path / "r").exit_code == 0
    assert (tmp_path / "r" / "README.md").exists()


def test_ctrl_c_and_resume_come_to_the_same_as_no_interruption(
    colours: Path, tmp_path: Path
) -> None:
    """Ctrl-C reaches the whole group, so the processes that read images too."""
    options: list[str | Path] = ["--data", colours, *SMALL, "--epochs", "4"]
    interrupted = start(*options, "--set", "data.workers=1", "-o", tmp_path / "run")
    assert interrupted.stderr is not None
    for line in interrupted.stderr:
        if line.startswith("epoch 1/4"):
            os.killpg(interrupted.pid, signal.SIGINT)
            break
    out, err = interrupted.communicate()
    assert (interrupted.returncode, out) == (130, "")
    assert err.endswith(f"To go on: momconv finetune --resume {tmp_path / 'run'}\n")
    assert err.count("note: stopping after this micro-batch") == 1
    assert "Traceback" not in err
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process had: sums depend on that
    straight = run(*options, *IN_PROCESS, "-o", tmp_path / "straight")
    resumed = run("--resume", tmp_path / "run", *IN_PROCESS)
    torch.set_num_threads(threads)
    for ran in (straight, resumed):
        assert ran.exit_code == 0, ran.stderr
        assert ran.stdout.startswith("best top-1")
    for name in ("state", "best", "last"):
        ours, theirs = (
            load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("run", "straight")
        )
        assert ours.keys() == theirs.keys()
        # When it was started, and where, is another matter.
        same = [key for key in ours if not key.startswith("document/")]
        assert all(torch.equal(ours[key], theirs[key]) for key in same)


def test_the_images_are_an_argument_or_an_option(colours: Path, tmp_path: Path) -> None:
    options = [*SMALL, *IN_PROCESS, "--dry-run", "--json", "-o", str(tmp_path / "run")]
    ways = ([str(colours)], ["--data", str(colours)], [str(colours), f"--data={colours}"])
    documents = [json.loads(run(*given, *options).stdout) for given in ways]
    assert {document["recipe"]["data"]["path"] for document in documents} == {str(colours)}
    refused = run(colours, "--data", tmp_path, *options)
    error = json.loads(refused.stdout)["error"]
    assert (refused.exit_code, error["kind"]) == (2, "usage.exclusive_options")
    assert error["message"] == f"two folders of images: {colours}, and --data {tmp_path}"


@pytest.mark.parametrize(
    "wrong", [["--model", "resnet5O"], ["--model", "resnet50", "--weights", "IMAGENET1K_V9"]]
)
def test_names_are_checked_before_images_are_opened(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    monkeypatch.setattr("momconv.training.images.check_images", None)
    assert run(colours, *wrong, "-o", tmp_path / "run").exit_code == 2


def test_the_same_command_starts_a_run_and_finds_it_done(colours: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [colours, *SMALL, *IN_PROCESS, "--epochs", "1", "--keep", "0"]
    command += ["--auto-resume", "-o", tmp_path / "run"]
    assert run(*command).stdout.startswith("best top-1")
    again = run(*command)
    assert (again.exit_code, again.stdout) == (0, "")
    assert again.stderr == (
        f"note: {tmp_path}/run is complete, without a state to go on from; "
        f"the model is {tmp_path}/run/best.safetensors\n"
    )
    done = json.loads(run(*command, "--json").stdout)
    assert (done["ok"], done["complete"]) == (True, True)
    refused = run(*command, "--overwrite")
    assert refused.stderr == "error: --auto-resume and --overwrite exclude each other\n"


def test_sigterm_is_143(colours: Path, tmp_path: Path) -> None:
    process = start("--data", colours, *SMALL, "--epochs", "50", "-o", tmp_path / "run")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 1/50"):
            process.terminate()
            break
    process.communicate()
    assert process.returncode == 143
    assert (tmp_path / "run" / "state.safetensors").is_file()


def test_when_the_time_is_up_a_run_says_how_to_go_on_and_has_not_failed(
    colours: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ran = run("--data", colours, *SMALL, *IN_PROCESS, "--time-limit", "0.01s", "-o", folder)
    assert (ran.exit_code, ran.stdout) == (0, "")
    command = f"momconv finetune --resume {folder}"
    assert ran.stderr.endswith(f"note: stopped after 0.01s, and saved. To go on: {command}\n")


def test_results_are_on_stdout_and_the_rest_on_stderr(colours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran = run("--data", colours, *SMALL, *IN_PROCESS, "--epochs", "1", "-o", folder)
    assert ran.exit_code == 0
    labels = [line.split("  ")[0] for line in ran.stdout.splitlines()]
    assert labels == ["best top-1", "best model", "last model", "numbers", "card", "report", "next"]
    command = f"momconv eval {folder / 'best.safetensors'} --data {colours}"
    assert ran.stdout.splitlines()[-1].split(maxsplit=1)[1] == command
    lines = ran.stderr.splitlines()
    assert lines[0].startswith("note: no val/ folder; holding out 20% per class (seed 0)")
    assert lines[1].startswith("note: the plain network, 2 images at once")
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "plain, stored",
        "plain, recomputed",
        "momentum",
    ]
    assert lines[6].startswith("note: batch of 5 in 2 micro-batches of 3 or 2 (store, fp32), ")
    assert lines[-2].startswith("warning: BatchNorm sees only 2 of 5 images")
    assert lines[-1].startswith("epoch 1/1 · loss ")
    assert " · val top-1 " in lines[-1]
    assert " · macro F1 " in lines[-1]


def test_options_and_set_win_over_the_recipe(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {epochs: 3, lr: 0.5, seed: 1}\n")
    args: list[str | Path] = [
        "--recipe",
        tmp_path / "recipe.yaml",
        "--epochs",
        "1",
        "--set",
        "train.lr=1e-3",
    ]
    ran = run("--data", colours, *SMALL, *IN_PROCESS, *args, "-o", tmp_path / "run")
    assert ran.exit_code == 0
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "epochs: 1\n" in written
    assert "lr: 0.001\n" in written
    assert "seed: 1\n" in written


def test_what_is_learnt_can_be_chosen_by_options(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {freeze: [stem], mixup: 0.5}\n")
    args: list[str | Path] = ["--recipe", tmp_path / "recipe.yaml", "--data", colours, *SMALL]
    args += [*IN_PROCESS, "--epochs", "1", "--no-hflip", "--augment", "none", "--ema", "0.9"]
    assert run(*args, "-o", tmp_path / "one").exit_code == 0
    written = (tmp_path / "one" / "config.yaml").read_text()
    for line in ("flip: false", "augment: none", "ema: 0.9", "mixup: 0.5", "freeze:\n  - stem"):
        assert f"  {line}\n" in written
    refused = run(*args, "--freeze", "layer1", "--freeze", "layer7", "-o", tmp_path / "two")
    assert refused.exit_code == 2
    assert "has no stage 'layer7'\nits stages: stem, layer1," in refused.stderr


def test_calibration_can_be_left_out_and_gamma_annealed(colours: Path, tmp_path: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), tmp_path / "trained.th")
    weights: list[str | Path] = ["--weights", tmp_path / "trained.th"]
    options: list[str | Path] = [
        *SMALL,
        *weights,
        "--no-calibrate",
        "--epochs",
        "2",
        "-o",
        tmp_path / "run",
    ]
    ran = run("--data", colours, *options, *IN_PROCESS, "--set", "momentum.anneal=1.5")
    assert ran.exit_code == 0, ran.stderr
    assert "calibrated" not in ran.stderr
    assert "re-estimated" not in ran.stderr
    assert "calibrate: false\n  anneal: 1.5\n" in (tmp_path / "run" / "config.yaml").read_text()
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [float(row["gamma"]) for row in rows] == pytest.approx([0.1 + 0.8 / 1.5, 0.9])


@pytest.fixture
def sigterm() -> Iterator[None]:
    """SIGTERM is handled as in the real program."""
    before = signal.signal(signal.SIGTERM, cli._quit)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize(
    ("title", "number", "word"),
    [
        ("planning", signal.SIGTERM, "terminated"),
        ("calibrating", signal.SIGTERM, "terminated"),
        ("calibrating", signal.SIGINT, "interrupted"),
    ],
)
def test_a_signal_before_the_run_is_told_and_leaves_nothing(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    title: str,
    number: signal.Signals,
    word: str,
) -> None:
    def advance(_self: Display, doing: str, _done: int, _total: int, _text: str = "") -> None:
        if doing == title:
            signal.raise_signal(number)

    def predict(*_: object, **_settings: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(Display, "advance", advance)
    if title == "planning":
        monkeypatch.setattr(Predictor, "predict", predict)
    torch.save(build("cifar_resnet20").state_dict(), tmp_path / "trained.th")
    options: list[str | Path] = [*SMALL, "--weights", tmp_path / "trained.th"]
    options += ["--micro-batch", "5", "--momentum", "always"]
    ran = run("--data", colours, *options, *IN_PROCESS, "-o", tmp_path / "run")
    assert (ran.exit_code, ran.stdout) == (128 + number, "")
    assert ran.stderr.splitlines()[-1] == f"error: {word}"
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "run").exists()


def test_the_run_folder_has_a_default_name(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--data", colours, *SMALL, *IN_PROCESS, "--epochs", "1").exit_code == 0
    assert (tmp_path / "runs" / "cifar_resnet20-colours" / "best.safetensors").is_file()
    again = run("--data", colours, *SMALL)
    assert again.exit_code == 2
    assert "fix: momconv finetune --resume runs/cifar_resnet20-colours\n" in again.stderr
    assert "fix: -o runs/cifar_resnet20-colours-2\n" in again.stderr
    assert "fix: --overwrite\n" in again.stderr
    numbered = run("--data", colours, *SMALL, "--auto-name", "--dry-run")
    assert numbered.stderr.endswith("the results go to runs/cifar_resnet20-colours-2\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    many = run("--data", colours, *SMALL, "--auto-name")
    assert (many.exit_code, "--auto-name: each of several" in many.stderr) == (2, True)


def test_an_earlier_run_is_given_up_once_the_new_one_can_begin(
    colours: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options: list[str | Path] = [*SMALL, *IN_PROCESS, "--epochs", "1", "-o", folder]
    assert run("--data", colours, *options).exit_code == 0
    assert not (folder / "plots").exists()
    before = (folder / "state.safetensors").read_bytes()
    wrong = run("--data", colours, *options, "--overwrite", "--freeze", "layer9")
    assert (wrong.exit_code, (folder / "state.safetensors").read_bytes()) == (2, before)
    again = run("--data", colours, *options, "--overwrite", "--seed", "7")
    assert again.exit_code == 0, again.stderr
    assert (folder / "state.safetensors").read_bytes() != before
    assert "seed: 7\n" in (folder / "config.yaml").read_text()


def test_a_fast_dev_run_goes_through_everything_and_keeps_nothing(
    colours: Path, tmp_path: Path
) -> None:
    options: list[str | Path] = [*SMALL, *IN_PROCESS, "--batch-size", "4", "-o", tmp_path / "run"]
    ran = run("--data", colours, *options, "--fast-dev-run")
    assert ran.exit_code == 0, ran.stderr
    assert "note: at most 8 images of a split: 8 train / 6 val\n" in ran.stderr
    assert "epoch 1/1 · loss " in ran.stderr
    assert ran.stderr.endswith(f"the results of a run go to {tmp_path / 'run'}\n")
    document = json.loads(run("--data", colours, *options, "--fast-dev-run", "--json").stdout)
    assert (document["ok"], len(document["history"])) == (True, 1)
    failed = run("--data", colours, *options, "--fast-dev-run", "--freeze", "layer9")
    assert failed.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_environment_may_set_what_the_command_line_does_not(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOMCONV_TRAIN__LR", "0.03")
    monkeypatch.setenv("MOMCONV_TRAIN__SEED", "3")
    ran = run("--data", colours, *SMALL, "--seed", "4", "--dry-run", "-o", tmp_path / "run")
    assert "lr: 0.03\n" in ran.stdout
    assert "seed: 4\n" in ran.stdout
    monkeypatch.setenv("MOMCONV_TRAIN__LR", "fast")
    wrong = run("--data", colours, *SMALL)
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: MOMCONV_TRAIN__LR: train.lr: 'fast' is not a number")


def test_a_run_can_be_compared_with_another(colours: Path, tmp_path: Path) -> None:
    alone = run("--data", colours, *SMALL, "--check-env")
    assert (alone.exit_code, "fix: --recipe runs/NAME/config" in alone.stderr) == (2, True)
    folder = tmp_path / "run"
    options: list[str | Path] = [*SMALL, *IN_PROCESS, "--epochs", "1", "-o", folder]
    assert run("--data", colours, *options).exit_code == 0
    began = (folder / "run.json").read_text()
    (folder / "run.json").write_text(began.replace('"momconv": "', '"momconv": "0'))
    again = ["--recipe", str(folder / "config.yaml"), "--check-env", "--dry-run"]
    compared = run(*again, "-o", tmp_path / "again")
    assert compared.exit_code == 0
    (told,) = [line for line in compared.stderr.splitlines() if "not as in the run" in line]
    assert ": momconv is " in told
    (folder / "run.json").unlink()
    assert run(*again, "-o", tmp_path / "again").exit_code == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        pytest.param([], 2, "no folder of images to train on", id="nothing at all"),
        pytest.param(["--data", "/nope"], 3, "data folder does not exist: /nope", id="no data"),
        pytest.param(["--epochs", "many"], 2, "train.epochs: 'many' is not an integer ≥ 1"),
        pytest.param(["--batch-size", "-5"], 2, "train.batch_size: '-5' is not an integer ≥ 1"),
        pytest.param(["--time-limit", "2"], 2, "train.time_limit: '2' is not a duration like"),
        pytest.param(["--set", "train.epohcs=3"], 2, "did you mean train.epochs?"),
        pytest.param(["--memory", "much"], 2, "train.memory: 'much' is not"),
        pytest.param(["--recipe", "none.yaml"], 2, "recipe does not exist: none.yaml"),
        pytest.param(["--lr", "fast"], 2, "'fast' is not a number > 0 or auto or null"),
        pytest.param(["--augment", "heavy"], 2, "is not none or light or trivial or randaug"),
        pytest.param(["--device", "cpu", "--set", "train.precision=fp16"], 2, "is for GPUs"),
        pytest.param(["--device", "cuda:99"], 5, "--device cuda:99: this PyTorch"),
        pytest.param(["--set", "momentum.anneal=11"], 2, "11 epochs are more than train.epochs"),
        pytest.param(["--set", "momentum.anneal=1", "--gamma", "0"], 2, "momentum.gamma is 0"),
        pytest.param(["--set", "momentum.anneal=1", "--from", "x"], 2, "has its γ already"),
        pytest.param(["--resume", "nowhere"], 4, "run folder does not exist: nowhere"),
        pytest.param(["--resume", "x", "-o", "y"], 2, "--resume and --output exclude each other"),
        pytest.param(["--from", "x", "--gamma", "1"], 2, "--from and --gamma exclude each other"),
        pytest.param(["--epohcs", "3"], 2, "--epochs", id="an option that does not exist"),
    ],
)
def test_mistakes_are_explained(args: list[str], code: int, message: str) -> None:
    ran = run(*args)
    assert ran.exit_code == code
    assert message in ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr


def test_mistakes_that_need_images_are_explained(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.pth").touch()
    mistakes: list[tuple[list[str | Path], int, str]] = [
        (["--model", "resnet5o"], 2, "did you mean resnet50?"),
        (["--model", "vgg16"], 2, "not a residual network"),
        ([*SMALL[:6], "--freeze", "layer9"], 2, "no stage 'layer9'"),
        (["--from", tmp_path / "no.safetensors"], 4, "file does not exist"),
        ([*SMALL[:6], "--memory", "1MiB"], 5, "does not fit: it needs"),
    ]
    for args, code, message in mistakes:
        ran = run("--data", colours, *args, "-o", tmp_path / "run")
        assert (ran.exit_code, message in ran.stderr) == (code, True), ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_all_and_writes_nothing(colours: Path, tmp_path: Path) -> None:
    options: list[str | Path] = ["--data", colours, *SMALL, *IN_PROCESS, "--lr", "0.02"]
    options += ["--limit", "0.5", "-o", tmp_path / "run", "--dry-run"]
    ran = run(*options)
    assert ran.exit_code == 0, ran.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "recipe.yaml").write_text(ran.stdout)
    assert load_recipe(tmp_path / "recipe.yaml").train.lr == 0.02
    assert "note: batch of 5 in 2 micro-batches" in ran.stderr
    assert "note: only 0.5 of the images of each class: 9 train / 3 val" in ran.stderr
    assert ran.stderr.endswith(f"the results go to {tmp_path / 'run'}\n")
    document = json.loads(run(*options, "--json").stdout)
    assert document["ok"] is True
    assert document["plan"]["micro_batch"] == 2
    assert document["images"]["train"]["classes"] == {"blue": 3, "green": 3, "red": 3}
    assert run("--resume", tmp_path, "--dry-run").exit_code == 2


def test_with_json_a_run_ends_in_one_document(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: list[str | Path] = [*IN_PROCESS, "--limit", "0.5", "--json", "-o", tmp_path / "run"]
    ran = run("--data", colours, *SMALL, "--epochs", "1", *options)
    document = json.loads(ran.stdout)
    assert (ran.exit_code, document["ok"], document["complete"]) == (0, True, True)
    assert document["best"] == str(tmp_path / "run" / "best.safetensors")
    assert document["best_epoch"] == document["history"][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path)
    again = run("--resume", "last", "--epochs", "9", "--time-limit", "0.01s", "--json")
    assert (again.exit_code, json.loads(again.stdout)["complete"]) == (0, False)
    changed = "train.epochs from 1 to 9, train.time_limit from None to 0.01s"
    assert f"note: changed since: {changed}\n" in again.stderr
