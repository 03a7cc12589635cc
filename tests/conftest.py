"""Fixtures shared by all tests: the real data beside the repository, where it exists."""

import gc
import signal
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"

LONGEST = [  # files of tests
    "test_readme.py",
    "test_search.py",
    "test_finetune.py",
    "test_convert.py",
    "test_exactness.py",
    "test_calibrating.py",
    "test_kills.py",
    "test_distillation.py",
    "test_clusters.py",
]

settings.register_profile("repeatable", derandomize=True)  # the same inputs each time
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let Python not look for garbage, a second each time, in half a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, with which no process should be left alone."""
    turns = {name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.name, len(turns)))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored, which is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and published checkpoints; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data beside the repository")
    return SHARED


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let few images show what large convolutions need; with one thread it takes 16 of them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes of eight small noisy images, which must not be written to."""
    root, noise = tmp_path_factory.mktemp("data") / "colours", np.random.default_rng(0)
    for name, colour in {
        "blue": (60, 60, 190),
        "green": (60, 170, 60),
        "red": (190, 60, 60),
    }.items():
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(noise.normal(colour, 40, (34, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True, scope="session")
def speeds() -> Iterator[None]:
    """Take the device to be as fast in all runs as in the first one that measured it."""
    from momconv.planner.cost import Speed
    from momconv.planner.speed import measure_speed

    known: dict[tuple[str, str], Speed] = {}

    def find_speed(model: Any, training: Any, limit: int) -> Speed:
        key = training.device, training.precision
        speed = known.get(key) or measure_speed(model, training, limit)
        if speed.is_measured:
            known[key] = speed
        return speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("momconv.training.planning.measure_speed", find_speed)
        yield


@pytest.fixture(autouse=True, scope="module")
def predictions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a plan know the steps that were predicted for others; tests of predictions trace each."""
    from traced import tracing_once

    folder, name = request.path.parent.name, request.path.name
    compares_plans = name in ("test_choice.py", "test_search.py")
    traces_each = name == "test_planning.py" or (folder == "planner" and not compares_plans)
    with nullcontext() if traces_each else tracing_once():
        yield


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for these tests alone, and for the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MOMCONV_CACHE", str(folder))
        yield folder
