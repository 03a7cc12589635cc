import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Log, Signals, assert_same, flip_a_bit, read_metrics, resume, small
from safetensors.torch import load_file, save_file
from torch import Tensor

from momconv.errors import (
    DataError,
    ModelFileError,
    ResourceError,
    UsageError,
)
from momconv.files.model_file import read_metadata
from momconv.momentum import equations
from momconv.momentum.ranging import Survey, find_fitting
from momconv.recipe import Recipe, load_recipe, recall_recipe
from momconv.training.finetuning import NothingLeft, Result, finetune
from momconv.training.interruption import Interrupted
from momconv.training.resuming import mend
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state
from momconv.zoo import checkpoints

MICRO_BATCHES = 7  # of an epoch of 18 images: 3 + 2, 3 + 2, 3 + 2, 3


@pytest.fixture(scope="module")
def straight(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run from start to end."""
    return finetune(small(colours), tmp_path_factory.mktemp("straight"))


def interrupt(recipe: Recipe, folder: Path, n: int) -> None:
    with pytest.raises(Interrupted):
        finetune(recipe, folder, listener=Signals(n))


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(1, id="in the first step"),
        pytest.param(2, id="at the end of the first step"),
        pytest.param(3, id="in the second step"),
        pytest.param(MICRO_BATCHES, id="in the last step of an epoch"),
        pytest.param(MICRO_BATCHES + 2, id="while validating"),
        pytest.param(MICRO_BATCHES + 5, id="in the second epoch"),
    ],
)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    straight: Result, colours: Path, tmp_path: Path, n: int
) -> None:
    interrupt(small(colours), tmp_path / "run", n)
    resume(tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


def test_a_run_may_be_interrupted_again_and_again(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    """From a step to the next one, since each resumed run gets two micro-batches further."""
    interrupt(small(colours), tmp_path / "run", 3)
    for _ in range(3):
        with pytest.raises(Interrupted):
            resume(tmp_path / "run", listener=Signals(3))
    resume(tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


def test_a_run_that_was_killed_goes_on_from_its_last_epoch(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    """A second signal raises SystemExit and saves nothing, like SIGKILL."""
    with pytest.raises(SystemExit):
        finetune(small(colours), tmp_path / "run", listener=Signals(MICRO_BATCHES + 6, times=2))
    resume(tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


@pytest.mark.parametrize(("every", "step"), [("2", 2), ("0.000001 s", 3)])
def test_the_state_is_saved_inside_an_epoch_too(
    straight: Result, colours: Path, tmp_path: Path, every: str, step: int
) -> None:
    recipe = small(colours, f"train.save_every={every}")
    with pytest.raises(SystemExit):
        finetune(recipe, tmp_path / "run", listener=Signals(MICRO_BATCHES, times=2))
    assert load_state(RunFolder(tmp_path / "run").state).progress.step == step
    resume(tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


def test_models_and_numbers_that_a_kill_prevented_are_written_on_resuming(
    straight: Result, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    for name in ("best.safetensors", "last.safetensors", "metrics.csv", "events.jsonl"):
        (folder / name).unlink()
    assert straight.best_epoch.epoch == 2
    resume(folder)
    assert_same(straight.folder, folder)


def test_adamw_goes_on_exactly_too(colours: Path, tmp_path: Path) -> None:
    recipe = small(colours, "train.optimizer=adamw")
    finetune(recipe, tmp_path / "straight")
    interrupt(recipe, tmp_path / "run", 5)
    resume(tmp_path / "run")
    assert_same(tmp_path / "straight", tmp_path / "run")


def test_a_finished_run_says_so_and_changes_nothing(straight: Result, tmp_path: Path) -> None:
    folder, log = Path(shutil.copytree(straight.folder, tmp_path / "run")), Log()
    result = resume(folder, listener=log)
    assert log.told == [
        f"note: {folder} is complete (2/2). To go on: momconv finetune --resume {folder} --epochs 4"
    ]
    assert result.best_epoch == straight.best_epoch
    assert_same(straight.folder, folder)


def test_a_finished_run_goes_on_with_more_epochs(straight: Result, tmp_path: Path) -> None:
    folder, log = Path(shutil.copytree(straight.folder, tmp_path / "run")), Log()
    result = resume(folder, "train.epochs=3", listener=log)
    assert result.epochs == 3
    assert read_metrics(folder)[:2] == read_metrics(straight.folder)
    assert any(
        "3 epochs instead of 2: the schedule (cosine) now ends there" in text for text in log.told
    )
    assert load_recipe(folder / "config.yaml").train.epochs == 3


@pytest.mark.parametrize(
    "change",
    [
        "model.name=resnet18",
        "momentum.gamma=0.5",
        "momentum.calibrate=false",
        "momentum.anneal=1.0",
        "train.batch_size=4",
        "train.seed=1",
        "data.val_dir=elsewhere",
    ],
)
def test_what_a_run_is_about_cannot_change(straight: Result, change: str) -> None:
    with pytest.raises(UsageError, match=f"cannot change {change.split('=')[0]}"):
        resume(straight.folder, change)


def test_a_run_that_goes_on_must_have_something_to_learn(colours: Path, tmp_path: Path) -> None:
    recipe = small(colours, "train.freeze=[head]", "train.epochs=1")
    finetune(recipe, tmp_path / "run")
    with pytest.raises(UsageError, match="head"):
        resume(tmp_path / "run", "train.freeze_epochs=1")


def test_a_run_without_the_memory_to_go_on_is_advised_only_what_it_can_change(
    straight: Result, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    with pytest.raises(ResourceError) as refused:
        resume(folder, "train.epochs=3", "train.memory=4MiB")
    (memory,) = [fix for fix in (refused.value.fix or "").splitlines() if "--memory" in fix]
    assert not re.search("--gamma|--resolution|--freeze", refused.value.fix or "")
    resume(folder, "train.epochs=3", f"train.memory={memory.split()[1]}")


def steady(data: Path, *changes: str) -> Recipe:
    """A recipe by which nothing is learnt, so that the first epoch stays the best."""
    return small(data, "train.lr=1e-12", "train.freeze_bn=true", *changes)


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_a_best_model_that_is_lost_is_told_and_never_reported(
    colours: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    run = RunFolder(tmp_path / "run")
    assert finetune(steady(colours), run.path).best_epoch.epoch == 1
    resume(run.path)
    assert read_metadata(run.best)["training"]["epochs"] == 1
    damage(run.best)
    for told in (1, 0):
        log = Log()
        result = resume(run.path, listener=log)
        lost = [text for text in log.told if "the best model, of epoch 1, is lost" in text]
        assert len(lost) == told
        assert result.best_epoch.epoch == read_metadata(run.best)["training"]["epochs"] == 2
    assert torch.equal(load_file(run.best)["conv1.weight"], load_file(run.last)["conv1.weight"])


def test_a_damaged_best_model_is_written_anew_from_the_state_that_is_it(
    colours: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    finetune(small(colours, "train.epochs=1"), run.path)
    weights = load_file(run.best)
    flip_a_bit(run.best)
    log = Log()
    resume(run.path, listener=log)
    (told,) = [text for text in log.told if f"{run.best} is damaged" in text]
    assert told.endswith("it is written anew, from the state")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(run.best).items())


def test_within_an_epoch_the_next_ones_take_the_place_of_a_lost_best_model(
    colours: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    interrupt(steady(colours), run.path, MICRO_BATCHES + 8)  # after a step of the second epoch
    run.best.unlink()
    with pytest.raises(ModelFileError, match="no epoch is left") as refused:
        resume(run.path, "train.epochs=1")
    assert refused.value.fix == f"{run.resume_command} --epochs 2"
    result = resume(run.path, "train.epochs=3")
    assert result.best_epoch.epoch == read_metadata(run.best)["training"]["epochs"] == 2


def test_what_changed_among_the_images_is_told(colours: Path, tmp_path: Path) -> None:
    data, run, log = Path(shutil.copytree(colours, tmp_path / "data")), tmp_path / "run", Log()
    (data / "red" / "bad.png").touch()  # was there from the start
    finetune(small(data, "train.epochs=1", "data.limit=0.8", "data.max_bad_fraction=0.2"), run)
    resume(run, "train.epochs=2", listener=log)
    assert not any(" new " in text for text in log.told)
    first = min((data / "red").glob("*.png"))
    for n in range(4):
        shutil.copy(first, data / "red" / f"new-{n}.png")
    shutil.copytree(data / "green", data / "yellow")
    moved = data.rename(tmp_path / "moved")
    resume(run, "train.epochs=3", f'data.path="{moved}"', listener=log)
    assert f"note: the images are in {moved} now, and were in {data}" in log.told
    (told,) = [text for text in log.told if "not part of this run" in text]
    assert told.startswith(
        f"note: 12 images in {moved} are new and not part of this run, of 1 class: yellow, which "
        f"are new too: {moved}/red/new-0.png"
    )
    assert told.endswith(
        f"to train on them too: momconv finetune --from {run}/best.safetensors -o {run}-2 "
        f"--data {moved}"
    )


def test_a_folder_that_is_gone_is_named(colours: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(colours, tmp_path / "data")), tmp_path / "run"
    finetune(small(data, "train.epochs=1"), run)
    data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=f"there is no folder {data}\nit may have moved"):
        resume(run, "train.epochs=2")


COPIES = ("config.yaml", "run.json", "split.json")


@pytest.fixture(scope="module")
def done(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return finetune(small(colours, "train.epochs=1"), tmp_path_factory.mktemp("done"))


@pytest.fixture
def run(done: Result, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(done.folder, tmp_path / "run")))


def test_whole_copies_stay_as_they_are(run: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    mend(run, pytest.fail)
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


@pytest.mark.parametrize("name", [*COPIES, "plan.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xf2\xff", b"model: {name: resnet18}", None])
def test_a_damaged_copy_is_told_and_mended(
    run: RunFolder, name: str, content: bytes | None
) -> None:
    path, told = run.path / name, list[str]()
    wanted = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    mend(run, told.append)
    (warning,) = told
    problem = "is gone" if content is None else "is damaged"
    assert warning.startswith(f"warning: {path} {problem}")
    recovered = path.read_bytes()
    assert recovered == wanted or name == "plan.json"
    mend(run, pytest.fail)


@pytest.mark.parametrize("name", [*COPIES, "plan.json"])
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_copy_is_not_waited_for(run: RunFolder, name: str) -> None:
    path, told = run.path / name, list[str]()
    wanted = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    mend(run, told.append)
    assert [text.startswith(f"warning: {path} is damaged") for text in told] == [True]
    assert path.read_bytes() == wanted or name == "plan.json"


def test_folders_in_place_of_the_files_of_a_run_are_kept_and_it_goes_on(run: RunFolder) -> None:
    log, names = Log(), [*COPIES, "plan.json", "state.safetensors", "metrics.csv", "README.md"]
    run.state.rename(run.previous)
    for name in names:
        (run.path / name).unlink(missing_ok=True)
        (run.path / name / "mine").mkdir(parents=True)
    mend(run, log.tell)
    assert resume(run.path, "train.epochs=2", listener=log).epochs == 2
    for name in names:
        path = run.path / name
        assert f"warning: {path} is a folder, which is {path}.old now" in log.told
        assert path.is_file() or name == "README.md"  # which a report has
        assert (run.path / f"{name}.old" / "mine").is_dir()


def test_a_damaged_last_model_is_told_and_written_anew(run: RunFolder) -> None:
    log = Log()
    flip_a_bit(run.last)
    resume(run.path, listener=log)
    (warning,) = [text for text in log.told if str(run.last) in text]
    assert warning.startswith(f"warning: {run.last} is damaged")
    assert warning.endswith("\nit is written anew, from the state")
    checkpoints.verify(run.last)
    resume(run.path, listener=log)
    assert [text for text in log.told if str(run.last) in text] == [warning]


def test_half_a_recipe_is_damaged_too(run: RunFolder) -> None:
    whole, told = run.config.read_text(), list[str]()
    run.config.write_text(whole[: whole.index("train:")])
    mend(run, told.append)
    assert [f"{run.config} is damaged" in text for text in told] == [True]
    assert run.config.read_text() == whole


def test_a_recipe_that_somebody_edited_is_not_followed_and_that_is_told(run: RunFolder) -> None:
    whole, told = run.config.read_text(), list[str]()
    run.config.write_text("# mine\n" + whole.replace("batch_size: 5", "batch_size: 6"))
    mend(run, told.append)
    (warning,) = told
    assert warning.startswith(f"warning: {run.config} was changed (train.batch_size from 5 to 6);")
    assert run.config.read_text() == whole


def test_a_run_goes_on_by_its_state_alone(run: RunFolder, done: Result) -> None:
    for name in (*COPIES, "plan.json", "metrics.csv", "events.jsonl", "last.safetensors"):
        (run.path / name).unlink()
    log = Log()
    mend(run, log.tell)
    result = resume(run.path, "train.epochs=2", listener=log)
    assert result.epochs == 2
    assert result.recipe.train.batch_size == done.recipe.train.batch_size == 5
    assert len([text for text in log.told if "is gone; it is written anew" in text]) == 4
    assert recall_recipe(run.config).train.epochs == 2
    mend(run, pytest.fail)  # as the state has the change too


def without_documents(path: Path) -> None:
    """Make the state one of an earlier momconv."""
    metadata = {"momconv.run": checkpoints.read_metadata(path)["momconv.run"]}
    tensors = {k: v.clone() for k, v in load_file(path).items() if not k.startswith("document/")}
    save_file(tensors, path, metadata)


@pytest.mark.filterwarnings("ignore::momconv.errors.UncheckedFile")
def test_a_state_of_an_earlier_momconv_goes_on_by_its_files(run: RunFolder) -> None:
    for state in (run.state, run.previous):
        without_documents(state)
    run.plan.write_text("{")
    run.provenance.write_text("")
    log = Log()
    assert resume(run.path, "train.epochs=2", listener=log).epochs == 2
    damaged = [text for text in log.told if "is damaged, and was removed" in text]
    assert [
        path.name in text for path, text in zip((run.plan, run.provenance), damaged, strict=True)
    ]
    assert load_recipe(run.config).train.epochs == 2


@pytest.mark.filterwarnings("ignore::momconv.errors.UncheckedFile")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("model: {}\n")])
def test_without_a_recipe_such_a_state_is_refused(
    run: RunFolder, damage: Callable[[Path], object]
) -> None:
    for state in (run.state, run.previous):
        without_documents(state)
    damage(run.config)
    with pytest.raises(ModelFileError, match=f"{run.config} is gone or damaged") as refused:
        mend(run, pytest.fail)
    assert refused.value.exit_code == 4


def test_the_same_recipe_starts_a_run_goes_on_with_it_and_finds_it_done(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    recipe, folder = small(colours), tmp_path / "run"
    for n in (3, 5):
        with pytest.raises(Interrupted):
            finetune(recipe, folder, resume="auto", listener=Signals(n))
    for _ in range(2):
        log = Log()
        finetune(recipe, folder, resume="auto", listener=log)
        assert_same(straight.folder, folder)
    assert log.told == [
        f"note: {folder} is complete (2/2). To go on: momconv finetune --resume {folder} --epochs 4"
    ]


def test_a_run_goes_on_as_was_decided_where_the_same_recipe_leaves_that_open(
    colours: Path, tmp_path: Path
) -> None:
    open_ = ["momentum.use=auto", "train.lr=auto", "train.epochs=1"]
    recipe, folder = small(colours, *open_), tmp_path / "run"
    first = finetune(recipe, folder, resume="auto").recipe
    assert isinstance(first.train.lr, float)
    assert first.momentum.use != "auto"
    again = finetune(recipe, folder, resume="auto").recipe
    assert again == first.with_absolute_paths()


def test_another_run_is_not_gone_on_with(straight: Result, colours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    other = Path(shutil.copytree(colours, tmp_path / "other"))
    for recipe, change in (
        (small(other), f"data.path from {colours} to {other}"),
        (small(colours, "train.batch_size=6"), "train.batch_size from 5 to 6"),
    ):
        with pytest.raises(UsageError) as refused:
            finetune(recipe, folder, resume="auto")
        assert refused.value.message == f"{folder} has another run: {change}"
        assert refused.value.fix == f"-o {folder}-2"
    assert_same(straight.folder, folder)


def test_of_a_half_written_run_what_is_whole_decides(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    """What a kill leaves before the first state is nothing; one between two states has both."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    (folder.path / f".state.safetensors.{'0' * 8}_1_{'0' * 8}.tmp").touch()
    shutil.copy(RunFolder(straight.folder).config, folder.config)
    with pytest.raises(Interrupted):
        finetune(small(colours), folder.path, resume="auto", listener=Signals(3))
    folder.state.replace(folder.previous)
    finetune(small(colours), folder.path, resume="auto")
    assert_same(straight.folder, folder.path)


def test_a_run_that_keeps_no_state_is_done_or_another_one(
    straight: Result, colours: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    for state in folder.glob("state*"):
        state.unlink()
    with pytest.raises(UsageError, match="output folder already exists and is not empty"):
        finetune(small(colours), folder, resume="auto")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("keep: 2", "keep: 0"))
    with pytest.raises(NothingLeft):
        finetune(small(colours), folder, resume="auto")
    with pytest.raises(UsageError, match=f"{folder} has another run: train.seed from 0 to 1"):
        finetune(small(colours, "train.seed=1"), folder, resume="auto")


def test_a_run_whose_ranges_have_been_widened_goes_on_exactly_after_a_kill(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equations, "HEADROOM", 0)  # so that training outgrows what it saw first
    widened: list[int] = []

    def listening(measure: Survey, seen: tuple[float, bool], y: Tensor, exponent: int) -> int:
        fitting = find_fitting(measure, seen, y, exponent)
        widened.extend([fitting] * (fitting > exponent))
        return fitting

    monkeypatch.setattr("momconv.momentum.sequential.find_fitting", listening)
    recipe = small(colours, "momentum.strategy=momentum", "train.lr=4")
    finetune(recipe, tmp_path / "straight")
    in_all = len(widened)
    with pytest.raises(SystemExit):
        finetune(recipe, tmp_path / "run", listener=Signals(MICRO_BATCHES + 6, times=2))
    assert len(widened) > in_all > 0
    resume(tmp_path / "run")
    assert_same(tmp_path / "straight", tmp_path / "run")
