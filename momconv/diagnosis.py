"""Whether this machine can do what momconv needs, looked at and tried."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from momconv._version import __version__
from momconv.allocator import ALLOCATORS, find_allocator
from momconv.determinism import describe_tf32
from momconv.errors import MomconvError
from momconv.files.atomic import write_text
from momconv.files.model_file import load, save
from momconv.momentum import seam
from momconv.planner.devices import find_device
from momconv.planner.measurement import available_bytes
from momconv.surgery.certificate import compare_gradients
from momconv.surgery.conversion import convert
from momconv.units import format_bytes, format_duration
from momconv.zoo import checkpoints
from momconv.zoo.networks import build

_PACKAGES = (
    *("torch", "torchvision", "safetensors"),
    *("numpy", "numba", "pillow", "matplotlib", "typer"),
)
_EXTRAS = {
    "demo": ("scikit-learn",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorboard": ("tensorboard",),
}
_MEMORY = 2**30  # bytes, of which a small run needs less
_SHARED = 2**28  # bytes; worker processes hand over batches through it
_DISK = 2**31  # bytes, of which the files of a ResNet-152's run need less
_HASH = re.compile(r"-([0-9a-f]{8,})\.\w+$")  # of the content, in a published file's name
_SEED = 0


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is as it should be.
        found: What was found.
        fix: What to do about it where it is not.
        needed: Whether nothing works without it.
    """

    name: str
    ok: bool
    found: str
    fix: str | None = None
    needed: bool = True

    @property
    def is_broken(self) -> bool:
        """Whether momconv cannot work like this."""
        return self.needed and not self.ok

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return asdict(self) | {"fix": None if self.ok else self.fix}


def diagnose(progress: Callable[[int, int], None] | None = None) -> tuple[HealthCheck, ...]:
    """Look at software, devices, memory, disk and weights, and try a small network.

    ``progress`` hears how many of the parts are done, and how many there are.
    """
    findings: list[HealthCheck] = []
    for done, look in enumerate(_PARTS, 1):
        findings += look()
        if progress:
            progress(done, len(_PARTS))
    return tuple(findings)


def _look_at_software() -> Iterator[HealthCheck]:
    yield HealthCheck("momconv", ok=True, found=f"{__version__} in {Path(__file__).parent}")
    system = f"Python {platform.python_version()}, {platform.platform()}"
    yield HealthCheck("system", ok=True, found=system)
    versions = ", ".join(f"{name} {_find_version(name) or 'missing'}" for name in _PACKAGES)
    yield HealthCheck("libraries", ok=True, found=versions)
    for extra, names in _EXTRAS.items():
        found = {name: _find_version(name) for name in names}
        missing = [name for name, number in found.items() if number is None]
        yield HealthCheck(
            f"extra {extra}",
            ok=not missing,
            found=", ".join(
                f"{name} {number or 'not installed'}" for name, number in found.items()
            ),
            fix=f"pip install 'momconv[{extra}]'" if missing else None,
            needed=False,
        )


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _look_at_devices() -> Iterator[HealthCheck]:
    threads = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    yield HealthCheck("processor", ok=True, found=f"{platform.machine()}, {threads}")
    drivers = _ask_driver("--query-gpu=name,driver_version")
    for number in range(torch.cuda.device_count()):
        yield from _look_at_gpu(torch.device("cuda", number))
    for line in _ask_driver("--query-compute-apps=pid,used_memory"):
        yield HealthCheck("GPU memory of", ok=True, found=_name_process(line))
    if drivers:
        blind = not torch.cuda.is_available()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        yield HealthCheck(
            "GPU driver",
            ok=not blind,
            found=f"{'; '.join(drivers)}; torch built for CUDA {torch.version.cuda}, "
            f"CUDA_VISIBLE_DEVICES {visible}",
            fix="a PyTorch for this driver: https://pytorch.org/get-started" if blind else None,
            needed=False,
        )
    elif not torch.cuda.is_available():
        yield HealthCheck("GPU", ok=True, found="none; everything runs on the CPU")


def _look_at_gpu(gpu: torch.device) -> Iterator[HealthCheck]:
    try:
        free, total = torch.cuda.mem_get_info(gpu)
    except RuntimeError as error:  # no memory for a context, or it is another's alone
        yield HealthCheck(str(gpu), ok=False, found=_first_line(error), fix=_FREE_GPU, needed=False)
        return
    device = torch.cuda.get_device_properties(gpu)
    amount = f"{format_bytes(free)} of {format_bytes(total)} free"
    named = f"{device.name}, compute {device.major}.{device.minor}, {amount}"
    yield HealthCheck(str(gpu), ok=free > _MEMORY, found=named, fix=_FREE_GPU, needed=False)
    yield HealthCheck(f"fp32 on {gpu}", ok=True, found=describe_tf32(gpu))
    with warnings.catch_warnings(action="ignore"):  # they are told here
        obstacle = seam.find_obstacle(gpu)
    yield HealthCheck(
        f"Triton on {gpu}",
        ok=obstacle is None,
        found=obstacle or f"{_find_version('triton')} builds kernels",
        fix=seam.NEEDED,
        needed=False,
    )


