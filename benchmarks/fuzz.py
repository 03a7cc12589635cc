"""Files from a stranger: every parser must end in a result or a named error of a few lines.

Hypothesis thinks the files up: recipes with tags, anchors, aliases and deep nests, and sound files
with a few changes, of bits, bytes or slices, or of values of a JSON text, such as the header of a
safetensors file, whose length is mostly put right, so that what is behind it is reached.
``metadata`` reads no more than a model file's header. Anything but a MomconvError, memory that runs
out, a message longer than a screen, or a file that was changed is a failure. The least input that
shows it is printed, and kept beside the results.
"""

import copy
import io
import json
import resource
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from hypothesis import HealthCheck, Verbosity, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch.nn import functional as F

from benchmarks.tables import Log, Out, show
from momconv.data.decoding import decode_bytes
from momconv.data.findings import Finding, Findings
from momconv.data.folder import Folder
from momconv.data.inspection import Inspection
from momconv.data.report import report
from momconv.data.source import ImageSet, Sample, Splits
from momconv.data.table import read_table
from momconv.errors import MomconvError, OutOfMemory
from momconv.files import model_file
from momconv.recipe import KEYS, SECTIONS, Recipe, TrainRecipe, dump_recipe, load_recipe
from momconv.surgery.conversion import convert
from momconv.training.images import CheckedImages, recall_images, remember_images
from momconv.training.optimisation import make_optimizer
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state, save_state
from momconv.zoo.networks import build, replace_head
from momconv.zoo.weights import load_network

TITLE = "fuzz"
COUNTS = ("inputs", "accepted", "refused by name", "failures")
FAILED = "FAILED"
SCREEN = (3500, 45)  # characters and lines of a message with its way out
_MEMORY = 16 * 2**30  # bytes, beyond which allocations fail

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
TAGS = ["", "!!float ", "!!int ", "!!str ", "!!null ", "!!binary ", "!!set ", "!!map ", "!!omap "]
TAGS += ["!!python/object:os.system ", "! ", "!a%ff ", "!<x> ", f"!{'x' * 5000} "]
SCALARS = ["1", "-1", "auto", "~", "", "resnet18", ".nan", "1e309", "0x1f", "1_0", "2026-01-01"]
SCALARS += ["9" * 5000, "'", "[", "}", "%", "|\n   x", "\t", "\0", "\x85", "\u2028", "\ud800", "😀"]

