"""The fused steps against the same steps a piece at a time."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from momconv.momentum.equations import Rule
from momconv.momentum.faster import fused, kernels
from momconv.momentum.measures import no_magnitudes
from momconv.momentum.storage import State

RULES = {gamma: Rule.of(gamma, (0.25,) * 12, 5, torch.float32) for gamma in (0.1, 0.5, 0.9, 1.0)}
ULP = RULES[0.9].ulp
SIZE = 2500  # two programs of a GPU and a part of one


@pytest.fixture
def on_cpu() -> ModuleType:
    pytest.importorskip("numba")
    return importlib.import_module("momconv.momentum.faster.fused_cpu")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Run by Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is for GPUs")
    module = importlib.import_module("momconv.momentum.faster.fused_gpu")
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read by @triton.jit
        yield importlib.reload(module)
    importlib.reload(module)


@contextmanager
def nothing_fused() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "are_for", lambda x, y: False)
        yield


def make_state(
    rule: Rule,
    remainder: torch.dtype = torch.int16,
    size: int = SIZE,
    *,
    is_reversible: bool = True,
) -> tuple[State, Tensor]:
    """A state in the middle of a run, and what the next block returns."""
    torch.manual_seed(0)
    state = State.start(torch.empty(size, dtype=rule.dtype), rule, is_reversible=is_reversible)
    if state.r is not None:
        state.r = state.r.to(remainder)
    x = torch.randn(size, dtype=torch.double).div(rule.ulp).round().mul(rule.ulp)
    v = torch.randn(size, dtype=torch.double).div(16 * rule.v_ulp).round()
    x[4:20] = 1
    state.x = state.pack(x, v, torch.randint(-9, 10, (size,)).double(), rule)
    y = torch.randn(size, dtype=rule.dtype)
    y[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    # Residuals halfway between two integers, of either sign, go to the even one.
    y[4:20] = 1 + (torch.arange(-8, 8) + 0.5) * rule.v_ulp * 4
    return state, y


def check(module: ModuleType, state: State, y: Tensor, rule: Rule) -> None:
    """A step there and back computes the same bits as without ``module``."""
    check_step(module, state, y, rule)
    check_step(module, state, y.nan_to_num(0, 0, 0), rule)


def check_step(module: ModuleType, state: State, y: Tensor, rule: Rule) -> None:
    ours, theirs = copy(state), copy(state)
    largest, before = (y.new_tensor([size, 0.0], dtype=rule.dtype) for size in (0.0, 1e4))
    constants = (rule.coefficients[0] / rule.v_ulp, rule.gamma, rule.ulp, rule.v_ulp / rule.ulp)

    for state_, size in ((copy(state), before), (ours, largest)):
        x = module.advance(state_.x, state_.low, state_.v, state_.r, y, size, *constants)
    ours.x = x
    with nothing_fused():
        expected = torch.zeros_like(largest)
        theirs.x = kernels.advance(theirs, y, expected, rule, 0)

    finite = theirs.x.isfinite()
    assert torch.equal(ours.x.isfinite(), finite)
    assert torch.equal(ours.x.isnan(), theirs.x.isnan())
    check_same(ours, theirs, finite)
    assert largest[0] == expected[0] > 0
    assert before[0] == 1e4
    for other in (largest[1], before[1], expected[1]):
        assert other == 0 if finite.all() else not other.isfinite()

    ours.x = module.retreat(ours.x, ours.low, ours.v, *constants[2:])
    module.undo(ours.x, ours.v, ours.r, y, *constants[:2])

    check_same(ours, state, finite)


def copy(state: State) -> State:
    return State(*(None if t is None else t.clone() for t in parts(state)))  # type: ignore[arg-type]


def parts(state: State) -> list[Tensor | None]:
    return [state.x, state.low, state.v, state.r]


def check_same(ours: State, theirs: State, where: Tensor) -> None:
    for a, b in zip(parts(ours), parts(theirs), strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a[where], b[where])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, at the non-finite values
def test_a_gpu_computes_the_same_bits(on_gpu: ModuleType, gamma: float, dtype: torch.dtype) -> None:
    for is_reversible in (True, False):
        state, y = make_state(RULES[gamma], is_reversible=is_reversible)
        check(on_gpu, state, y.to(dtype), RULES[gamma])


TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    float: "fp64",
    int: "i64",
}


class Launches:
    """Stands for a kernel: its launches compile it, for GPUs that need not be there."""

    def __init__(self, kernel: Any, generation: int) -> None:
        self.kernel, self.generation = kernel, generation
        self.assembly: list[str] = []

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        compiler = importlib.import_module("triton.compiler")
        backends = importlib.import_module("triton.backends.compiler")
        by_name = dict(zip(self.kernel.arg_names, args, strict=True))
        fixed = {name: by_name[name] for name in ("has_r", "block") if name in by_name}
        signature = {
            name: TRITON_TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
            for name, value in by_name.items()
            if name not in fixed and value is not None
        }
        missing = {name: None for name, value in by_name.items() if value is None}
        kinds = signature | dict.fromkeys([*fixed, *missing], "constexpr")
        source = compiler.ASTSource(
            self.kernel, {name: kinds[name] for name in by_name}, constexprs=fixed | missing
        )
        target = backends.GPUTarget("cuda", self.generation, 32)
        self.assembly.append(compiler.compile(source, target=target, options=options).asm["ptx"])


@pytest.mark.parametrize("generation", [75, 80, 90])
def test_a_gpu_is_told_to_round_each_product(
    generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product and a sum in one instruction would round once, to other bits than two."""
    pytest.importorskip("triton", reason="Triton is for GPUs")
    module = importlib.import_module("momconv.momentum.faster.fused_gpu")
    names = ("_advance", "_retreat", "_undo")
    kernels_ = {name: Launches(getattr(module, name), generation) for name in names}
    for name, kernel in kernels_.items():
        monkeypatch.setattr(module, name, kernel)
    for gamma, remainder, dtype in (
        (0.9, torch.int8, torch.bfloat16),
        (1.0, torch.int8, torch.half),
    ):
        state, y = make_state(RULES[gamma], remainder)
        x, low, v, r = parts(state)
        constants = 0.25 / ULP, gamma, ULP, 0.25
        module.advance(x, low, v, r, y.to(dtype), y.new_zeros(()), *constants)
        module.retreat(x, low, v, *constants[2:])
        module.undo(x, v, r, y.to(dtype), *constants[:2])
    for kernel in kernels_.values():
        assert len(kernel.assembly) == 2
        for assembly in kernel.assembly:
            assert "mul.rn.f64" in assembly
            assert "fma" not in assembly
            assert "div" not in assembly

    fusing = kernels_["_undo"]
    fusing.assembly.clear()
    with monkeypatch.context() as patch:
        launch = fusing.launch
        patch.setattr(fusing, "launch", lambda *args, enable_fp_fusion: launch(*args))
        module.undo(x, v, torch.zeros(SIZE, dtype=torch.int8), y, *constants[:2])
    assert "fma" in fusing.assembly[0]  # what is looked for does occur


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remainder", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
def test_a_gpu_that_is_here_computes_the_same_bits(
    gamma: float, remainder: torch.dtype, dtype: torch.dtype
) -> None:
    module = importlib.import_module("momconv.momentum.faster.fused_gpu")
    for is_reversible in (True, False):
        state, y = make_state(RULES[gamma], remainder, is_reversible=is_reversible)
        on_gpu = State(*(None if t is None else t.cuda() for t in parts(state)))  # type: ignore[arg-type]
        check(module, on_gpu, y.to("cuda", dtype), RULES[gamma])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remainder", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
