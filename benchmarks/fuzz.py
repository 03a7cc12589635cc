"""Files from a stranger, damaged at random: every parser must end in a result or a named error.

Each input is a sound file with a few changes: bits, bytes, slices, words, or values of a
safetensors header, whose length is mostly put right, so that what is behind it is reached.
``metadata`` reads no more than a model file's header. Anything but a MomconvError is a failure, and
printed with the number of its input, which repeats it:
``python -m benchmarks.fuzz --only state --start 1234 --inputs 1``.
"""

import copy
import io
import json
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from PIL import Image
from safetensors.torch import save
from torch.nn import functional as F

from benchmarks.tables import Log, Row, show
from momconv.data.decoding import decode_bytes
from momconv.data.examination import Finding
from momconv.data.folder import ImageSet, Sample, Splits
from momconv.data.inspection import Inspection
from momconv.data.report import report
from momconv.errors import MomconvError
from momconv.files import model_file
from momconv.recipe import Recipe, TrainRecipe, dump_recipe, load_recipe
from momconv.surgery.conversion import convert
from momconv.training.images import CheckedImages, recall_images, remember_images
from momconv.training.optimisation import make_optimizer
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state, save_state
from momconv.zoo.networks import build, replace_head
from momconv.zoo.weights import load_network

WORDS = [
    *(b"-1", b"0", b"1", b"99999999999999999999", b"1e309", b"NaN", b"-Infinity", b"null", b"true"),
    *(b'"\\ud800"', b"[]", b"{}", b'""', b"[" * 300, b'{"a":' * 300, b"\xff\xfe", b"\0", b"&a *a"),
    *(b"..", b"/", b"resnet152", b"all", b"!!python/object:os.system", b"<<: *x", b": ", b"\n- "),
]
# Not NaN and the infinities, which JSON does not have but Python writes.
VALUES: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, True, None, "", "a", "\x1b[2J", "\ud800"),
    *("resnet50", "layer1", "F32", "I8", "F8_E4M3", "C64", "BOOL", [], [1], [[]], {}, {"a": 1}),
    *([2, 2], [0], [10**9, 10**9], "x" * 10_000, 1e-320),
]


TITLE = "fuzz"
KEY = ("parser", "first")
COUNTS = ("inputs", "accepted", "refused by name", "failures")
FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Target:
    """A parser, and sound files for it."""

    parse: Callable[[Path], object]
    seeds: list[bytes]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one to four changes, mostly near its beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        reach = draw.choice([64, 4096, len(changed)])
        at = draw.randrange(min(reach, len(changed)) + 1)
        stop = min(at + draw.choice([0, 1, 1, 2, 8, 64]), len(changed))
        match draw.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at:stop] = draw.randbytes(stop - at)
            case 2:
                changed[at:stop] = draw.choice(WORDS)
            case 3:
                changed[at:at] = changed[at:stop] * draw.randint(1, 50)
            case 4 if draw.random() < 0.2:
                del changed[at:]
            case _:
                _replace_value(changed, at, draw)
    return bytes(changed)


