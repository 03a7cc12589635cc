"""Finding a network among the tensors of a file, under whatever names these have there.

Trainers put a prefix before all names of a network, as ``model.`` or ``module.encoder_q.``, and
other things beside it. What the names have in common with those of a network at hand tells which.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from momconv.errors import ModelFileError
from momconv.words import list_some, name_some, plural, printable
from momconv.zoo.checkpoints import Tensors, classes_in, difference
from momconv.zoo.cifar import DEPTHS
from momconv.zoo.networks import head_name, names, outline

_MATRIX = 2  # dimensions
_BUFFERS = 0.05  # of a network's numbers, at most: statistics, and indices of positions
_SHOWN = 3
_LEAST = 8  # tensors that networks have

# Before the names of what torch.compile, FSDP and checkpointing wrap, inside a network.
_WRAPPERS = re.compile(
    r"(?<=[./])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
# Of two networks in a file, the one under such a prefix follows the other, or is its teacher.
_FOLLOWS = re.compile(
    r"ema|swa|avg|average|shadow|teacher|target|momentum|encoder_k|_k\.|slow", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Match:
    """A network that was found in a file.

    Attributes:
        state: Its tensors, by its own names.
        prefix: What they have before these in the file.
        others: The prefixes of other networks there that would fit as well.
        beside: The names of what is beside it and of no use, without optimisers' states.
    """

    state: Tensors
    prefix: str
    others: tuple[str, ...]
    beside: tuple[str, ...]

    def describe(self, path: Path) -> str | None:
        """Return what a user should know of it; None if there is nothing."""
        parts = []
        if self.prefix.rpartition("/")[2] or self.others:
            dropped = ", and dropped that" if self.prefix.rpartition("/")[2] else ""
            parts.append(f"took the network {_name(self.prefix)}{dropped}")
        if self.others:
            parts.append(f"not that {_list(self.others)}")
        if self.beside:
            left_out = name_some(self.beside, _SHOWN)
            parts.append(f"{plural(len(self.beside), 'tensor')} beside it left out: {left_out}")
        return f"note: {printable(path)}: {'; '.join(parts)}" if parts else None


def find_network(tensors: Tensors, network: nn.Module, head: str, path: Path) -> Match:
    """Return what of ``tensors`` belongs to ``network``, whose final layer is called ``head``.

    Where nothing fits it is what comes closest, for an error to say what is missing.

    Raises:
        ModelFileError: Several networks would fit, and nothing says which is meant.
    """
    match = _find(tensors, network, head, path)
    if match is None:
        plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
        match = _find(plain, network, head, path)
    if match is None:
        prefix = _closest(tensors, network)
        match = Match(_below(tensors, prefix), prefix, (), ())
    return match


def recognise(tensors: Tensors) -> str | None:
    """Return the network in ``names()`` that is among ``tensors``, if any."""
    candidates = [_below(tensors, prefix) for prefix in _list_prefixes(tensors)]
    return next((name for state in candidates if (name := _recognise(state))), None)


def _find(tensors: Tensors, network: nn.Module, head: str, path: Path) -> Match | None:
    """Return the network of that shape, but for its head, that the most prefer."""
    expected = {name: value.shape for name, value in network.state_dict().items()}
    body = {name: shape for name, shape in expected.items() if not is_in(name, head)}
    needed = sum(not name.endswith("num_batches_tracked") for name in body)
    prefixes = [p for p, count in _count_prefixes(tensors, expected).items() if count >= needed]
    fitting = [p for p in prefixes if _fits(_below(tensors, p), body, expected, head)]
    whole = [p for p in fitting if f"{p}{head}.weight" in tensors]
    if not fitting:
        return None
    prefix = _choose(tensors, whole or fitting, expected, path)
    found = _below(tensors, prefix)
    state = {name: value for name, value in found.items() if name in expected or is_in(name, head)}
    others = tuple(p for p in fitting if p != prefix)
    taken = [f"{p}{name}" for p in fitting for name in expected]
    beside = set(tensors).difference(taken, (f"{prefix}{name}" for name in state))
    shown = tuple(n for n in tensors if n in beside and not n.lower().startswith(("optim", "amp")))
    return Match(state, prefix, others, shown)


def is_in(name: str, layer: str) -> bool:
    """Return whether ``name`` is of a tensor of ``layer``, or of what it is part of."""
    return name.startswith(f"{layer}.")


def _fits(
    state: Tensors,
    body: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    head: str,
) -> bool:
    """Return whether ``state`` has all of a ``body``, and nothing else of such a network."""
    roots = {_root(name) for name in expected}
    return all(
        name.endswith("num_batches_tracked") if name not in state else state[name].shape == shape
        for name, shape in body.items()
    ) and not any(
        _root(name) in roots and name not in expected and not is_in(name, head) for name in state
    )


def _root(name: str) -> str:
    """Return the first part of a name without its number, as in ``layer4``."""
    return name.partition(".")[0].rstrip("0123456789")


def _choose(
    tensors: Tensors, prefixes: Sequence[str], expected: Mapping[str, torch.Size], path: Path
) -> str:
    """Return one of several networks: that which was trained, and not one that follows it."""
    first, *others = prefixes
    if all(_are_same(tensors, first, other, expected) for other in others):
        return first
    leading = [prefix for prefix in prefixes if not _FOLLOWS.search(prefix)]
    if len(leading) == 1:
        return leading[0]
    if "" in prefixes:
        return ""
    program = (
        "import pathlib, sys, torch; from momconv.zoo.checkpoints import read_state; f, p, out = "
        "sys.argv[1:]; torch.save({k[len(p):]: v for k, v in read_state(pathlib.Path(f)).items() "
        "if k.startswith(p)}, out)"
    )
    raise ModelFileError(
        f"{path} holds {len(prefixes)} networks that fit, {_list(prefixes)}",
        kind="model_file.ambiguous",
        fix=shlex.join(["python", "-c", program, str(path), first, "weights.pth"]),
    )


def _list(prefixes: Sequence[str]) -> str:
    return ", ".join(list_some([*map(_name, prefixes)], _SHOWN))


def _name(prefix: str) -> str:
    """Return where a network is.

    >>> print(_name("model."), _name("state_dict/model."), _name("ema/"), _name(""), sep="; ")
    with the prefix 'model.'; with the prefix 'model.' in 'state_dict'; in 'ema'; without a prefix
    """
    place, _, own = printable(prefix).rpartition("/")
    parts = [f"with the prefix {own!r}"] if own else []
    parts += [f"in {place!r}"] if place else []
    return " ".join(parts) or "without a prefix"


def _are_same(tensors: Tensors, first: str, other: str, expected: Mapping[str, torch.Size]) -> bool:
    pairs = ((tensors.get(first + name), tensors.get(other + name)) for name in expected)
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


def _count_prefixes(tensors: Tensors, expected: Mapping[str, torch.Size]) -> Counter[str]:
    """Return how many of a network's tensors there are under each prefix."""
    return Counter(
        name[:start] for name in tensors for start in _starts(name) if name[start:] in expected
    )


