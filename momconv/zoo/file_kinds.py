"""What a file or folder is that was taken for a checkpoint, and how to get from it to one."""

import json
import re
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from momconv.errors import ModelFileError
from momconv.words import plural

_AGAIN = "copy or download it again"
_BEGINNING = 512  # bytes that are looked at
_WEIGHTS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt")
_SHOWN = 40  # characters of a text
_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # in files of PyTorch before 1.6
_BEFORE_MAGIC = 32  # bytes, with it
_PROTOCOL = 3  # of pickle, the last that torch.load reads without running anything
_DAMAGE = (EOFError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")

# How a file of each kind begins.
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip --keep --suffix ''"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\xfd7zXZ\0": ("xz", "unxz --keep"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
    b"Rar!": ("RAR", "unrar x"),
}
_FOREIGN = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras and TensorFlow write",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"RIFF": "a RIFF file, such as a WebP image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
    b"MZ": "a program",
}


def refuse_other_kinds(path: Path) -> None:
    """Do nothing if the file ``path`` may be a checkpoint, of PyTorch or safetensors.

    Raises:
        ModelFileError: It is something else, as its content shows.
    """
    with path.open("rb") as file:
        head = file.read(_BEGINNING)
    if not head:
        raise _is(path, "empty", "empty", _AGAIN)
    if text := _as_text(head):
        raise _explain_text(path, text)
    if head[8:9] == b"{":
        return  # of safetensors, before which there is a length that may look like anything
    if head.startswith(b"PK"):
        _refuse_other_archives(path)
    else:
        _refuse_packed(path, head)
        _refuse_foreign(path, head)


def _refuse_packed(path: Path, head: bytes) -> None:
    for magic, (name, command) in _PACKED.items():
        if head.startswith(magic):
            raise _is(path, "packed", f"packed with {name}", f"{command} {_quote(path)}")
    if head[257:262] == b"ustar":
        raise _explain_tar(path)


def _refuse_foreign(path: Path, head: bytes) -> None:
    if _MAGIC in head[:_BEFORE_MAGIC]:
        _refuse_protocol(path, head)
    elif head[:1] == b"\x80":
        what = "a pickle that torch.save did not write, of which momconv runs nothing"
        raise _is(path, "pickle", what, _save("pickle.load(open(f, 'rb'))", path, "pickle, "))
    if foreign := _name_foreign(path, head):
        raise _has_no_weights(path, foreign)


def _refuse_protocol(path: Path, head: bytes) -> None:
    """Do nothing if the pickle of a checkpoint, which begins so, is one that torch.load reads."""
    if head[:1] == b"\x80" and head[1] > _PROTOCOL:
        what = f"a checkpoint in version {head[1]} of pickle, which PyTorch reads only with trust"
        raise _is(path, "protocol", what, _save("torch.load(f, weights_only=False)", path))


def read_pickle(archive: zipfile.ZipFile, most: int = -1) -> bytes:
    """Return what torch.save pickled into ``archive``, perhaps without a checksum.

    That is nothing if it did not, and at ``most`` so many bytes.

    Raises:
        Exception: It is damaged: BadZipFile, EOFError, OSError, RuntimeError, ValueError or
            zlib.error.
    """
    entry = next((e for e in archive.infolist() if e.filename.endswith("data.pkl")), None)
    if entry is None:
        return b""
    if all(e.CRC == 0 for e in archive.infolist()):
        del entry.CRC  # then it is not looked at
    with archive.open(entry) as file:
        return file.read(most)


