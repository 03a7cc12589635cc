import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import flip_a_bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from momconv.eightbit import AdamW8bit
from momconv.errors import ModelFileError, ResourceError, UncheckedFile
from momconv.files.atomic import write_atomically
from momconv.files.tensor_file import write_tensors
from momconv.surgery.conversion import convert, read_schemes
from momconv.training.progress import EpochRow, Progress
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_newest, load_state, save_state
from momconv.zoo.description import describe
from momconv.zoo.networks import build, replace_head

PROGRESS = Progress([EpochRow(1, 0.1 + 0.2, None, 1 / 3, 1e-5, 7.5, 2**20, 9.0)], 3, 12, 0.7, 1.5)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), 0.1, 0.9)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), 0.1)


def adamw_8bit(model: nn.Module) -> Optimizer:
    return AdamW8bit(model.to(memory_format=torch.channels_last).parameters(), 0.1)


def make_network() -> nn.Module:
    model = convert(build("cifar_resnet20"), gamma=0.5)
    replace_head(model, ("ant", "bee"))
    return model.train()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", [sgd, adamw, adamw_8bit])
def test_what_was_saved_goes_on_as_if_it_had_not_been(
    tmp_path: Path, make: Callable[[nn.Module], Optimizer]
) -> None:
    model = make_network()
    optimizer = make(model)
    step(model, optimizer)
    save_state(RunFolder(tmp_path), model, optimizer, PROGRESS)
    step(model, optimizer)  # draws random images

    saved = load_state(RunFolder(tmp_path).state)
    again = make(saved.model)
    saved.restore_optimizer(again, saved.model)
    saved.restore_random_states()
    step(saved.model.train(), again)
    assert saved.progress == PROGRESS
    assert describe(saved.model) == describe(model)
    assert read_schemes(saved.model) == read_schemes(model)
    state = saved.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_state_before_the_first_step_is_one_too(tmp_path: Path) -> None:
    model = make_network()
    save_state(RunFolder(tmp_path), model, sgd(model), Progress())
    saved = load_state(RunFolder(tmp_path).state)
    optimizer = sgd(saved.model)
    saved.restore_optimizer(optimizer, saved.model)
    step(saved.model.train(), optimizer)
    assert saved.progress == Progress()


def test_a_loss_that_is_no_number_survives(tmp_path: Path) -> None:
    model, row = make_network(), EpochRow(1, 0.5, math.nan, 0.5, 0.1, math.inf, 2**20, 1.0)
    save_state(RunFolder(tmp_path), model, sgd(model), Progress([row]))
    (again,) = load_state(RunFolder(tmp_path).state).progress.history
    assert math.isnan(again.val_loss or 0)
    assert again.images_per_second == math.inf


def test_a_stranger_s_state_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    model, path = make_network(), RunFolder(tmp_path).state
    optimizer = sgd(model)
    step(model, optimizer)
    save_state(RunFolder(tmp_path), model, optimizer, Progress())
    sound = path.read_bytes()
    key = "optimizer/momentum_buffer/conv1.weight"
    for name, value in {"optimizer/x/nowhere": torch.ones(1), key: torch.ones(2)}.items():
        path.write_bytes(sound)
        damage(path, lambda tensors, _, n=name, v=value: tensors.update({n: v}))  # type: ignore[misc]
        with pytest.raises(ModelFileError, match=f"{name} fits no parameter"):
            load_state(path)
    for value in (torch.ones(9), torch.zeros_like(torch.get_rng_state())):
        path.write_bytes(sound)
        damage(path, lambda tensors, _, v=value: tensors.update({"random/cpu": v}))  # type: ignore[misc]
        with pytest.raises(ModelFileError, match="random generators"):
            load_state(path).restore_random_states()