def test_a_cpu_computes_the_same_bits(
    on_cpu: ModuleType, gamma: float, remainder: torch.dtype, dtype: torch.dtype
) -> None:
    for is_reversible in (True, False):
        state, y = make_state(RULES[gamma], remainder, is_reversible=is_reversible)
        check(on_cpu, state, y.to(dtype), RULES[gamma])


def test_a_cpu_computes_the_same_bits_in_double_precision(on_cpu: ModuleType) -> None:
    rule = Rule.of(0.9, (0.25,) * 12, 3, torch.float64)
    state, y = make_state(rule)
    check(on_cpu, state, y / 3, rule)


def test_threads_of_a_cpu_share_the_work(on_cpu: ModuleType) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        check(on_cpu, *make_state(RULES[0.9], size=200_001), RULES[0.9])
    finally:
        torch.set_num_threads(threads)


class Recorder(TorchDispatchMode):
    """Remembers which operations there are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # what a fake tensor tells of itself
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_operation() -> None:
    """Of fake tensors too, which allocate what real ones do and compute nothing."""
    pytest.importorskip("numba")
    rule = RULES[0.9]
    with FakeTensorMode():
        x, y = (torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(2))
        state, largest = State.start(x, rule, is_reversible=True), no_magnitudes(x)
        with Recorder() as recorder:
            x_next = kernels.advance(state, y, largest, rule, 0)
            x_before = kernels.retreat(state, rule)
            kernels.undo(state, y, rule, 0)

    assert recorder.seen == [fused.advance, fused.retreat, fused.undo]
    for made in (x_next, x_before):
        assert (made.shape, made.stride()) == (x.shape, x.stride())


GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton", reason="Triton is for GPUs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    fused.find_obstacle.cache_clear()
    yield
    fused.find_obstacle.cache_clear()


@pytest.mark.usefixtures("a_gpu_is_there")
def test_a_gpu_whose_kernels_cannot_be_built_takes_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is missing; it is tried once and told once."""
    tried = []

    def fail(gpu: torch.device) -> None:
        tried.append(gpu)
        raise RuntimeError("Failed to find C compiler.\nPlease specify CC.")

    monkeypatch.setattr(fused, "_try_out", fail)
    with FakeTensorMode():
        x = torch.empty(4, device=GPU)
        with pytest.warns(UserWarning, match=r"Failed to find C compiler.*fix: .*gcc"):
            assert not fused.are_for(x, x)
        assert not fused.are_for(x, x)
    assert tried == [GPU]
    assert fused.find_obstacle(GPU) == "RuntimeError: Failed to find C compiler. Please specify CC."


@pytest.mark.usefixtures("a_gpu_is_there")
def test_a_gpu_that_triton_does_not_know_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler may end the process."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(fused, "_try_out", lambda _: pytest.fail("tried"))
    with pytest.warns(UserWarning, match=r"capability \(6, 1\) is below \(7, 0\)"):
        obstacle = fused.find_obstacle(GPU)
    assert obstacle is not None


def test_what_is_tried_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Recorder() as recorder:
        fused._try_out(torch.device("cpu"))
    assert {fused.advance, fused.retreat, fused.undo} <= {*recorder.seen}
    assert waited == [torch.device("cpu")]


@pytest.mark.usefixtures("a_gpu_is_there")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_memory_that_runs_out_says_nothing_of_triton(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(gpu: torch.device) -> None:
        raise error

    monkeypatch.setattr(fused, "_try_out", fail)
    with pytest.raises(type(error)):
        fused.find_obstacle(GPU)
    monkeypatch.setattr(fused, "_try_out", lambda gpu: None)
    assert fused.find_obstacle(GPU) is None