_FREE_GPU = "end what else runs on it, or take another with --device"


def _ask_driver(query: str) -> list[str]:
    """Return the lines that NVIDIA's tool answers; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return ran.stdout.splitlines()


def _name_process(line: str) -> str:
    """Return what holds a GPU's memory, from its process number and the amount."""
    number, _, amount = line.partition(",")
    try:
        name = psutil.Process(int(number)).name()
    except (ValueError, psutil.Error):
        name = "another user's process"
    return f"process {number} {name}: {amount.strip()}"


def _look_at_memory() -> Iterator[HealthCheck]:
    memory = psutil.virtual_memory()
    usable = available_bytes(torch.device("cpu"))
    yield HealthCheck(
        "memory",
        ok=usable > _MEMORY,
        found=f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free, of which "
        f"a run takes at most {format_bytes(usable)}",
        fix=f"end {_largest_process()}",
    )
    allocator = find_allocator()
    yield HealthCheck(
        "allocator",
        ok=allocator is not None,
        found=f"{allocator[0].name}, {allocator[1]}"
        if allocator
        else "the system's, which is slower",
        fix=f"apt install {ALLOCATORS[0].package}",
        needed=False,
    )
    yield HealthCheck("most of it", ok=True, found=f"is held by {_largest_process()}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield HealthCheck(
            str(shared),
            ok=free > _SHARED,
            found=f"{format_bytes(free)} free",
            fix="--workers 0; in a container, docker run --shm-size=1g",
            needed=False,
        )


def _largest_process() -> str:
    held = {
        process: memory.rss
        for process in psutil.process_iter(["name", "memory_info"])
        if (memory := process.info["memory_info"]) is not None
    }
    process = max(held, key=lambda process: held[process])
    return f"process {process.pid} {process.info['name']} ({format_bytes(held[process])})"


def _look_at_disk() -> Iterator[HealthCheck]:
    here = Path.cwd()
    try:
        with tempfile.TemporaryDirectory(dir=here, prefix=".momconv-") as folder:
            write_text(Path(folder) / "test", "written")
    except (OSError, MomconvError) as error:
        problem = f"{here} cannot be written: {error}"
        yield HealthCheck("writing", ok=False, found=problem, fix="cd to a folder of yours")
    else:
        yield HealthCheck("writing", ok=True, found=f"{here} can be written")
    free = shutil.disk_usage(here).free
    yield HealthCheck(
        "disk",
        ok=free > _DISK,
        found=f"{format_bytes(free)} free in {here}",
        fix="-o with a folder on another disk",
        needed=False,
    )


def _look_at_weights() -> Iterator[HealthCheck]:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    home = os.environ.get("TORCH_HOME", "unset")
    files = sorted(path for path in folder.glob("*") if _HASH.search(path.name))
    count = f"{len(files)} published weights in {folder} (TORCH_HOME {home})"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    yield HealthCheck(
        "weights",
        ok=os.access(existing, os.W_OK),
        found=count,
        fix="TORCH_HOME=FOLDER with a folder of yours",
        needed=False,
    )
    for path in files:
        digest = checkpoints.sha256(path)
        is_whole = digest.startswith(_HASH.search(path.name)[1])  # type: ignore[index]
        told = "as published" if is_whole else f"is damaged: its sha256 is {digest}"
        found, fix = f"{path.name} {told}", f"rm {shlex.quote(str(path))}"
        yield HealthCheck("weights", is_whole, found, None if is_whole else fix)


def _try_network() -> Iterator[HealthCheck]:
    """Convert, compare gradients, save and load, on each kind of device that there is."""
    for name in dict.fromkeys(("cpu", str(find_device()))):
        began = time.perf_counter()
        try:
            right = _run(torch.device(name))
        except Exception as error:  # whatever it is, it is what was looked for
            fix = "report it with the output of momconv doctor --json"
            yield HealthCheck(f"test on {name}", ok=False, found=_first_line(error), fix=fix)
        else:
            took = format_duration(time.perf_counter() - began)
            yield HealthCheck(f"test on {name}", ok=True, found=f"{right}, in {took}")


def _first_line(error: Exception) -> str:
    """Return what went wrong, in a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _run(device: torch.device) -> str:
    """Return what a small network does right.

    Raises:
        Exception: Any, if it does something wrong.
    """
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.default_generator.manual_seed(_SEED)
        network = convert(build("cifar_resnet20"), 0.9, "all").eval()
        images = torch.randn(4, 3, 32, 32)
        path = Path(folder) / "network.safetensors"
        save(network, path)
        with torch.no_grad():
            same = torch.equal(load(path)(images), network(images))
        exact = compare_gradients(network.to(device), images.to(device)).values()
    if False in exact:
        raise RuntimeError("the gradients are not those of ordinary backpropagation")
    if not same:
        raise RuntimeError("a saved network does not compute the same")
    compared = "differ each time, so are not compared" if None in exact else "exact"
    return f"gradients {compared}, saved and loaded the same"


_PARTS: tuple[Callable[[], Iterator[HealthCheck]], ...] = (
    _look_at_software,
    _look_at_devices,
    _look_at_memory,
    _look_at_disk,
    _look_at_weights,
    _try_network,
)
