"""Networks for programs that do not know momconv: ONNX, torch.export and plain state dicts.

Each file is read back and run before it takes its name, and one that computes something else is
refused. What an image must be made into and what the outputs are called is written beside it, with
the keys that timm uses, and into the file where the format has a place for it. So is the SHA-256 of
the file, as not every format has a checksum.
"""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from momconv.errors import ModelFileError, MomconvError, UsageError
from momconv.exhaustion import is_exhaustion
from momconv.files.atomic import write_atomically, write_text
from momconv.files.plain_file import load_command, save_plain
from momconv.momentum.sequential import momentum_stages
from momconv.states import in_eval_mode
from momconv.surgery.conversion import revert
from momconv.zoo import checkpoints, own
from momconv.zoo.description import Description, describe
from momconv.zoo.networks import build_described

Format = Literal["torch-export", "onnx", "torchvision"]
SUFFIXES: dict[Format, str] = {
    "torch-export": ".pt2",
    "onnx": ".onnx",
    "torchvision": ".safetensors",
}

# Of the largest logit. Another library adds in another order, after which a value may round to the
# next point of a momentum stage's grid, in every block.
BOUND = 1e-3

_IMAGES, _LOGITS = "images", "logits"  # what input and output are called
_KEY = "momconv.config"
_TRIED = 2  # images
_OPSET = 18  # since 2022; onnxruntime knows it since 1.14

_Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Export:
    """A file for other programs.

    Attributes:
        path: The file.
        config: The JSON file beside it.
        format: Which kind it is.
        difference: The largest between its logits and the network's, on images of noise.
        largest: The largest of the network's logits there.
        lost: What the file does not have, for people; None where nothing is missing.
        python: What runs it.
    """

    path: Path
    config: Path
    format: Format
    difference: float
    largest: float
    lost: str | None
    python: str


def config_path(path: Path) -> Path:
    """Return the JSON file beside ``path``."""
    return path.with_name(f"{path.name}.json")  # so that each format has its own


def to_config(description: Description) -> dict[str, Any]:
    """Return what goes in and comes out, with timm's keys."""
    p = description.preprocessing
    return {
        "architecture": description.architecture,
        "num_classes": description.num_classes,
        "label_names": description.classes,
        "value_ranges": asdict(p.ranges),  # of images that are not 8-bit
        "pretrained_cfg": {
            "input_size": [3, p.resolution, p.resolution],
            "mean": p.mean,
            "std": p.std,
            "interpolation": p.interpolation,
            "crop_pct": p.resolution / p.resize,
            "crop_mode": "center",
            "num_classes": description.num_classes,
        },
    }


def export(model: nn.Module, path: Path, format_: Format) -> Export:
    """Write ``model``, in eval mode and on the CPU, to ``path`` for another program.

    Raises:
        UsageError: The model has no description, an extra is not installed, or the suffix of a
            plain state dict is not known.
        ModelFileError: The model's outputs are not finite.
        MomconvError: What was written does not compute the same.
        ResourceError: The file cannot be written.
    """
    model = model.cpu()
    images = _draw(describe(model))
    with in_eval_mode(model), torch.no_grad():
        expected = _apply(model, images)
        if not expected.isfinite().all():
            raise ModelFileError(
                f"{path} would give no answers: its outputs are not finite",
                kind="model_file.no_answers",
                fix="take a model from before its training diverged",
            )
        lost = _describe_loss(model, path) if format_ == "torchvision" else None
        difference = _WRITERS[format_](model, path, images, expected)
    config = to_config(describe(model)) | {"sha256": checkpoints.sha256(path)}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_text(config_path(path), f"{text}\n")
    python = _explain(path, format_, describe(model))
    largest = float(expected.abs().max())
    return Export(path, config_path(path), format_, difference, largest, lost, python)


def require_extra(format_: Format) -> None:
    """Do nothing if the libraries of ``format_`` are installed.

    Raises:
        UsageError: They are not.
    """
    if format_ != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        if is_exhaustion(error):
            raise
        raise UsageError(
            f"--format onnx needs {error.name}, which is not installed",
            kind="usage.missing_extra",
            fix="pip install 'momconv[onnx]'",
        ) from error


