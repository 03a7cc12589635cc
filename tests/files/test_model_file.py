import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from momconv.errors import ModelFileError, ResourceError, UncheckedFile, UsageError
from momconv.files.atomic import write_atomically
from momconv.files.model_file import load, read_description, read_metadata, read_skeleton, save
from momconv.files.tensor_file import write_tensors
from momconv.surgery.conversion import convert, read_schemes
from momconv.zoo.checkpoints import read_metadata as read_raw_metadata
from momconv.zoo.description import describe
from momconv.zoo.networks import build, replace_head


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    plain = build("cifar_resnet20")
    replace_head(plain, ["ants", "bees"])
    plain(torch.randn(8, 3, 32, 32))  # BatchNorm statistics that are not those of a new network
    return convert(plain, gamma=0.5).eval()


@pytest.fixture
def path(network: nn.Module, tmp_path: Path) -> Path:
    save(network, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _rewrite(path: Path, **changes: str | None) -> None:
    """Replace ``momconv.*`` metadata in ``path``; ``None`` takes a value away."""
    metadata: dict[str, str | None] = {**read_raw_metadata(path)}
    metadata |= {f"momconv.{key}": value for key, value in changes.items()}
    kept = {k: v for k, v in metadata.items() if v is not None}
    write_atomically(path, lambda target: write_tensors(target, load_file(path), kept))


def test_a_network_comes_back_the_same(network: nn.Module, path: Path) -> None:
    loaded = load(path)
    assert not loaded.training
    assert describe(loaded) == describe(network)
    assert read_schemes(loaded) == read_schemes(network)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), network(images))


def test_an_older_file_whose_ranges_are_not_recorded_finds_them(
    network: nn.Module, path: Path
) -> None:
    images, fresh = torch.randn(2, 3, 32, 32), read_schemes(network)
    expected = network(images)
    stages = read_metadata(path)["stages"]
    for stage in stages.values():
        stage["fraction_bits"] = 14
        for run in stage["runs"]:
            del run["exponent"]
    _rewrite(path, stages=json.dumps(stages))
    loaded = load(path)
    assert read_schemes(loaded) == fresh  # nothing has been seen yet
    assert torch.equal(loaded(images), expected)
    assert read_schemes(loaded) == read_schemes(network) != fresh


def test_an_unconverted_network_comes_back_too(tmp_path: Path) -> None:
    plain = build("resnet18", num_classes=3).eval()
    save(plain, tmp_path / "plain.safetensors")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "plain.safetensors")(images), plain(images))


def test_the_tensors_are_those_of_the_state_dict(network: nn.Module, path: Path) -> None:
    tensors = load_file(path)
    state = network.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


def test_channels_last_weights_are_saved(network: nn.Module, path: Path, tmp_path: Path) -> None:
    save(network.to(memory_format=torch.channels_last), tmp_path / "last.safetensors")
    last, first = load_file(tmp_path / "last.safetensors"), load_file(path)
    assert all(torch.equal(last[key], first[key]) for key in first)


def test_the_metadata_tell_what_the_file_is(network: nn.Module, path: Path) -> None:
    metadata = read_metadata(path)
    assert metadata["schema"] == 2
    assert metadata["description"]["classes"] == ["ants", "bees"]
    assert metadata["description"]["architecture"] == "cifar_resnet20"
    assert metadata["stages"] == json.loads(json.dumps(read_schemes(network)))
    assert metadata["torch"] == torch.__version__
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert all(isinstance(value, str) for value in file.metadata().values())