Inputs = st.SearchStrategy[bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A parser, and files for it."""

    parse: Callable[[Path], object]
    inputs: Inputs


@st.composite
def mutants(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of ``seeds`` with one to four changes, of bytes or of values in JSON."""
    before = draw(st.sampled_from(seeds))
    if b"{" in (before[:1], before[8:9]) and draw(st.booleans()):
        return _edit(draw, before)
    data = bytearray(before)
    for _ in range(draw(st.integers(1, 4))):
        reach = draw(st.sampled_from([64, 4096, len(data)]))  # mostly headers
        at = draw(st.integers(0, min(reach, len(data))))
        stop = at + draw(st.sampled_from([1, 0, 2, 8, 64]))
        match draw(st.sampled_from(["flip", "cut", "put", "splice", "repeat"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : draw(st.sampled_from([stop, len(data)]))]
            case "splice":
                other, start = draw(st.sampled_from(seeds)), draw(st.integers(0, 4096))
                data[at:stop] = other[start : start + draw(st.integers(0, 4096))]
            case "repeat":
                data[at:at] = data[at:stop] * draw(st.integers(1, 50))
            case _:
                data[at:stop] = draw(st.sampled_from(WORDS) | st.binary(max_size=64))
    if before[8:9] == b"{" and draw(st.booleans()):  # of safetensors
        size = int.from_bytes(before[:8], "little") + len(data) - len(before)
        data[:8] = max(size, 0).to_bytes(8, "little")
    return bytes(data)


def _edit(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON text, or a safetensors file, with other values, in texts of its metadata too."""
    is_json = data[:1] == b"{"
    start, end = (0, len(data)) if is_json else (8, 8 + int.from_bytes(data[:8], "little"))
    tree = json.loads(data[start:end])
    texts = tree.get("__metadata__", {})
    inner = {key: json.loads(value) for key, value in texts.items() if value[0] in "{["}
    for _ in range(draw(st.integers(1, 3))):
        _change_value(draw, draw(st.sampled_from([inner, inner, tree])) if inner else tree)
    if tree.get("__metadata__") is texts:
        texts |= {key: json.dumps(value) for key, value in inner.items()}
    text = json.dumps(tree).encode()
    return text if is_json else len(text).to_bytes(8, "little") + text + data[end:]


def _change_value(draw: st.DrawFn, tree: Any) -> None:
    """Replace or take away a value of a tree of lists and dictionaries."""
    if inside := list(_walk(tree)):
        node, key = draw(st.sampled_from(inside))
        node[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if draw(st.booleans()):
            del node[key]


def _walk(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where each value of the tree is."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _walk(node[key])


def recipes() -> Inputs:
    """YAML with tags, anchors, aliases, nests, odd characters and huge values, by known keys."""
    words = st.sampled_from(SCALARS) | st.text(max_size=20) | st.text(max_size=20).map(json.dumps)
    marks = st.sampled_from(["", "&a ", "&b ", "&a &b "])
    leaves = st.sampled_from(["*a", "*b"]) | st.builds(
        "{}{}{}".format, marks, st.sampled_from(TAGS), words
    )
    form = st.sampled_from(["{}[{}, {}]", "{}{{{}: {}}}", "{}{{{}, <<: {}}}"])
    values = st.recursive(
        leaves, lambda inner: st.builds(str.format, form, marks, inner, inner), max_leaves=8
    )
    pairs = st.sampled_from([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
    nests = st.builds(lambda pair, n: pair[0] * n + pair[1] * n, pairs, st.integers(1, 5000))
    keys = st.sampled_from([*KEYS, *SECTIONS]).map(lambda key: key.replace(".", ":\n  "))
    lines = st.builds("{}: {}".format, keys | leaves, values | nests)
    bombs = st.integers(1, 40).map(_multiply)
    texts = st.lists(lines | values | bombs, min_size=1, max_size=4).map("\n".join)
    codes = st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])
    return st.builds(str.encode, texts, codes, st.just("surrogatepass"))


def _multiply(times: int) -> str:
    """Lists of nine aliases of the list before, so often."""
    rows = [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, times)]
    return "\n".join(["train:", "  a0: &a0 [x]", *rows, f"  lr: *a{times - 1}"])


def make_targets(folder: Path) -> dict[str, Target]:
    """All parsers, with files that are made in ``folder``."""
    model, state, *pickled = _write_files(folder / "files")
    split, table = [_write_split(folder / "split")], [b"file,label\n0.png,a\n1.png,b\n"]
    dumped = [dump_recipe(Recipe()).encode(), b"train:\n  lr: 1e-3\n"]
    names = [folder / "split" / "a" / f"{number}.png" for number in range(4)]
    pictures = _draw_pictures()
    return {
        "metadata": Target(model_file.read_metadata, mutants([_shorten(model)])),
        "model": Target(model_file.load, mutants([model])),
        "state": Target(_resume, mutants([state])),
        "checkpoint": Target(
            lambda path: load_network("cifar_resnet20", str(path)), mutants(pickled)
        ),
        "recipe": Target(load_recipe, recipes() | mutants(dumped)),
        "split": Target(recall_images, mutants(split)),
        "table": Target(lambda path: read_table(path, folder / "split", names), mutants(table)),
        "image": Target(lambda path: decode_bytes(path.read_bytes(), path), mutants(pictures)),
    }


def _resume(path: Path) -> None:
    saved = load_state(path)
    saved.restore_optimizer(make_optimizer(saved.model, TrainRecipe()), saved.model)
    with torch.random.fork_rng(devices=[]):
        saved.restore_random_states()


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
    images = ImageSet(Folder(folder), ("a", "b"), tuple(Sample(path, 0) for path in paths))
    empty = ImageSet(Folder(folder), ("a", "b"), ())
    nothing = Inspection(empty, Findings.collect(()))
    found = report(nothing, nothing, [], [])
    findings = Findings.collect((str(path), Finding(sha256(b"").hexdigest())) for path in paths)
    checked = CheckedImages(Splits(images, empty, ()), found, findings, findings)
    remember_images(checked, folder, RunFolder(folder))
    return (folder / "split.json").read_bytes()


def _draw_pictures() -> list[bytes]:
    pictures = []
    for name in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "TGA", "PCX"):
        file = io.BytesIO()
        Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file, name)
        pictures.append(file.getvalue())
    return pictures


def try_input(target: Target, data: bytes, path: Path) -> str:
    """``accepted`` or the kind of the error.

    Raises:
        Exception: The parser raised something else, or did something that it must not.
    """
    path.write_bytes(data)
    kind = "accepted"
    try:
        with patch("momconv.zoo.checkpoints.verify"):  # which a stranger's checksum passes
            target.parse(path)
    except MomconvError as error:
        text, kind = str(error), error.kind
        if isinstance(error, OutOfMemory) or len(text) > SCREEN[0] or text.count("\n") > SCREEN[1]:
            raise AssertionError(f"{kind}, in {len(text):,} characters") from error
    assert path.read_bytes() == data, "the file was changed"
    return kind


def fuzz(target: Target, inputs: int, path: Path) -> Counter[str]:
    """How often each kind of end came; after a failure, ``path`` is the least input for one."""
    kinds = Counter[str]()

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def parses(data: bytes) -> None:
        try:
            kind = try_input(target, data, path)
        except Exception:
            kinds[FAILED] = 1
            raise
        if not kinds[FAILED]:  # or else it is about to find a smaller one
            kinds[kind] += 1

    try:
        parses()
    except Exception:
        typer.echo(f"{path.read_bytes()[:400]!r}\n{traceback.format_exc(limit=-3)}")
    return +kinds


def main(
    *,
    inputs: Annotated[int, typer.Option(help="How many, for each parser.")] = 1000,
    only: Annotated[list[str], typer.Option(default_factory=list, help="Only these parsers.")],
    out: Out = None,
) -> None:
    """Feed files from a stranger to every parser."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with tempfile.TemporaryDirectory() as name:
        for title, target in make_targets(Path(name)).items():
            if only and title not in only:
                continue
            kinds = fuzz(target, inputs, Path(name) / "input")
            accepted, failed = kinds["accepted"], kinds[FAILED]
            counts = (kinds.total(), accepted, kinds.total() - accepted - failed, failed)
            row = dict(zip(COUNTS, (f"{count:,}" for count in counts), strict=True))
            log.merge([{"parser": title, **row}], ("parser",))
            if failed:
                kept = shutil.copy(Path(name) / "input", log.path.with_suffix(f".{title}"))
                typer.echo(f"kept as {kept}")
            typer.echo(f"{title}: {', '.join(f'{n} {k}' for k, n in kinds.most_common())}")
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
