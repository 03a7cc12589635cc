import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from momconv.errors import DataError
from momconv.momentum.sequential import MomentumSequential, Run, set_strategy
from momconv.surgery.calibration import calibrate
from momconv.surgery.conversion import convert
from momconv.surgery.distillation import distill
from momconv.surgery.imitation import Imitation

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: LayerNorm2d(4),
    "no norm": nn.Identity,
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 30)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """A stem, one stage of residual blocks, and a head."""

    def __init__(self, norm: str = "BatchNorm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.stage = nn.Sequential(*(Block(NORMS[norm]()) for _ in range(2)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage(self.stem(x)).mean((2, 3)))
        return 10 * logits


class Shift(nn.Module):
    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.by = nn.Parameter(by)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def images(count: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(25, 3, 6, 6) for _ in range(count)]


def converted(norm: str = "BatchNorm", gamma: float = 0.9) -> tuple[nn.Module, nn.Module]:
    """A student, whose gains are still to be found, and its teacher."""
    teacher = Net(norm)
    calibrate(teacher, images())
    return convert(teacher, gamma, stages="all", gain=False), teacher


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def gains(model: nn.Module) -> tuple[float, ...]:
    (run,) = stage_of(model).runs or ()
    return run.gains


def stage_of(model: nn.Module) -> MomentumSequential:
    stage = model.get_submodule("stage")
    assert isinstance(stage, MomentumSequential)
    return stage


def refine(model: nn.Module, original: nn.Module) -> Imitation:
    """The second part of a calibration."""
    imitation = calibrate(model, images(12), original).imitation
    assert imitation is not None
    return imitation


# Calibration towards the original


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_calibration_comes_closer_to_the_original(norm: str, gamma: float) -> None:
    student, teacher = converted(norm, gamma)
    imitation = refine(student, teacher)
    assert imitation.steps == 80
    assert imitation.after < 0.9 * imitation.before


def test_gains_find_the_optimum_where_it_is_known() -> None:
    axes = torch.eye(3)[:, :, None, None]
    teacher = nn.Sequential()
    teacher.add_module("stage", nn.Sequential(*map(Shift, axes)))
    teacher.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    student = convert(teacher, 0.5, stages="all")
    best = gains(student)  # residuals that do not depend on x: the initial gains are exact
    assert best == pytest.approx((1 / (1 - 0.5**3), 1 / (1 - 0.5**2), 1 / (1 - 0.5)))
    stage_of(student).runs = (Run(0, 3, (1.1, 1.3, 1.9)),)
    refine(student, teacher)
    assert gains(student) == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("norm", NORMS)
def test_calibration_changes_gains_norms_and_blocks_only(norm: str) -> None:
    student, teacher = converted(norm)
    before, old = copy.deepcopy(student.state_dict()), gains(student)
    kept = copy.deepcopy(teacher.state_dict())
    refine(student, teacher)
    assert gains(student) != old
    assert {key.split(".")[0] for key in changed(student, before)} <= {"stage"}
    assert not changed(teacher, kept)


def test_calibration_is_the_same_each_time() -> None:
    results = []
    for _ in range(2):
        student, teacher = converted()
        results.append((refine(student, teacher), gains(student)))
    assert results[0] == results[1]


def hooks_of(*models: nn.Module) -> list[list[int]]:
    return [[*module._forward_hooks] for model in models for module in model.modules()]


def test_modes_gradients_and_hooks_are_as_before() -> None:
    student, teacher = converted()
    student.train()
    student.get_submodule("head").requires_grad_(False)
    hooks = hooks_of(student, teacher)
    refine(student, teacher)
    assert all(module.training for module in [*student.modules(), *teacher.modules()])
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    assert all(p.grad is None for model in (student, teacher) for p in model.parameters())
    assert hooks_of(student, teacher) == hooks


@pytest.mark.parametrize("work", [refine, lambda s, t: distill(s, t, images(), epochs=1)])
def test_gradients_of_the_caller_are_kept(work: Callable[..., Imitation]) -> None:
    student, teacher = converted()
    weight = student.get_parameter("head.weight")
    weight.grad = torch.ones_like(weight)
    work(student, teacher)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_too_few_images_to_hold_one_out_leave_the_gains() -> None:
    student, teacher = converted()
    old = gains(student)
    assert calibrate(student, [torch.randn(4, 3, 6, 6)], teacher).imitation is None
    assert gains(student) == old


def test_a_plain_network_stays_what_it_is() -> None:
    student, teacher = converted(gamma=0)
    assert refine(student, teacher).after == pytest.approx(0, abs=1e-6)
    (x, *_) = images()
    assert torch.allclose(student.eval()(x), teacher.eval()(x), atol=1e-5)


# Distillation


@pytest.mark.parametrize("norm", NORMS)
def test_distillation_lowers_the_divergence(norm: str) -> None:
    student, teacher = converted(norm)
    before = copy.deepcopy(teacher.state_dict())
    imitation = distill(student, teacher, images(), epochs=20)
    assert imitation.after < 0.97 * imitation.before
    assert not changed(teacher, before)


def test_all_parameters_learn_or_the_norms_alone() -> None:
    student, teacher = converted()
    before = copy.deepcopy(student.state_dict())
    distill(student, teacher, images(), epochs=5, trainable="norms")
    assert {key.split(".")[2] for key in changed(student, before)} == {"norm"}
    distill(student, teacher, images(), epochs=5)
    assert changed(student, before) >= {"stem.weight", "stage.0.conv.weight", "head.weight"}


def test_a_recorded_range_is_widened_where_distillation_needs_it() -> None:
    student, teacher = converted()
    for weight in (teacher.get_parameter("stem.weight"), student.get_parameter("stem.weight")):
        weight.data.mul_(100)
    stage_of(student).set_range(0, 1)
    distill(student, teacher, images(), epochs=1)
    distilled = {}
    for strategy in ("store", "momentum"):
        one = copy.deepcopy(student).eval()
        set_strategy(one, strategy)
        y = one(images()[0])
        y.square().mean().backward()
        distilled[strategy] = [y, *(p.grad for p in one.parameters() if p.grad is not None)]
    assert all(map(torch.equal, *distilled.values()))
    (run,) = stage_of(one).runs or ()
    assert run.exponent is not None
    assert run.exponent > 1


def test_distillation_is_the_same_each_time() -> None:
    results = list[tuple[Imitation, tuple[float, ...]]]()
    for _ in range(2):
        student, teacher = converted()
        batches = images()
        torch.rand(len(results) + 1)  # the global random state does not matter, nor does it change
        random_state = torch.get_rng_state()
        results.append((distill(student, teacher, batches, epochs=5), gains(student)))
        assert torch.equal(torch.get_rng_state(), random_state)
    assert results[0] == results[1]


class Stop(Exception):
    pass


@pytest.mark.parametrize("exception", [KeyboardInterrupt, Stop])
def test_an_interruption_leaves_the_best_student(exception: type[BaseException]) -> None:
    student, teacher = converted()
    before, seen = copy.deepcopy(student.state_dict()), list[int]()
    hooks = hooks_of(student)

    def progress(done: int, total: int, _: str) -> None:
        seen.append(done)
        assert total == 40
        if done == 30:
            raise exception

    if exception is Stop:
        with pytest.raises(Stop):
            distill(student, teacher, images(), epochs=20, progress=progress)
    else:
        imitation = distill(student, teacher, images(), epochs=20, progress=progress)
        assert (imitation.steps, imitation.interrupted) == (30, True)
        assert imitation.after < imitation.before
    assert seen == [*range(31)]
    assert changed(student, before)  # the state after 25 steps
    assert hooks_of(student) == hooks


def test_a_student_that_gets_worse_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.surgery.distillation._RATE", 1e3)
    monkeypatch.setattr("momconv.surgery.distillation._NORM_RATE", 1e3)
    student, teacher = converted("no norm")
    before, old = copy.deepcopy(student.state_dict()), gains(student)
    imitation = distill(student, teacher, images(), epochs=3)
    assert imitation.after == imitation.before
    assert not changed(student, before)
    assert gains(student) == old


def test_the_time_is_limited() -> None:
    student, teacher = converted()
    told = list[tuple[int, int, str]]()
    imitation = distill(
        student, teacher, images(), minutes=0, progress=lambda *args: told.append(args)
    )
    assert imitation.steps == 0
    assert told == [(0, 12, "")]


def test_a_single_image_is_refused() -> None:
    student, teacher = converted()
    with pytest.raises(DataError, match="too few images"):
        distill(student, teacher, [torch.randn(1, 3, 6, 6)])


def test_where_memory_runs_out_steps_are_taken_in_parts() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(20, 3, 6, 6)]
    seen = []

    def exhaust(_module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > 8:
            raise MemoryError

    found = []
    for is_short in (False, True):
        plain = Net()
        net = convert(plain, 0.9, stages="all")
        if is_short:
            net.get_submodule("head").register_forward_pre_hook(exhaust)
        found.append(distill(net, plain, batches, epochs=2))
    whole, parts = found
    assert parts.after == pytest.approx(whole.after, rel=0.1)
    assert max(seen) == 16
    assert parts.after < parts.before
