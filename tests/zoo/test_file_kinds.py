import gzip
import io
import json
import pickle
import shlex
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from momconv.errors import ModelFileError
from momconv.zoo.checkpoints import read_state

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5a5a\nsize 1098968\n"


def _zip(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return file.getvalue()


def _tar(*names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.ones(1))
    return file.getvalue()


def _saved(version: int = 2, *, zipped: bool = True) -> bytes:
    file, content = io.BytesIO(), {"weight": torch.ones(100)}
    torch.save(content, file, pickle_protocol=version, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _script() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of its deprecation
        traced = torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1))
        torch.jit.save(traced, file)
    return file.getvalue()


def _exported() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),)), file)
    return file.getvalue()


def _refusal(path: Path, content: bytes) -> ModelFileError:
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_state(path)
    assert caught.value.message.startswith(f"{path} is ")
    assert caught.value.fix is not None
    return caught.value


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (b"", "empty", "download it again"),
        (b" \n", "empty but for white space", "download it again"),
        (POINTER, "a pointer of git LFS", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "a web page", "/resolve/"),
        (b"\n<html lang='en'>", "a web page", "curl -L"),
        (b"<?xml version='1.0'?><Error>", "a web page", "curl -L"),
        (b'{"message": "Not Found"}', "a JSON text", "download it again"),
        ("Not found: größer".encode(), "a text, which begins with 'Not found: größer'", "again"),
        (gzip.compress(b"weights", mtime=0), "packed with gzip", "gunzip"),
        (b"7z\xbc\xaf\x27\x1c\0", "packed with 7-Zip", "7z x"),
        (_tar("deep/net.pth", "LICENSE"), "a tar archive with deep/net.pth in it", "tar -xf"),
        (_tar("sys_info", "pickle", "tensors", "storages"), "before 0.1.10", "torch.load(f)"),
        (_zip(README=b"", net_dot_pth=b""), "a zip archive with net.pth in it", "unzip"),
        (_zip(config_dot_json=b"", **{"model_dot_weights.h5": b""}), "Keras", "state_dict()"),
        (_npz, "NumPy", "state_dict()"),
        (_saved()[:-50], "truncated", "download it again"),
        (_script, "a TorchScript archive", "torch.jit.load(f).state_dict()"),
        (_exported, "a program of torch.export", "torch.export.load(f).state_dict"),
        (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file", "state_dict()"),
        (b"\x08\x08\x12\x07pytorch\x1a\x03", "ONNX", "state_dict()"),
        (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}", "a pickle that torch.save", "pickle.load("),
        (pickle.dumps({"weight": torch.ones(1)}), "a pickle that torch.save", "pickle.load("),
        (lambda: _saved(4), "version 4 of pickle", "weights_only=False"),
        (lambda: _saved(5, zipped=False), "version 5 of pickle", "weights_only=False"),
        (b"\x89PNG\r\n\x1a\n\0", "an image", "state_dict()"),
    ],
)
def test_a_file_is_called_what_it_is(
    tmp_path: Path, content: bytes | Callable[[], bytes], said: str, fix: str
) -> None:
    error = _refusal(tmp_path / "file.pth", content if isinstance(content, bytes) else content())
    assert said in error.message
    assert fix in str(error.fix)


@pytest.mark.parametrize("length", [0x80, 0x8B1F, 0x4B50])
def test_no_length_of_a_safetensors_header_is_taken_for_another_kind(
    tmp_path: Path, length: int
) -> None:
    """As a pickle, gzip and zip begin."""
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\7")
    assert read_state(tmp_path / "x.safetensors")["x"].tolist() == [7]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (_script, ["weight", "bias"]),
        (lambda: _saved(4), ["weight"]),
        (lambda: pickle.dumps({"weight": np.ones((1, 1), np.float32)}), ["weight"]),
    ],
    ids=["torchscript", "pickle 4", "arrays"],
)
def test_the_way_to_a_state_dict_works(
    tmp_path: Path, content: Callable[[], bytes], names: list[str]
) -> None:
    error = _refusal(tmp_path / "net.pt", content())
    _, *arguments = shlex.split(str(error.fix))
    subprocess.run([sys.executable, *arguments], check=True)
    assert list(read_state(tmp_path / "net-weights.pth")) == names


def test_an_index_and_a_part_say_how_to_join_them(tmp_path: Path) -> None:
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": files}).encode()
    error = _refusal(tmp_path / "model.safetensors.index.json", index)
    assert "the index of weights in 2 files, such as model-00001-of-00002" in error.message
    assert str(error.fix).endswith(f"'{tmp_path}/model-*-of-00002.safetensors'")


@pytest.mark.parametrize(
    ("inside", "said", "fix"),
    [
        (".metadata", "a distributed checkpoint of PyTorch", "dcp_to_torch"),
        ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "python "),
        ("saved_model.pb", "a SavedModel of TensorFlow", "state_dict()"),
        ("model.safetensors", "a folder, and not a file in it", "--weights "),
    ],
)
def test_a_folder_is_called_what_it_is(tmp_path: Path, inside: str, said: str, fix: str) -> None:
    (tmp_path / inside).touch()
    with pytest.raises(ModelFileError) as caught:
        read_state(tmp_path)
    assert said in caught.value.message
    assert fix in str(caught.value.fix)
    assert caught.value.kind == "model_file.is_folder"