def describe_folder(path: Path) -> ModelFileError:
    """Return what is wrong with a folder in the place of a file, and what in it may be meant."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names:
        what = "a distributed checkpoint of PyTorch"
        command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        fix: str | None = f"{command} {_quote(path)} weights.pth"
    elif "zero_to_fp32.py" in names:
        what = "a checkpoint of DeepSpeed"
        fix = f"python {_quote(path / 'zero_to_fp32.py')} {_quote(path)} weights"
    elif "saved_model.pb" in names:
        return _has_no_weights(path, "a SavedModel of TensorFlow", kind="is_folder")
    else:
        what = "a folder, and not a file in it"
        inside = [path / name for name in names if name.endswith(_WEIGHTS)]
        fix = f"--weights {_quote(inside[0])}" if inside else None
    return _is(path, "is_folder", what, fix)


def explain_part(path: Path) -> tuple[str, str] | None:
    """Return what to say of ``path`` if it is one of several files, and how to join them."""
    found = _SHARD.search(path.name)
    if found is None:
        return None
    number, count = map(int, found.groups())
    pattern = path.with_name(f"{path.name[: found.start()]}-*-of-{found[2]}{path.suffix}")
    return f"is part {number} of {count}", join_parts(pattern)


def join_parts(pattern: Path) -> str:
    """Return the command that writes one file of those that a pattern stands for."""
    program = (
        "import glob, sys; from safetensors.torch import load_file, save_file; "
        "save_file({k: v for f in glob.glob(sys.argv[1]) for k, v in load_file(f).items()}, "
        "'weights.safetensors')"
    )
    return shlex.join(["python", "-c", program, str(pattern)])


def _as_text(head: bytes) -> str:
    """Return the text that a file begins with; nothing if it is none."""
    if b"\0" in head:
        return ""
    for cut in range(4):  # a character may be cut
        try:
            text = head[: len(head) - cut].decode()
        except UnicodeDecodeError:
            continue
        return text if all(c.isprintable() or c.isspace() for c in text.strip("\ufeff")) else ""
    return ""


def _explain_text(path: Path, text: str) -> ModelFileError:
    start = text.lstrip("\ufeff").lstrip()
    if start.startswith("version https://git-lfs"):
        what = "a pointer of git LFS, which stands for the file until it is fetched"
        where = f"cd {_quote(path.parent)} && " if path.parent != Path() else ""
        return _is(path, "lfs_pointer", what, f"{where}git lfs pull")
    if re.match(r"(<\?xml|<!doctype html|<html|<head|<!--)", start, re.IGNORECASE):
        what = "a web page: its address is that of a page about the file, or wants a login"
        link = "curl -L -o FILE URL, with that of the download itself, such as /resolve/ or /raw/"
        return _is(path, "web_page", what, f"{link} instead of /blob/")
    if start.startswith(("{", "[")):
        return _explain_json(path)
    if not start:
        return _is(path, "empty", "empty but for white space", _AGAIN)
    first = start.splitlines()[0][:_SHOWN]
    return _is(path, "text", f"a text, which begins with {first!r}", _AGAIN)


def _explain_json(path: Path) -> ModelFileError:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError):
        content = None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        return _is(path, "text", "a JSON text, and holds no weights", _AGAIN)
    parts = sorted({str(name) for name in files.values()})
    what = f"the index of weights in {plural(len(parts), 'file')}, such as {parts[0][:_SHOWN]}"
    if len(parts) == 1:
        return _is(path, "index", what, f"--weights {_quote(path.with_name(parts[0]))}")
    _, fix = explain_part(path.with_name(parts[0])) or ("", None)
    return _is(path, "index", what, fix)


def _explain_tar(path: Path) -> ModelFileError:
    try:
        with tarfile.open(path) as archive:
            names = [entry.name for entry in archive]
    except (tarfile.TarError, OSError, EOFError):
        names = []
    if {"storages", "tensors", "pickle"} <= set(names):
        what = "a checkpoint of a PyTorch before 0.1.10, which no safe reader knows"
        return _is(path, "old", what, _save("torch.load(f)", path))
    return _is(path, "packed", f"a tar archive{_list(names)}", f"tar -xf {_quote(path)}")


def _refuse_other_archives(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            begin = read_pickle(archive, 2)
    except _DAMAGE as error:
        raise ModelFileError(
            f"{path} is truncated or damaged: it begins as a checkpoint of PyTorch, and has no end",
            kind="model_file.truncated",
            fix=_AGAIN,
        ) from error
    ends = {Path(name).name for name in names}
    if "constants.pkl" in ends:
        what = "a TorchScript archive: a program with its weights, of which momconv runs none"
        raise _is(path, "torchscript", what, _save("torch.jit.load(f).state_dict()", path))
    if any(name.endswith("archive_format") for name in ends) or any(
        name.startswith("serialized_exported_program") for name in ends
    ):
        what = "a program of torch.export with its weights, of which momconv runs none"
        raise _is(path, "exported", what, _save("dict(torch.export.load(f).state_dict)", path))
    if "data.pkl" in ends:
        _refuse_protocol(path, begin)
        return
    if "model.weights.h5" in ends:
        raise _has_no_weights(path, "a network of Keras")
    if names and all(name.endswith(".npy") for name in names):
        raise _has_no_weights(path, "a file of NumPy's arrays (npz)")
    raise _is(path, "packed", f"a zip archive{_list(names)}", f"unzip {_quote(path)}")


def _name_foreign(path: Path, head: bytes) -> str | None:
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            return name
    if head[4:8] == b"TFL3":
        return "a network of TensorFlow Lite"
    named = (b"onnx", b"pytorch", b"keras", b"tf2onnx")
    if path.suffix == ".onnx" or (
        head[:1] == b"\x08" and head[2:3] == b"\x12" and any(n in head[:64].lower() for n in named)
    ):
        return "a network in ONNX"
    if path.suffix == ".pb":
        return "a graph of TensorFlow"
    return None


def _has_no_weights(path: Path, what: str, kind: str = "foreign") -> ModelFileError:
    fix = "torch.save(model.state_dict(), 'weights.pth') of the same network in PyTorch"
    return _is(path, kind, f"{what}, and no checkpoint of PyTorch", fix)


def _save(expression: str, path: Path, more: str = "") -> str:
    """Return the command that makes a plain checkpoint of ``path``, where that can be trusted."""
    out = path.with_name(f"{path.stem}-weights.pth")
    program = f"import {more}sys, torch; f = sys.argv[1]; torch.save({expression}, sys.argv[2])"
    return shlex.join(["python", "-c", program, str(path), str(out)])


def _list(names: Sequence[str]) -> str:
    inside = [*_find_weights(names), *names]
    return f" with {inside[0][:_SHOWN]} in it" if inside else ""


def _find_weights(names: Sequence[str]) -> Iterator[str]:
    return (name for name in names if name.endswith(_WEIGHTS))


def _is(path: Path, kind: str, what: str, fix: str | None) -> ModelFileError:
    return ModelFileError(f"{path} is {what}", kind=f"model_file.{kind}", fix=fix)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
