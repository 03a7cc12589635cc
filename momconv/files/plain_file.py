"""A network's tensors alone, as torchvision's ``load_state_dict`` takes them."""

import io
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from momconv.errors import UsageError
from momconv.files.atomic import write_atomically
from momconv.files.tensor_file import write_tensors
from momconv.zoo import own
from momconv.zoo.checkpoints import with_version
from momconv.zoo.cifar import DEPTHS
from momconv.zoo.description import Description

_PICKLED = (".pth", ".pt", ".th")
SUFFIXES = (".safetensors", *_PICKLED)


def check_suffix(path: Path) -> None:
    """Do nothing if ``save_plain`` knows the format of ``path``.

    Raises:
        UsageError: It does not.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot tell the format of {path} from its name",
            kind="usage.unknown_format",
            fix="\n".join(f"-o {shlex.quote(f'{path}{end}')}" for end in (".safetensors", ".pth")),
        )


def save_plain(model: nn.Module, path: Path) -> None:
    """Write the state dict of ``model``, all or nothing, in the format that the suffix names.

    Raises:
        UsageError: The suffix is none of ``SUFFIXES``.
        ResourceError: The file cannot be written.
    """
    check_suffix(path)
    state = model.state_dict()
    if path.suffix in _PICKLED:
        plain = {key: value.cpu().contiguous() for key, value in state.items()}
        versioned = with_version(model, plain)
        write_atomically(path, lambda target: _pickle(versioned, target))
    else:
        write_atomically(path, lambda target: write_tensors(target, state, {"format": "pt"}))


def load_command(description: Description, path: Path) -> str:
    """Return the Python that reads what ``save_plain`` wrote to ``path``."""
    file, architecture = str(path), description.architecture
    if own.is_own(architecture):
        arguments = own.parse_arguments(description.arguments)
        return f"momconv.load_network({architecture!r}, {file!r}, {arguments!r})"
    if architecture in DEPTHS:
        return f"momconv.load_network({architecture!r}, {file!r})"
    read = "torch.load" if path.suffix in _PICKLED else "safetensors.torch.load_file"
    network = f"torchvision.models.{architecture}(num_classes={description.num_classes})"
    return f"{network}.load_state_dict({read}({file!r}))"


def _pickle(state: Mapping[str, Tensor], path: Path) -> None:
    content = io.BytesIO()  # given a path, torch.save hides what is wrong with it
    torch.save(state, content)
    path.write_bytes(content.getbuffer())
