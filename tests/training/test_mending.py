import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Log, resume, small
from safetensors.torch import load_file, save_file

from momconv.errors import ModelFileError
from momconv.recipe import load_recipe, recall_recipe
from momconv.training.finetuning import Result, finetune
from momconv.training.mending import mend
from momconv.training.run_folder import RunFolder
from momconv.zoo.checkpoints import read_metadata

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
    metadata = {"momconv.run": read_metadata(path)["momconv.run"]}
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
