"""Whether a run survives kill -9 at any moment.

Real `momconv finetune` processes, with a process that reads images, are killed: half of them after
a random time, a quarter just after the n-th temporary file has appeared in the run folder, so
while files are being written and renamed, and a quarter just after the n-th one of the state, the
largest and the one that matters. After each kill the same command is given again, or
`--resume` once there is a state. Checked are

* after each kill: whatever file has its final name is whole, and once a state was written there is
  one to resume, of the same or a later step;
* after each start that got as far as training: no temporary file of a killed process is left;
* at the end of each run: metrics and all tensors (weights, optimiser, random state, both models)
  equal those of a run that nobody killed, bit for bit. The images come in a new order in every
  epoch, so the weights are equal only if that is.

A run that reaches its end is checked, and another one begins, until there were enough kills.

With `--processes 2`, torchrun starts that many, which divide the weights among them. All of them
are killed, and the same command is given again; or one is, and torchrun goes on by itself.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from momconv.errors import ModelFileError
from momconv.files import claim, model_file
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.sharding import list_numbers, load_parts
from momconv.training.state import load_state

OPTIONS = ["--model", "cifar_resnet20", "--weights", "none", "--device", "cpu"]
OPTIONS += ["--batch-size", "5", "--micro-batch", "3"]
OPTIONS += ["--set", "data.workers=1", "--set", "train.save_every=1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CLOCKED = ("images_per_second", "seconds")
TIMED_BY_GLOO = ("peak_bytes",)  # whose threads may let go of a piece of weights a moment later
_POLL = 0.0005  # seconds between two looks at the folder
_MOST_FILES = 25  # a run writes about twice as many
_MOST_STATES = 10
_STATE = ".state."  # what its temporary files begin with


@dataclass(frozen=True, slots=True)
class Kill:
    """When a process is killed: so long after ``files`` temporary files, or after its start.

    Only files whose names begin with ``prefix`` count. Of several processes only the one of
    ``rank`` is killed, if there is one.
    """

    seconds: float
    files: int = 0
    prefix: str = ""
    rank: int | None = None

    @classmethod
    def draw(cls, random: Random, longest: float, processes: int = 1) -> "Kill":
        """Any moment of ``longest`` seconds, or one at which something is being written."""
        rank = random.choice([None, *range(processes)]) if processes > 1 else None
        kind = random.random()
        if kind < 0.5:
            return cls(random.uniform(0, longest), rank=rank)
        if kind < 0.75:
            return cls(random.uniform(0, 0.02), random.randint(1, _MOST_FILES), rank=rank)
        return cls(random.uniform(0, 0.01), random.randint(1, _MOST_STATES), _STATE, rank)

    def __str__(self) -> str:
        who = "" if self.rank is None else f"process {self.rank} "
        if self.files:
            of = " of the state" if self.prefix else ""
            return f"{who}{1000 * self.seconds:.0f} ms after temporary file {self.files}{of}"
        return f"{who}after {self.seconds:.1f} s"


class Damage(AssertionError):
    """What a killed run must not leave."""


def make_images(root: Path, images: int = 8) -> None:
    """Write a folder of three classes of so many noisy images."""
    noise = np.random.default_rng(0)
    for label in range(3):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            pixels = noise.integers(0, 170 + 40 * label, (34, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def command(data: Path, folder: Path, epochs: int, processes: int = 1) -> list[str]:
    """What a person would type: the run from its beginning, or from its state."""
    run = RunFolder(folder)
    options = ["--data", str(data), "-o", str(folder), "--epochs", str(epochs), *OPTIONS]
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
        launcher += ["--nproc-per-node", str(processes)]
        options += ["--shard", "true", "--auto-resume"]
    elif run.state.is_file() or run.previous.is_file():
        options = ["--resume", str(folder)]
    return [sys.executable, *launcher, "-m", "momconv", "finetune", *options]


def run_and_kill(words: list[str], folder: Path, kill: Kill) -> tuple[bool, bool]:
    """Whether the run was killed, and whether it came to its end.

    Raises:
        Damage: It failed.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log)
        _wait(process, folder, kill)
        is_killed = _kill(process, kill.rank)
        code = process.wait()
        log.seek(0)
        if code not in (0, -signal.SIGKILL):
            raise Damage(f"{' '.join(words[1:])} ended with {code}:\n{log.read().decode()}")
        return is_killed, code == 0


def _wait(process: "subprocess.Popen[bytes]", folder: Path, kill: Kill) -> None:
    """Until the moment of the kill, or until the process has ended by itself."""
    if not kill.files:
        with suppress(subprocess.TimeoutExpired):
            process.wait(kill.seconds)
        return
    seen = set[str]()
    while process.poll() is None:
        names = {path.name for path in temporary_files(folder)}
        names |= {f"{_STATE}{number}" for number in list_numbers(RunFolder(folder).parts)}
        seen |= {name for name in names if name.startswith(kill.prefix)}
        if len(seen) >= kill.files:
            time.sleep(kill.seconds)
            return
        time.sleep(_POLL)


