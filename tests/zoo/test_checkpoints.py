import argparse
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from momconv.errors import ModelFileError
from momconv.zoo.checkpoints import difference, read_metadata, read_state

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def test_tensors_in_containers_have_the_keys_before_their_names(tmp_path: Path) -> None:
    content = {"epoch": 3, "nets": [{"ema": TENSORS}], "x": torch.ones(1)}
    torch.save(content, tmp_path / "file.pth")
    state = read_state(tmp_path / "file.pth")
    assert list(state) == ["nets/0/ema/a.weight", "nets/0/ema/a.bias", "x"]
    assert torch.equal(state["nets/0/ema/a.weight"], TENSORS["a.weight"])


def test_arrays_are_read_where_there_are_no_tensors(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in TENSORS.items()}
    torch.save({"model": arrays}, tmp_path / "arrays.pth")
    state = read_state(tmp_path / "arrays.pth")
    assert {name: value.tolist() for name, value in state.items()} == {
        f"model/{name}": value.tolist() for name, value in TENSORS.items()
    }
    torch.save({"model": TENSORS, "random": arrays}, tmp_path / "both.pth")
    assert set(read_state(tmp_path / "both.pth")) == {"model/a.weight", "model/a.bias"}


def test_what_an_optimizer_keeps_is_no_network(tmp_path: Path) -> None:
    kept = {"state": {0: {"momentum_buffer": torch.ones(2)}}}
    for beside, kind in ((nn.Linear(1, 1), "whole_module"), (1, "no_state_dict")):
        torch.save({"ema": beside, "opt": kept}, tmp_path / "x.pth")
        with pytest.raises(ModelFileError) as caught:
            read_state(tmp_path / "x.pth")
        assert caught.value.kind == f"model_file.{kind}"


def test_a_container_that_contains_itself_is_read_once(tmp_path: Path) -> None:
    content: dict[str, object] = {"model": TENSORS}
    content["self"] = content
    torch.save(content, tmp_path / "file.pth")
    assert list(read_state(tmp_path / "file.pth")) == ["model/a.weight", "model/a.bias"]


def test_safetensors_are_recognised_by_their_content(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file.pth", metadata={"format": "pt"})
    assert torch.equal(read_state(tmp_path / "file.pth")["a.bias"], TENSORS["a.bias"])
    assert read_metadata(tmp_path / "file.pth") == {"format": "pt"}


def _saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("code from the file was run",)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"1234567\0{not a header}", "truncated"),
        ((4).to_bytes(8, "little") + b"{no}", "damaged"),
        ((9).to_bytes(8, "little") + b'{"a": 12}', "damaged"),
        (_saved(TENSORS)[:700], "truncated"),
        (pickle.dumps(_Evil()), "pickle"),
        (_saved(_Evil()), "unsafe"),
        (_saved(nn.Linear(1, 1)), "whole_module"),
        (_saved(nn.Linear(1, 1), zipped=False), "whole_module"),
        (_saved({"model": nn.Linear(1, 1), "optimizer": {"m": torch.ones(1)}}), "whole_module"),
        (_saved(torch.ones(1)), "no_state_dict"),
        (_saved({"epoch": 3}), "no_state_dict"),
        (_saved({}), "no_state_dict"),
        (_saved([1, 2]), "no_state_dict"),
    ],
    ids=[
        "empty", "not-a-header", "not-json", "not-tensors", "cut", "pickled-code", "saved-code",
        "whole-module", "old-module", "module-inside", "one-tensor", "no-tensors", "nothing",
        "a-list",
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_state(path)
    assert str(path) in caught.value.message
    assert caught.value.kind == f"model_file.{kind}"


def test_a_truncated_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:2000])
    promise = rf"is truncated: header promises {whole:,} bytes, file has 2,000\n"
    with pytest.raises(ModelFileError, match=promise + "fix: copy or download it again$"):
        read_state(path)


def test_a_damaged_length_reads_no_more_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ModelFileError, match="file has 10"):
        read_state(path)


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2 * 10**8).to_bytes(8, "little") + b"{")
        file.truncate(3 * 10**8)  # takes no room on the disk
    with pytest.raises(ModelFileError, match="its header: 200,000,000 bytes"):
        read_state(path)


def test_what_unpacks_to_more_than_it_has_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**5)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ModelFileError, match=r"unpacks to 40\d,"):
        read_state(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9), torch.zeros(9, 9).to_sparse(), torch.zeros(9, device="meta")],
    ids=["expanded", "sparse", "meta"],
)
def test_a_tensor_that_claims_more_than_it_holds_is_refused(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    torch.save({"fc.weight": tensor}, tmp_path / "file.pth")
    with pytest.raises(ModelFileError) as caught:
        read_state(tmp_path / "file.pth")
    assert caught.value.kind == "model_file.no_state_dict"


def test_a_missing_file_is_answered_with_the_closest_one(tmp_path: Path) -> None:
    (tmp_path / "resnet20.pth").touch()
    with pytest.raises(ModelFileError, match="file does not exist") as caught:
        read_state(tmp_path / "resnet2O.pth")
    assert caught.value.fix == f"closest existing file is {tmp_path / 'resnet20.pth'}"
    (tmp_path / "ants").mkdir()
    (tmp_path / "ants" / "best.safetensors").touch()
    with pytest.raises(ModelFileError, match=f"runs with a model: {tmp_path / 'ants'}"):
        read_state(tmp_path / "nope")


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are not UTF-8")
def test_a_file_is_read_whose_folder_is_not_named_in_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"l\xe4rche")
    folder.mkdir()
    path = folder / "m.safetensors"
    path.write_bytes(save({"weight": torch.ones(2)}))
    assert torch.equal(read_state(path)["weight"], torch.ones(2))


def test_a_missing_folder_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        read_state(tmp_path / "nowhere" / "file.pth")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ModelFileError, match="is a folder") as caught:
        read_state(tmp_path)
    assert caught.value.fix == f"--weights {tmp_path}/weights.pth"


def test_the_difference_names_the_tensors() -> None:
    state = nn.Linear(3, 2).state_dict() | {"extra": torch.zeros(())}
    assert difference(nn.Linear(4, 2), state) == (
        "1 unexpected: extra; 1 of another shape: weight 2×3 instead of 2×4"
    )
    assert difference(nn.Linear(3, 2), {}) == "2 missing: weight, bias"
    assert difference(nn.Linear(3, 2), nn.Linear(3, 2).state_dict()) is None


def test_complex_numbers_are_no_weights() -> None:
    network = nn.Linear(2, 1)
    state = network.state_dict()
    state["bias"] = state["bias"] + 1j
    assert difference(network, state) == "1 complex: bias"


def test_old_files_without_batch_counters_fit() -> None:
    network = nn.BatchNorm1d(2)
    state = {k: v for k, v in network.state_dict().items() if k != "num_batches_tracked"}
    assert difference(network, state) is None


def test_a_single_wrong_bit_of_a_pickled_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"the checksum of .*data/0 in it is another"):
        read_state(path)


def test_a_checkpoint_that_was_saved_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"x": torch.arange(1000.0), "beside": argparse.Namespace(lr=1)}, path)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert torch.equal(read_state(path)["x"], torch.arange(1000.0))