def damage(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    # With a checksum, which a stranger can compute too.
    write_atomically(path, lambda target: write_tensors(target, tensors, metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, texts: texts.clear(), "is not the state of a run"),
        (lambda _, texts: texts.update({"momconv.run": "{}"}), "Field required"),
        (lambda tensors, _: tensors.pop("model/conv1.weight"), "1 missing: conv1.weight"),
        (
            lambda _, texts: texts.update(
                {"momconv.run": texts["momconv.run"].replace("cifar_resnet20", "resnetx")}
            ),
            "unknown model",
        ),
    ],
)
def test_a_damaged_state_is_named(
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
    message: str,
) -> None:
    model = make_network()
    save_state(RunFolder(tmp_path), model, sgd(model), Progress())
    damage(RunFolder(tmp_path).state, change)
    with pytest.raises(ModelFileError, match=message) as refused:
        load_state(RunFolder(tmp_path).state)
    assert str(RunFolder(tmp_path).state) in refused.value.message


def test_a_state_of_an_earlier_momconv_has_no_checksum_which_is_told(tmp_path: Path) -> None:
    model, path = make_network(), RunFolder(tmp_path).state
    save_state(RunFolder(tmp_path), model, sgd(model), PROGRESS)
    with safe_open(path, "pt") as file:
        metadata = {"momconv.run": file.metadata()["momconv.run"], "momconv.sha256": "another"}
    save_file(load_file(path), path, metadata)
    with pytest.warns(UncheckedFile, match=f"{path} is of an earlier momconv"):
        assert load_state(path).progress == PROGRESS


def test_a_truncated_state_is_named(tmp_path: Path) -> None:
    model = make_network()
    path = RunFolder(tmp_path).state
    save_state(RunFolder(tmp_path), model, sgd(model), Progress())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="is truncated"):
        load_state(path)


def test_a_single_wrong_bit_is_noticed(tmp_path: Path) -> None:
    model = make_network()
    save_state(RunFolder(tmp_path), model, sgd(model), Progress())
    flip_a_bit(RunFolder(tmp_path).state)
    with pytest.raises(ModelFileError, match="its checksum is another"):
        load_state(RunFolder(tmp_path).state)


def test_a_disk_that_does_not_keep_what_is_written_is_named_and_the_old_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = RunFolder(tmp_path), make_network()
    save_state(folder, model, sgd(model), Progress())

    def save_badly(path: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
        write_tensors(path, tensors, texts)
        flip_a_bit(path)

    monkeypatch.setattr("momconv.training.state.write_tensors", save_badly)
    with pytest.raises(ResourceError, match="does not keep what is written"):
        save_state(folder, model, sgd(model), PROGRESS)
    assert load_state(folder.state).progress == Progress()
    assert list(tmp_path.iterdir()) == [folder.state]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (flip_a_bit, ["checksum is another", "going on from the state before"]),
        (Path.unlink, ["going on from the state before"]),
    ],
)
def test_without_the_newest_state_the_one_before_is_used_and_kept(
    tmp_path: Path, spoil: Callable[[Path], None], told: list[str]
) -> None:
    folder, model, heard = RunFolder(tmp_path), make_network(), list[str]()
    for progress in (PROGRESS, Progress()):
        save_state(folder, model, sgd(model), progress)
    spoil(folder.state)
    assert load_newest(folder, heard.append, lambda: None).progress == PROGRESS
    assert [part in text for part, text in zip(told, heard, strict=True)] == [True] * len(told)
    assert (
        load_newest(folder, heard.append, lambda: None).progress == PROGRESS
    )  # which is the newest now
    assert len(heard) == len(told)


def test_two_damaged_states_are_an_error_that_moves_nothing(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), make_network()
    for _ in range(2):
        save_state(folder, model, sgd(model), Progress())
    for path in (folder.state, folder.previous):
        flip_a_bit(path)
    with pytest.raises(ModelFileError, match="checksum"):
        load_newest(folder, pytest.fail, lambda: None)
    assert all(path.is_file() for path in (folder.state, folder.previous))
