"""What a conversion is worth: how far it is from the original, and whether it can be inverted."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momconv.determinism import deterministic
from momconv.momentum.autograd import Strategy
from momconv.momentum.equations import remainder_bounds
from momconv.momentum.measures import magnitude
from momconv.momentum.sequential import MomentumSequential, momentum_stages, set_strategy
from momconv.momentum.trajectory import narrowest
from momconv.states import in_eval_mode, keeping_random_state
from momconv.surgery.drift import Batch, Drift, answers, measure_drift, require_images, split

REST = ""  # the name of everything outside the momentum stages


@dataclass(frozen=True, slots=True)
class StageCertificate:
    """One stage with momentum.

    Attributes:
        name: Its name in the model, such as ``layer3``.
        gradients_exact: Whether "momentum" gives the gradients of "store", bit for bit: of the
            stage's input and of its parameters, and BatchNorm's statistics after the step. None
            where "store" does not repeat its own, so that nothing can be said.
        largest: The largest |x| in its runs on the images.
        limit: Below which |x| must stay for exact sums.
        headroom_bits: log2(limit / largest): how often x could double.
        remainder_bits: What is kept beside x and v to invert a block, for each element of x.
    """

    name: str
    gradients_exact: bool | None
    largest: float
    limit: float
    headroom_bits: float
    remainder_bits: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 on labelled images, as fractions."""

    original: float
    converted: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found out about a converted network on some images.

    Attributes:
        drift: How far its outputs are from the original's.
        accuracy: Of both networks; None without labels.
        gradients_exact: Whether all gradients are bit for bit those of ordinary backpropagation,
            outside the stages too; None for a network without momentum, and where that cannot be
            said.
        stages: The stages with momentum.
        rounding: How far the outputs are from those of the same network in double precision, as a
            share of their norm; None for a network without momentum, and in older files.
    """

    drift: Drift
    accuracy: Accuracy | None
    gradients_exact: bool | None
    stages: tuple[StageCertificate, ...]
    rounding: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {**asdict(self), "drift": self.drift.to_json()}


def certify(model: nn.Module, original: nn.Module, batches: Iterable[Batch]) -> Certificate:
    """Compare ``model`` with the network that it was converted from, and test its inversion.

    Gradients are compared in one training step on two of the images. Both networks stay as they
    are.

    Args:
        model: The converted network, on any device.
        original: The network that it was converted from, on the same device.
        batches: Images (B, 3, H, W), preprocessed as for evaluation, or pairs of images and
            labels (B,); read once.

    Raises:
        DataError: There are no images.
        InversionError: Reconstruction noticed by itself that it failed.
    """
    device = next(model.parameters()).device
    reference, logits, labels = list[Tensor](), list[Tensor](), list[Tensor]()
    pair = torch.empty(0)
    with in_eval_mode(model, original), torch.no_grad(), _watching(model) as largest:
        for batch in batches:
            images, targets = split(batch)
            images = images.to(device)
            pair = pair if reference else images[[0, -1]]
            reference.append(original(images).cpu())
            logits.append(model(images).cpu())
            labels += [] if targets is None else [targets.cpu()]
    z, other = require_images(reference), require_images(logits)
    equal = compare_gradients(model, pair) if largest else {}
    return Certificate(
        measure_drift(other, z),
        _score(z, other, torch.cat(labels)) if labels else None,
        _conclude(equal),
        tuple(_certify(name, model, float(x), exact=equal[name]) for name, x in largest.items()),
        measure_rounding(model, pair) if largest else None,
    )


@torch.no_grad()
def measure_rounding(model: nn.Module, images: Tensor) -> float:
    """The distance of the outputs from those of the same network in double precision.

    It is a share of their norm, in evaluation. The model stays as it is.
    """
    with in_eval_mode(model):
        ours = model(images).double()
        exact = copy.deepcopy(model).double()(images.double())
    return float((ours - exact).norm() / exact.norm())


def _conclude(equal: dict[str, bool | None]) -> bool | None:
    """Return whether all gradients are exact, if that can be said of all."""
    if False in equal.values():
        return False
    return True if equal and None not in equal.values() else None


def compare_gradients(model: nn.Module, images: Tensor) -> dict[str, bool | None]:
    """Return where "momentum" gives what "store" does, by momentum stage and for ``REST``.

    Compared are the input of the stage, the gradients of it and of the parameters, and the buffers
    after one training step, such as BatchNorm's statistics. The model stays as it is. On a GPU,
    deterministic algorithms compute them; where there are none, and "store" does not give what it
    gave before, the answer is None.

    Raises:
        UsageError: The model has no momentum stages, or none with γ > 0.
        InversionError: Reconstruction noticed by itself that it failed.
    """
    with deterministic(wanted=images.is_cuda), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not have a deterministic implementation")
        stored = _record(model, images, "store")
        equal = _compare(stored, _record(model, images, "momentum"))
        if all(equal.values()):
            return {**equal}
        repeated = _compare(stored, _record(model, images, "store"))
    return {name: same or (False if repeated[name] else None) for name, same in equal.items()}


def _compare(ones: dict[str, list[Tensor]], others: dict[str, list[Tensor]]) -> dict[str, bool]:
    """Return in which stages all tensors are the same."""
    return {
        name: len(tensors) == len(others[name]) and all(map(torch.equal, tensors, others[name]))
        for name, tensors in ones.items()
    }


def _record(model: nn.Module, images: Tensor, strategy: Strategy) -> dict[str, list[Tensor]]:
    """Return what one training step leaves behind, by stage."""
    model = copy.deepcopy(model).train()
    set_strategy(model, strategy)
    model.zero_grad()
    images = images.detach().clone().requires_grad_()
    inputs: dict[str, Tensor] = {}
    stages = _inverted(model)
    with torch.enable_grad(), keeping_random_state(images.device):
        torch.manual_seed(0)
        for name, stage in stages.items():
            stage.register_forward_pre_hook(_keeping(inputs, name))
        output = model(images)
        output.square().sum().backward()
    entries = {REST: [output.detach(), *_gradient(images)]}
    entries |= {name: [x.detach(), *_gradient(x)] for name, x in inputs.items()}
    for name, parameter in model.named_parameters():
        entries[_owner(name, stages)] += _gradient(parameter)
    for name, buffer in model.named_buffers():
        entries[_owner(name, stages)].append(buffer)
    return entries


def _keeping(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a hook that keeps a stage's input, and lets its gradient be kept."""

    def keep(_stage: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name not in inputs:  # not again when an outer stage recomputes this one
            inputs[name] = args[0]
            args[0].retain_grad()

    return keep


def _gradient(tensor: Tensor) -> list[Tensor]:
    return [] if tensor.grad is None else [tensor.grad]


def _owner(name: str, stages: Iterable[str]) -> str:
    return next((stage for stage in stages if name.startswith(f"{stage}.")), REST)


def _inverted(model: nn.Module) -> dict[str, MomentumSequential]:
    """Return the stages that have runs with momentum."""
    stages = momentum_stages(model)
    return {name: stage for name, stage in stages.items() if stage.gamma and stage.runs}


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give the largest |x| in each stage's runs, as they are seen inside."""
    largest: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, stage in _inverted(model).items():
            largest[name] = torch.zeros(())
            for module in _behind_and_within(stage):
                hook = module.register_forward_hook(
                    _measuring(largest, name, is_output=module is stage)
                )
                hooks.callback(hook.remove)
        yield largest


def _behind_and_within(stage: MomentumSequential) -> list[nn.Module]:
    """Return what has the x of the runs as input: their blocks, and the block after each.

    After the last block it is the stage's own output.
    """
    numbers = {n for run in stage.runs or () for n in range(run.start, run.stop + 1)}
    return [stage if n == len(stage) else stage[n] for n in sorted(numbers)]


def _measuring(largest: dict[str, Tensor], name: str, *, is_output: bool) -> Callable[..., None]:
    def measure(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = magnitude(output if is_output else args[0]).float().cpu()
        largest[name] = torch.maximum(largest[name], x)

    return measure


def _certify(
    name: str, model: nn.Module, largest: float, *, exact: bool | None
) -> StageCertificate:
    stage = _inverted(model)[name]
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    rules = [stage.rule(run, dtype) for run in stage.runs or ()]
    limit = min(rule.limit for rule in rules)
    headroom = math.log2(limit / largest) if largest > 0 else math.inf
    steps = [len(rule.coefficients) for rule in rules]
    bits = sum(remainder_bits(stage.gamma, count) for count in steps) / sum(steps)
    return StageCertificate(name, exact, largest, limit, headroom, bits)


def remainder_bits(gamma: float, steps: int) -> int:
    """Return the bits of remainder that a run keeps for each element of x.

    >>> remainder_bits(0.9, 3), remainder_bits(0.9, 8), remainder_bits(0.5, 8)
    (8, 8, 16)
    """
    if gamma == 1:
        return 0
    aside, width = 0, 0
    for is_full, bound in remainder_bounds(gamma, steps):
        aside += width if is_full else 0
        width = 8 * narrowest(bound).itemsize
    return aside + width


def _score(reference: Tensor, logits: Tensor, labels: Tensor) -> Accuracy:
    original, converted = (int((answers(z) == labels).sum()) for z in (reference, logits))
    return Accuracy(original / len(labels), converted / len(labels))
