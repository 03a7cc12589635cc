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

ULP = 2.0**-14
SIZE = 2500  # two programs of a GPU and a part of one
State = tuple[Tensor, Tensor, Tensor | None, Tensor]


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


def make_state(gamma: float, remainder: torch.dtype = torch.int16, size: int = SIZE) -> State:
    torch.manual_seed(0)
    x = torch.randn(size).div(ULP).round().mul(ULP)
    v = torch.randn(size).div(ULP).round()
    r = None if gamma == 1 else torch.randint(-9, 10, (size,)).to(remainder)
    y = torch.randn(size)
    y[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    # Residuals halfway between two integers, of either sign, go to the even one.
    y[4:20] = x[4:20] + (torch.arange(-8, 8) + 0.5) * ULP * 4
    return x, v, r, y


def check(module: ModuleType, state: State, gamma: float) -> None:
    """A step there and back computes the same bits as without ``module``."""
    x, v, r, y = state
    check_step(module, state, gamma)
    check_step(module, (x, v, r, y.nan_to_num(0, 0, 0)), gamma)


def check_step(module: ModuleType, state: State, gamma: float) -> None:
    x, v, r, y = state
    rule = Rule(gamma, (0.25,), ULP)
    scale = rule.coefficients[0] / ULP
    ours, theirs = (copy(v, r) for _ in range(2))
    largest, largest_before = x.new_zeros(()), x.new_tensor(1e4)

    x_ours = module.advance(x, *ours, y, largest, scale, gamma, ULP)
    module.advance(x, *copy(v, r), y, largest_before, scale, gamma, ULP)
    with nothing_fused():
        x_theirs = kernels.advance(x, *theirs, y, x.new_zeros(()), rule, 0)

    assert torch.equal(x_ours.nan_to_num(), x_theirs.nan_to_num())
    assert torch.equal(x_ours.isnan(), x_theirs.isnan())
    finite = x_theirs.isfinite()
    check_same(ours, theirs, finite)
    if finite.all():
        assert largest == x_theirs.abs().max()
        assert largest_before == 1e4
    else:
        assert not largest.isfinite()
        assert not largest_before.isfinite()

    module.undo(x, *ours, y, scale, gamma)

    check_same(ours, (v, r), finite)


def copy(v: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return v.clone(), None if r is None else r.clone()


def check_same(
    ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None], where: Tensor
) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a[where], b[where])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, at the non-finite values
def test_a_gpu_computes_the_same_bits(on_gpu: ModuleType, gamma: float, dtype: torch.dtype) -> None:
    x, v, r, y = make_state(gamma)
    check(on_gpu, (x, v, r, y.to(dtype)), gamma)


TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    float: "fp32",
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
        fixed = {name: by_name[name] for name in ("has_r", "block")}
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
    kernels_ = {name: Launches(getattr(module, name), generation) for name in ("_advance", "_undo")}
    for name, kernel in kernels_.items():
        monkeypatch.setattr(module, name, kernel)
    for gamma, remainder, dtype in (
        (0.9, torch.int8, torch.bfloat16),
        (1.0, torch.int8, torch.half),
    ):
        x, v, r, y = make_state(gamma, remainder)
        module.advance(x, v, r, y.to(dtype), x.new_zeros(()), 0.25 / ULP, gamma, ULP)
        module.undo(x, v, r, y.to(dtype), 0.25 / ULP, gamma)
    for kernel in kernels_.values():
        assert len(kernel.assembly) == 2
        for assembly in kernel.assembly:
            assert "mul.rn.f32" in assembly
            assert "fma" not in assembly
            assert "div" not in assembly

    fusing = kernels_["_undo"]
    fusing.assembly.clear()
    with monkeypatch.context() as patch:
        launch = fusing.launch
        patch.setattr(fusing, "launch", lambda *args, enable_fp_fusion: launch(*args))
        module.undo(x, v, torch.zeros(SIZE, dtype=torch.int8), y, 0.25 / ULP, 0.9)
    assert "fma" in fusing.assembly[0]  # what is looked for does occur


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remainder", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
def test_a_gpu_that_is_here_computes_the_same_bits(
    gamma: float, remainder: torch.dtype, dtype: torch.dtype
) -> None:
    module = importlib.import_module("momconv.momentum.faster.fused_gpu")
    x, v, r, y = make_state(gamma, remainder)
    state = x.cuda(), v.cuda(), None if r is None else r.cuda(), y.to("cuda", dtype)
    check(module, state, gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remainder", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
def test_a_cpu_computes_the_same_bits(
    on_cpu: ModuleType, gamma: float, remainder: torch.dtype, dtype: torch.dtype
) -> None:
    x, v, r, y = make_state(gamma, remainder)
    check(on_cpu, (x, v, r, y.to(dtype)), gamma)


def test_a_cpu_computes_the_same_bits_in_double_precision(on_cpu: ModuleType) -> None:
    x, v, r, y = make_state(0.9)
    check(on_cpu, (x.double(), v.double(), r, y.double() / 3), 0.9)


def test_threads_of_a_cpu_share_the_work(on_cpu: ModuleType) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        check(on_cpu, make_state(0.9, size=200_001), 0.9)
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
    rule = Rule(0.9, (0.1,), ULP)
    with FakeTensorMode():
        x, v, y = (torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(3))
        r, largest = torch.empty_like(x, dtype=torch.int8), x.new_zeros(())
        with Recorder() as recorder:
            x_next = kernels.advance(x, v, r, y, largest, rule, 0)
            kernels.undo(x, v, r, y, rule, 0)

    assert recorder.seen == [fused.advance, fused.undo]
    assert (x_next.shape, x_next.stride()) == (x.shape, x.stride())


GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton", reason="Triton is for GPUs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


def test_what_is_tried_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with Recorder() as recorder:
        fused._try_out(torch.device("cpu"))
    assert {fused.advance, fused.undo} <= {*recorder.seen}
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