def _kill(process: "subprocess.Popen[bytes]", rank: int | None) -> bool:
    """Kill that process of several, or else all; whether there was any.

    What a process of a run has started ends by itself.
    """
    if process.poll() is not None:
        return False
    launched = psutil.Process(process.pid)
    ranks = launched.children() if "torch.distributed.run" in str(process.args) else []
    victims = [launched, *ranks] if rank is None or rank >= len(ranks) else [ranks[rank]]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    return True


def temporary_files(folder: Path) -> list[Path]:
    """All files in ``folder`` that are on their way to another name, whatever they are called.

    All that a run leaves for people has a name that is shown.
    """
    if not folder.is_dir():
        return []
    hidden = (path for path in folder.iterdir() if path.name.startswith("."))
    return [path for path in hidden if path.name != claim.NAME]


def check_files(folder: Path) -> Progress | None:
    """How far the state of a killed run is; None without one.

    Raises:
        Damage: A file is not whole.
    """
    run = RunFolder(folder)
    try:
        for path in (run.best, run.last):
            if path.is_file():
                model_file.load(path)
        for path in (run.plan, run.split):
            if path.is_file():
                json.loads(path.read_text())
        if run.events.is_file():
            list(map(json.loads, run.events.read_text().splitlines()))
        states = [load_state(p).progress for p in (run.state, run.previous) if p.is_file()]
    except (ModelFileError, ValueError) as error:
        raise Damage(str(error)) from error
    return states[0] if states else None


def read_result(folder: Path) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """The metrics, but for those that depend on the clock, and all tensors."""
    run = RunFolder(folder)
    changing = (*CLOCKED, *(TIMED_BY_GLOO if run.parts.is_dir() else ()))
    with run.metrics.open() as file:
        rows = [{k: v for k, v in row.items() if k not in changing} for row in csv.DictReader(file)]
    files = {path.stem: load_file(path) for path in (run.state, run.best, run.last)}
    for number in list_numbers(run.parts)[-1:]:
        files[run.state.stem] |= load_parts(run.parts / str(number))
    tensors = {f"{name}/{k}": v for name, file in files.items() for k, v in file.items()}
    documents = "state/document/"  # which say when, where and how fast
    return rows, {k: v for k, v in tensors.items() if not k.startswith(documents)}


def compare(folder: Path, reference: Path) -> None:
    """Do nothing if both runs came to the same.

    Raises:
        Damage: They did not.
    """
    (ours, tensors), (theirs, others) = read_result(folder), read_result(reference)
    if ours != theirs:
        raise Damage(f"other metrics: {ours} instead of {theirs}")
    differing = [k for k in tensors.keys() | others if not torch.equal(tensors[k], others[k])]
    if differing:
        raise Damage(f"other values: {', '.join(sorted(differing))}")
    if left := [*temporary_files(folder), *list_numbers(RunFolder(folder).parts)[:-2]]:
        raise Damage(f"left behind: {left}")


def torture(
    data: Path, folder: Path, epochs: int, kills: Iterator[Kill], processes: int = 1
) -> Iterator[str]:
    """Go on with a run after each of ``kills`` until it is complete; a line for each.

    Raises:
        Damage: A state is lost or damaged.
    """
    reached = None
    for kill in kills:
        words, old = command(data, folder, epochs, processes), temporary_files(folder)
        is_killed, is_done = run_and_kill(words, folder, kill)
        if not is_killed:
            return
        progress = check_files(folder)
        now = (progress.epoch, progress.step) if progress else None
        if reached and (now is None or now < reached):
            raise Damage(f"the state of epoch, step {reached} is lost; there is {now}")
        if now != reached and (stale := [path for path in old if path.exists()]):
            raise Damage(f"not swept: {stale}")
        reached = now
        where = "epoch {}, step {}".format(*now) if now else "no state yet"
        yield f"{kill}: {where}; {len(temporary_files(folder))} half-written"
        if is_done:
            return


def main(
    kills: Annotated[int, typer.Option(help="How many.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    epochs: Annotated[int, typer.Option(help="Of each run.")] = 6,
    processes: Annotated[int, typer.Option(help="Of each run; several share the weights.")] = 1,
) -> None:
    """Kill runs, and compare them with one that was not."""
    console, random = Console(soft_wrap=True), Random(seed)
    done = aimed = runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        data, reference = Path(temporary) / "data", Path(temporary) / "reference"
        make_images(data)
        began = time.monotonic()
        words = command(data, reference, epochs, processes)
        subprocess.run(words, env=ENVIRONMENT, check=True, capture_output=True)
        longest = time.monotonic() - began
        moments = (Kill.draw(random, longest, processes) for _ in count())
        while done < kills:
            folder = Path(temporary) / f"run{runs}"
            for line in torture(data, folder, epochs, moments, processes):
                done += 1
                aimed += "of the state" in line
                console.print(f"{done}/{kills} {line}")
            compare(folder, reference)
            runs += 1
            console.print(f"run {runs} is complete, and the same as the one that was not killed")
    console.print(f"{done} kills in {runs} runs, {aimed} of them at a state: nothing was lost")


if __name__ == "__main__":
    typer.run(main)