def _replace_value(data: bytearray, at: int, draw: random.Random) -> None:
    """Put a word in place of the number or text after ``at``."""
    start = next((i for i in range(at, min(at + 200, len(data))) if data[i : i + 1].isalnum()), at)
    stop = start
    while stop < len(data) and data[stop : stop + 1].isalnum():
        stop += 1
    data[start:stop] = draw.choice(WORDS)


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with one to three values of its header replaced, those in text too."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    inner = {key: json.loads(value) for key, value in metadata.items() if value[0] in "{["}
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.7:
            _replace_node(inner, draw)
        else:
            _replace_node(header, draw)
    if header.get("__metadata__") is metadata:
        metadata |= {key: json.dumps(value) for key, value in inner.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _replace_node(root: Any, draw: random.Random) -> None:
    """Replace, rename or take away a random value of a tree of lists and dictionaries."""
    node = root
    while node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        value = node.pop(key)
        change = draw.randrange(4)
        if change == 0:
            return
        name = draw.choice(keys) if change == 1 else key
        new = value if change == 1 else copy.deepcopy(draw.choice(VALUES))
        if isinstance(node, dict):
            node[name] = new
        else:
            node.insert(key, new)
        return


def with_true_length(data: bytes, before: bytes) -> bytes:
    """A safetensors file whose header was changed, with the length that it has now."""
    size = int.from_bytes(before[:8], "little") + len(data) - len(before)
    return max(size, 0).to_bytes(8, "little") + data[8:]


def make_targets(folder: Path) -> dict[str, Target]:
    """All parsers, with files that are made in ``folder``."""
    model, state, pickled = (_write_files(folder / name) for name in ("model", "state", "pickled"))
    return {
        "metadata": Target(model_file.read_metadata, [_shorten(model[0])]),
        "model": Target(model_file.load, model[:1]),
        "state": Target(_resume, state[1:2]),
        "checkpoint": Target(_load_checkpoint, pickled[2:4]),
        "recipe": Target(load_recipe, [dump_recipe(Recipe()).encode(), b"train:\n  lr: 1e-3\n"]),
        "split": Target(recall_images, [_write_split(folder / "split")]),
        "image": Target(lambda path: decode_bytes(path.read_bytes(), path), _draw_pictures()),
    }


def _resume(path: Path) -> None:
    saved = load_state(path)
    saved.restore_optimizer(make_optimizer(saved.model, TrainRecipe()), saved.model)
    with torch.random.fork_rng(devices=[]):
        saved.restore_random_states()


def _load_checkpoint(path: Path) -> None:
    load_network("cifar_resnet20", str(path))


def _write_files(folder: Path) -> list[bytes]:
    """A model file, a state, and checkpoints in both of PyTorch's formats."""
    folder.mkdir()
    plain = build("cifar_resnet20")
    replace_head(plain, ("a", "b"))
    model = convert(plain)
    optimizer = make_optimizer(model, TrainRecipe())
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()
    model_file.save(model, folder / "model")
    save_state(RunFolder(folder), model, optimizer, Progress())
    for name, zipped in (("zipped", True), ("old", False)):
        torch.save(plain.state_dict(), folder / name, _use_new_zipfile_serialization=zipped)
    names = ("model", RunFolder(folder).state.name, "zipped", "old")
    return [(folder / name).read_bytes() for name in names]


def _shorten(data: bytes) -> bytes:
    """A model file with its metadata and one tensor."""
    end = 8 + int.from_bytes(data[:8], "little")
    return save({"fc.bias": torch.zeros(2)}, json.loads(data[8:end])["__metadata__"])


def _write_split(folder: Path) -> bytes:
    (folder / "a").mkdir(parents=True)
    paths = [folder / "a" / f"{number}.png" for number in range(4)]
    for path in paths:
        path.write_bytes(b"")
    images = ImageSet(folder, ("a", "b"), tuple(Sample(path, 0) for path in paths))
    empty = ImageSet(folder, ("a", "b"), ())
    found = report(Inspection(empty, {}), Inspection(empty, {}), [], [])
    checked = CheckedImages(Splits(images, empty, ()), found, dict.fromkeys(paths, Finding("")))
    remember_images(checked, folder, RunFolder(folder))
    return (folder / "split.json").read_bytes()


def _draw_pictures() -> list[bytes]:
    pictures = []
    for name in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "TGA", "PCX"):
        file = io.BytesIO()
        Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file, name)
        pictures.append(file.getvalue())
    return pictures


def make_input(target: Target, number: int) -> bytes:
    """The input of that number."""
    draw = random.Random(number)
    seed = draw.choice(target.seeds)
    safetensors = seed[8:9] == b"{"
    if safetensors and draw.random() < 0.6:
        return mutate_header(seed, draw)
    data = mutate(seed, draw)
    return with_true_length(data, seed) if safetensors and draw.random() < 0.5 else data


def try_input(target: Target, data: bytes, path: Path) -> str:
    """``accepted`` or the kind of the error.

    Raises:
        Exception: The parser raised something else.
    """
    path.write_bytes(data)
    try:
        with patch("momconv.zoo.checkpoints.verify"):  # which a stranger's checksum passes
            target.parse(path)
    except MomconvError as error:
        return error.kind
    return "accepted"


@contextmanager
def limited_memory(gigabytes: int) -> Iterator[None]:
    """Allocations beyond that fail inside."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def present(rows: Sequence[Row]) -> list[Row]:
    """All inputs that a parser was given."""
    totals: dict[str, dict[str, int]] = {}
    for row in rows:
        total = totals.setdefault(row["parser"], dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            total[name] += int(row[name])
    return [
        {"parser": parser} | {name: f"{count:,}" for name, count in total.items()}
        for parser, total in totals.items()
    ]


def _count(title: str, start: int, kinds: Counter[str]) -> Row:
    """A row of the log."""
    inputs, accepted, failed = kinds.total(), kinds["accepted"], kinds[FAILED]
    counts = (inputs, accepted, inputs - accepted - failed, failed)
    numbers = map(str, counts)
    return {"parser": title, "first": str(start)} | dict(zip(COUNTS, numbers, strict=True))


def main(
    *,
    inputs: Annotated[int, typer.Option(help="How many, for each parser.")] = 1000,
    start: Annotated[int, typer.Option(help="The number of the first.")] = 0,
    only: Annotated[list[str], typer.Option(default_factory=list, help="Only these parsers.")],
) -> None:
    """Feed damaged files to every parser."""
    log = Log.of(TITLE, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name, limited_memory(16):
        for title, target in make_targets(Path(name)).items():
            if only and title not in only:
                continue
            began, kinds = time.monotonic(), Counter[str]()
            for number in range(start, start + inputs):
                try:
                    kind = try_input(target, make_input(target, number), Path(name) / "input")
                except Exception:
                    kind = FAILED
                    typer.echo(f"{title} {number}\n{traceback.format_exc(limit=-3)}")
                kinds[kind] += 1
            log.merge([_count(title, start, kinds)], KEY)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
            seconds = time.monotonic() - began
            typer.echo(f"{title}: {inputs} inputs in {seconds:.0f} s, peak {peak} MiB: {counts}")
    show(TITLE, present(log.read()))


if __name__ == "__main__":
    typer.run(main)
