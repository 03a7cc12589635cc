import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from momconv.errors import ModelFileError
from momconv.files.tensor_file import write_tensors
from momconv.zoo.checkpoints import verify

TENSORS = {
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 2).bfloat16(),
    "truth": torch.tensor([True, False]),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "double": torch.randn(2, dtype=torch.float64),
    "complex": torch.randn(2, dtype=torch.complex64),
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"format": "pt", "greeting": "γ × σ"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    with safe_open(path, "pt") as file:
        assert file.metadata()["greeting"] == "γ × σ"
    verify(path)


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    tied = torch.randn(4)
    write_tensors(tmp_path / "a", {"one": tied, "other": tied[1:]}, {})
    assert torch.equal(load_file(tmp_path / "a")["other"], tied[1:])


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", TENSORS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_each_wrong_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.arange(4, dtype=torch.uint8)}, {})
    sound = path.read_bytes()
    for bit in range(32):
        content = bytearray(sound)
        content[-4 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="its checksum is another"):
            verify(path)