def _closest(tensors: Tensors, network: nn.Module) -> str:
    """Return the prefix under which most of a network is."""
    counts = _count_prefixes(tensors, network.state_dict())
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _list_prefixes(tensors: Tensors) -> list[str]:
    """Return those that many tensors have, the longest last."""
    counts = Counter(name[:start] for name in tensors for start in _starts(name))
    return sorted((p for p, count in counts.items() if count >= _LEAST), key=len)


def _starts(name: str) -> Iterator[int]:
    """Yield where a network's own name may begin in ``name``."""
    yield 0
    yield from (place.end() for place in re.finditer(r"[./]", name))


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _recognise(state: Tensors) -> str | None:
    """Return the network in ``names()`` that ``state`` fits, if any."""
    for name in names():
        num_classes = classes_in(state, name) if _has_the_size_of(name, state) else None
        if num_classes and difference(outline(name, num_classes), state) is None:
            return name
    return None


def _has_the_size_of(name: str, state: Tensors) -> bool:
    """Return whether about as much is learnt as in ``name``: cheaper to see than shapes."""
    matrices = [value for value in state.values() if value.dim() == _MATRIX]
    if name in DEPTHS or not matrices:
        return name in DEPTHS and f"{head_name(name)}.weight" in state
    classes, features = matrices[-1].shape
    published = get_model_weights(name).DEFAULT.meta
    expected = published["num_params"] - features * len(published["categories"])
    body = sum(map(Tensor.numel, state.values())) - features * classes
    return bool(abs(body / expected - 1) < _BUFFERS)