def test_extra_values_are_kept_and_cannot_replace_the_files_own(
    network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save(network, path, extra={"metrics": {"top1": 0.9}, "schema": 7})
    assert read_metadata(path)["metrics"] == {"top1": 0.9}
    assert read_metadata(path)["schema"] == 2


def test_the_same_network_is_the_same_bytes(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(network, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    (a, first), (b, second) = (
        ((tmp_path / name).read_bytes(), read_metadata(tmp_path / name)) for name in "ab"
    )
    for key in ("created", "checksum"):  # the latter covers the former
        b = b.replace(second[key].encode(), first[key].encode())
    assert a == b
    assert list(read_raw_metadata(tmp_path / "a"))[:2] == ["format", "momconv.schema"]


def test_the_file_has_the_permissions_of_any_new_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(os.stat(p).st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_missing_folder_is_named(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="folder does not exist"):
        save(network, tmp_path / "nowhere" / "model.safetensors")


def test_a_network_without_a_description_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no description"):
        save(nn.Linear(1, 1), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_answered_with_the_closest_one(path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist") as caught:
        load(path.with_name("modell.safetensors"))
    assert caught.value.fix == f"closest existing file is {path}"


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.01])
def test_a_truncated_file_is_told_with_both_sizes(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    told = f"file has {int(keep * len(content)):,}\nfix: copy or download it again$"
    with pytest.raises(ModelFileError, match=told) as caught:
        load(path)
    assert caught.value.kind == "model_file.truncated"


@pytest.mark.parametrize("read", [load, read_metadata, read_description, read_skeleton])
@pytest.mark.parametrize(
    "place", [b"ants", b"momconv.checksum", b"momconv.stages", b'"gamma\\": 0.5', None]
)
def test_a_single_wrong_bit_is_noticed_wherever_it_is(
    path: Path, read: Callable[[Path], object], place: bytes | None
) -> None:
    content = bytearray(path.read_bytes())
    where = content.index(place) + len(place) - 2 if place else len(content) // 2
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"is damaged.*\n.*checksum") as caught:
        read(path)
    assert caught.value.kind == "model_file.damaged"


def test_a_file_of_an_earlier_momconv_has_no_checksum_which_is_told_once(
    path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    metadata = read_raw_metadata(path)
    del metadata["momconv.checksum"]
    save_file(load_file(path), path, metadata)
    assert read_description(path).classes == ("ants", "bees")
    assert read_skeleton(path).training
    load(path)
    (told,) = recwarn.list
    assert told.category is UncheckedFile
    assert str(path) in str(told.message)


def test_a_file_that_is_no_model_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("hello, this is text")
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        load(tmp_path / "model.safetensors")


def test_a_file_that_may_not_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    # Root, who may run this, is refused nothing.
    monkeypatch.setattr("momconv.opening.open_at_once", refuse)
    with pytest.raises(ModelFileError, match=f"cannot read {path}: Permission denied"):
        load(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_unconverted_file_is_recognised(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plain{suffix}"
    state = build("cifar_resnet32").state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(ModelFileError, match="is an unconverted cifar_resnet32") as caught:
        load(path)
    assert caught.value.fix == f"momconv convert cifar_resnet32 --weights {path}"


def test_a_file_of_a_newer_momconv_is_told(path: Path) -> None:
    _rewrite(path, schema="3", description="something else by then")
    with pytest.raises(ModelFileError, match="written by a newer momconv") as caught:
        load(path)
    assert caught.value.kind == "model_file.newer_schema"


def _edited(path: Path, **changes: Any) -> str:
    return json.dumps(read_metadata(path)["description"] | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_classes": 10**12, "classes": None}, "no head of 1000000000000 classes"),
        ({"num_classes": 3}, "2 class names for 3 outputs"),
        ({"architecture": "cifar_resnet32"}, "missing: layer1.3.conv1.weight"),
        ({"architecture": "resnet18"}, "no head of 2 classes"),
        ({"architecture": "os.system"}, "unknown model 'os.system'"),
        ({"surprise": 1}, "momconv.description.surprise"),
        ({"classes": "ab"}, "momconv.description.classes"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(
    path: Path, changes: dict[str, Any], reason: str
) -> None:
    _rewrite(path, description=_edited(path, **changes))
    with pytest.raises(ModelFileError, match=reason) as caught:
        load(path)
    assert caught.value.kind == "model_file.inconsistent"
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("description", None),
        ("description", "{"),
        ("stages", "[]"),
        ("stages", '{"layer1": 3}'),
        ("created", None),
        ("metrics", "not json"),
    ],
)
def test_metadata_that_are_missing_or_damaged_are_named(
    path: Path, key: str, value: str | None
) -> None:
    _rewrite(path, **{key: value})
    with pytest.raises(ModelFileError, match=f"momconv.{key}"):
        load(path)


def test_stages_that_the_network_does_not_have_are_refused(path: Path) -> None:
    stages = read_metadata(path)["stages"]
    _rewrite(path, stages=json.dumps({"layer9": next(iter(stages.values()))}))
    with pytest.raises(ModelFileError, match="'layer9'") as caught:
        load(path)
    assert str(path) in caught.value.message


def test_an_architecture_that_momconv_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(build("resnet18", num_classes=2), path)
    _rewrite(path, description=_edited(path, architecture="os.system"))
    with pytest.raises(ModelFileError, match=r"unknown model 'os\.system'"):
        load(path)


def test_a_file_without_a_tensor_is_refused(path: Path) -> None:
    tensors = load_file(path)
    del tensors["conv1.weight"]
    write_atomically(path, lambda target: write_tensors(target, tensors, read_raw_metadata(path)))
    with pytest.raises(ModelFileError, match=r"1 missing: conv1\.weight"):
        load(path)