def _draw(description: Description) -> Tensor:
    """Return images of noise."""
    side = description.preprocessing.resolution
    return torch.randn(_TRIED, 3, side, side, generator=torch.Generator().manual_seed(0))


def _apply(run: _Run, images: Tensor) -> Tensor:
    """Return the logits of all images at once, and of each alone: a file must take any batch."""
    return torch.cat([run(images), *(run(image[None]) for image in images)])


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max())


def _write_torch(model: nn.Module, path: Path, images: Tensor, expected: Tensor) -> float:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    extra = {_KEY: json.dumps(to_config(describe(model)))}

    def write(target: Path) -> None:
        with target.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)

    def read(target: Path) -> _Run:
        # PyTorch 2.11 warns of how it reads.
        with target.open("rb") as file, warnings.catch_warnings(action="ignore"):
            return torch.export.load(file).module()

    return _write_and_check(path, write, read, images, expected)


def _write_onnx(model: nn.Module, path: Path, images: Tensor, expected: Tensor) -> float:
    require_extra("onnx")
    with warnings.catch_warnings(action="ignore"):  # of the exporter about its own parts
        program = torch.onnx.export(
            model,
            (images,),
            input_names=[_IMAGES],
            output_names=[_LOGITS],
            dynamic_shapes=({0: "batch"},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[_KEY] = json.dumps(to_config(describe(model)))
    write = partial(program.save, external_data=False)
    return _write_and_check(path, write, _open_onnx, images, expected)


def _open_onnx(path: Path) -> _Run:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {_IMAGES: images.numpy()})[0])


def _write_plain(model: nn.Module, path: Path, images: Tensor, expected: Tensor) -> float:
    """Write the plain network, and return how far its outputs are from the ``expected`` ones."""
    plain = revert(model)
    save_plain(plain, path)
    description = describe(model)
    is_own = own.is_own(description.architecture)
    again = copy.deepcopy(plain) if is_own else build_described(description).eval()
    again.load_state_dict(checkpoints.read_state(path))
    logits = _apply(plain, images)
    if difference := _difference(_apply(again, images), logits):
        raise _differs(path, difference)
    return _difference(logits, expected)


_WRITERS: dict[Format, Callable[[nn.Module, Path, Tensor, Tensor], float]] = {
    "torch-export": _write_torch,
    "onnx": _write_onnx,
    "torchvision": _write_plain,
}


def _write_and_check(
    path: Path,
    write: Callable[[Path], object],
    read: Callable[[Path], _Run],
    images: Tensor,
    expected: Tensor,
) -> float:
    """Return the largest difference between ``expected`` and what the file makes of ``images``."""
    differences: list[float] = []

    def write_checked(target: Path) -> None:
        write(target)
        run = read(target)
        differences.append(_difference(_apply(run, images), expected))
        if not differences[0] <= BOUND * float(expected.abs().max()):
            raise _differs(path, differences[0])

    write_atomically(path, write_checked)
    return differences[0]


def _differs(path: Path, difference: float) -> MomconvError:
    return MomconvError(
        f"{path} would not compute what the network does: its logits differ by up to "
        f"{difference:.2g}",
        kind="export.differs",
    )


def _describe_loss(model: nn.Module, path: Path) -> str | None:
    if not any(stage.gamma and stage.runs for stage in momentum_stages(model).values()):
        return None
    return (
        "a plain state dict has neither momentum nor gains, so this network computes something "
        f"else; closer comes: momconv convert --back FILE --calibrate FOLDER -o {path} --overwrite"
    )


def _explain(path: Path, format_: Format, description: Description) -> str:
    if format_ == "torch-export":
        return f"torch.export.load({str(path)!r}).module()(images)"
    if format_ == "onnx":
        session = f"onnxruntime.InferenceSession({str(path)!r})"
        return f"{session}.run(None, {{{_IMAGES!r}: images}})"
    return load_command(description, path)
