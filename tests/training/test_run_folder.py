import errno
import os
import tempfile
from pathlib import Path

import pytest

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.files import claim
from momconv.recipe import load_recipe
from momconv.training.run_folder import RunFolder, find_last_run, name_folder


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["data.path=a/photos"], "resnet152-photos"),
        (["data.path=a/photos/.", "model.name=resnet18"], "resnet18-photos"),
        (["data.path=photos", "model.from_file=b/mine.safetensors"], "mine-photos"),
        ([], "resnet152-images"),
    ],
)
def test_a_run_is_named_after_its_network_and_its_images(changes: list[str], name: str) -> None:
    assert name_folder(load_recipe(None, changes)) == Path("runs") / name


def test_a_missing_or_empty_folder_is_unused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").require_unused()
    RunFolder(tmp_path).require_unused()


def test_a_used_folder_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a run")
    run.make()
    run.metrics.touch()
    with pytest.raises(UsageError, match="not empty") as refused:
        run.require_unused()
    assert refused.value.fix == f"-o '{tmp_path}/a run-2'\n--overwrite"
    run.state.touch()
    (tmp_path / "a run-2").touch()
    with pytest.raises(UsageError) as refused:
        run.require_unused()
    assert refused.value.fix == (
        f"momconv finetune --resume '{tmp_path}/a run'\n-o '{tmp_path}/a run-3'\n--overwrite"
    )


def test_only_what_runs_write_is_overwritten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.make()
    run.plots.mkdir()
    for path in (run.state, run.card, run.plots / "curves.png"):
        path.touch()
    run.require_unused(overwrite=True)
    photo = run.path / "photo.jpg"
    photo.touch()
    with pytest.raises(UsageError, match=f"no run of momconv wrote {photo}") as refused:
        run.require_unused(overwrite=True)
    assert refused.value.fix == f"-o {tmp_path}/run-2"
    with pytest.raises(UsageError) as refused:
        run.require_unused()
    assert "--overwrite" not in (refused.value.fix or "")
    run.clear()
    assert list(run.path.iterdir()) == [photo]


def test_a_folder_of_the_name_of_a_file_is_no_runs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.make()
    (run.config / "mine").mkdir(parents=True)
    assert not run.is_unused
    with pytest.raises(UsageError, match=f"no run of momconv wrote {run.config}"):
        run.require_unused(overwrite=True)


def test_the_last_run_is_the_one_that_was_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match="no run to resume in"):
        find_last_run()
    for name, time in {"a": 1, "b": 3, "c": 2}.items():
        run = RunFolder(Path("runs") / name)
        run.make()
        run.state.touch()
        os.utime(run.state, (time, time))
    assert find_last_run() == Path("runs/b")
    RunFolder(Path("runs/b")).state.rename(RunFolder(Path("runs/b")).previous)  # and then a kill
    assert find_last_run() == Path("runs/b")


def test_the_working_directory_may_be_in_use_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert RunFolder(Path()).find_unused() == Path()
    (tmp_path / "here" / "photo.jpg").touch()
    assert RunFolder(Path()).find_unused() == tmp_path / "here-2"


def test_what_a_killed_start_left_counts_as_nothing(tmp_path: Path) -> None:
    run, left = RunFolder(tmp_path), tmp_path / f".plan.json.{'0' * 32}.tmp"
    for path in (run.rates, run.config, run.plan, run.split, run.data_report, left):
        path.touch()
    run.require_unused()
    run.make()
    assert not left.exists()
    run.previous.touch()
    with pytest.raises(UsageError, match="not empty"):
        run.require_unused()


def test_the_lock_of_a_killed_run_is_no_part_of_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.path.joinpath(claim.NAME).write_text("{}")
    run.path.joinpath(".tmpQ7xA2b").touch()  # of an earlier momconv
    run.require_unused(overwrite=True)
    run.require_unused()
    assert run.find_unused() == tmp_path
    with run.claimed():
        run.make()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_pictures_are_swept_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.plots.mkdir()
    (run.plots / f".curves.png.{'0' * 32}.tmp").touch()
    run.make()
    assert list(run.plots.iterdir()) == []


def test_a_run_can_be_resumed_between_two_names_of_its_state(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for path in (run.config, run.previous):
        path.touch()
    run.require_state()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_so_many_states_are_kept_as_is_asked_for(tmp_path: Path, count: int) -> None:
    folder = RunFolder(tmp_path)
    states = [folder.state, folder.previous]
    for path in (*states, folder.best):
        path.touch()
    folder.keep_states(count)
    assert [path.exists() for path in states] == [n < count for n in range(2)]
    assert folder.best.exists()


def test_what_cannot_be_resumed_is_named_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"does not exist: .*/x \(looked for state"):
        RunFolder(tmp_path / "x").require_state()
    for name in ("config.yaml", "state.safetensors"):
        (tmp_path / "good").mkdir(exist_ok=True)
        (tmp_path / "good" / name).touch()
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "good").require_state()
    with pytest.raises(ModelFileError, match="no run to resume in") as refused:
        RunFolder(tmp_path / "empty").require_state()
    assert f"can be resumed: {tmp_path / 'good'}" in refused.value.message
    assert refused.value.fix == f"momconv finetune --resume {tmp_path / 'good'}"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for act in (RunFolder.make, lambda run: run.require_room(0)):
        with pytest.raises(ResourceError, match="cannot make output folder"):
            act(RunFolder(tmp_path / "file" / "run"))


def test_a_folder_that_may_not_be_written_to_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried, by a call that is replaced here, as a test of root may write anywhere."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(ResourceError, match=f"{tmp_path} cannot be written to"):
            RunFolder(tmp_path / "above" / "run").require_room(0)
    RunFolder(tmp_path / "above" / "run").require_room(2**10)
    assert not [*tmp_path.iterdir()]


def test_a_disk_without_room_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs about 1048576.0 TiB, .* free"):
        RunFolder(tmp_path / "run").require_room(2**60)
