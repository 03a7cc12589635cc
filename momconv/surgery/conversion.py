"""From a plain residual network to a momentum network with the same parameters and keys."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from momconv.errors import ModelFileError, UsageError
from momconv.momentum.equations import (
    HIGHEST,
    LOWEST,
    Velocity,
    coefficients,
    find_exponent,
    weights,
)
from momconv.momentum.members import unmark
from momconv.momentum.sequential import (
    MomentumDict,
    MomentumList,
    MomentumSequential,
    Run,
    check_gamma,
    check_runs,
    momentum_stages,
    set_strategy,
)
from momconv.surgery.stem import make_stem_recomputable, restore_stem
from momconv.tracing.sequences import (
    Runs,
    find_chains,
    find_sequences,
    has_loop,
    list_operations,
    search,
)
from momconv.words import quoted
from momconv.zoo.description import find_description
from momconv.zoo.networks import build_described, is_known

Module = TypeVar("Module", bound=nn.Module)

_REASONS = 3  # that an error gives
_BROKEN = "the loop over it does more than to call one block after another, or takes them by index"
PAYS_FROM = 3  # blocks: x, v and r then weigh less than the checkpoints, one x a block


def convert(  # noqa: PLR0913 (each is a fact about the conversion)
    model: nn.Module,
    gamma: float = 0.9,
    stages: str | Sequence[str] = "auto",
    velocity: Velocity = "zero",
    *,
    gain: bool = True,
    inputs: Sequence[Tensor] | None = None,
    largest: float | None = None,
) -> nn.Module:
    """Return a copy of ``model`` in which runs of residual blocks follow the momentum rule.

    Every ``nn.Sequential`` with a run becomes a MomentumSequential of the same blocks, so the
    state-dict keys stay as they are; so does an ``nn.ModuleList`` whose blocks the model calls in
    turn. Swapping the rule changes what the network computes: after k blocks, block j has
    contributed only 1 − γ^(k−j) of its residual. A gain on each block makes up for that.

    Args:
        model: A network, plain or converted before. It stays as it is.
        gamma: γ in (0, 1]; 0 keeps the plain network.
        stages: Where blocks change their rule: "all" runs, the runs in the sequences of the
            given name or names (such as "layer3"), or "auto", the runs long enough to save memory.
        velocity: v[0] is 0 ("zero") or f(x[0]) ("residual").
        gain: Whether blocks get the gain that restores their weight in the sum.
        inputs: What the model is called with, of which only shapes and types matter; by default
            two RGB images of the model's resolution, or of 224 × 224 pixels.
        largest: The largest activation to be expected; four times as much is exact, on a grid as
            fine as 31 bits make it (51 in double precision). By default each run looks for its own
            before its first pass.

    Raises:
        UsageError: γ is out of range, or a stage does not exist or has no run; ``largest`` is not
            above 0.
    """
    if isinstance(stages, str) and stages not in ("auto", "all"):
        stages = [stages]
    exponent = None if largest is None else find_exponent(_check_largest(largest))
    model = _plain(copy.deepcopy(model))
    inputs = inputs or [_two_images(model)]
    found, refused = search(model, inputs)
    broken = dict.fromkeys(_find_broken_loops(model, found, inputs), _BROKEN)
    found = {name: runs for name, runs in found.items() if name not in broken}
    _check_names(model, found, broken | refused, stages)
    model = _wrap(model, found, gamma, velocity)
    for name, stage in momentum_stages(model).items():
        stage.runs = tuple(
            replace(_with_gains(run, stage) if gain else run, exponent=exponent)
            for run in stage.runs or ()
            if stages == "all" or (name in stages if stages != "auto" else len(run) >= PAYS_FROM)
        )
    make_stem_recomputable(model)
    set_strategy(model, "auto")
    return model


def _check_largest(largest: float) -> float:
    try:
        number = float(largest)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(
            f"largest is {largest!r}, and the largest activation must be a number above 0",
            kind="usage.bad_value",
            fix="largest=None, which looks for it",
        )
    return number


def revert(model: nn.Module) -> nn.Module:
    """Return the plain network, of its original class, with the tensors of ``model``.

    It computes something else: it has neither momentum nor the gains of the blocks.
    """
    description = find_description(model)
    if description is None or not is_known(description.architecture):
        return _plain(copy.deepcopy(model))
    plain = build_described(description)
    plain.load_state_dict(model.state_dict())
    return plain.to(next(model.parameters()).device).train(model.training)


def set_gamma(model: nn.Module, gamma: float, *, gain: bool = True) -> None:
    """Let the momentum stages of ``model`` follow another γ in (0, 1], in place.

    Args:
        model: A converted network. Stages with γ = 0 stay plain.
        gamma: γ.
        gain: Whether blocks have the gain that restores their weight in the sum. It changes with γ;
            the factor that calibration has put on top of it stays.

    Raises:
        UsageError: γ is out of range.
    """
    gamma = check_gamma(gamma)
    for stage in momentum_stages(model).values():
        if stage.gamma in (0, gamma):
            continue
        runs = stage.runs or ()
        restoring = [_with_gains(run, stage).gains for run in runs]
        stage.gamma = gamma
        if gain:
            stage.runs = tuple(
                _on_top(_with_gains(run, stage), run.gains, old)
                for run, old in zip(runs, restoring, strict=True)
            )


@dataclass(frozen=True, slots=True)
class Stage:
    """What a report says about one stage.

    Attributes:
        name: Its name in the model, such as ``layer3``.
        blocks: How many blocks it has.
        momentum: Which of them follow the momentum rule, counted from 0.
        parameters: How many numbers it learns.
        gamma: Its γ, 0 where no block follows the rule.
    """

    name: str
    blocks: int
    momentum: tuple[int, ...]
    parameters: int
    gamma: float


def summarise(model: nn.Module) -> list[Stage]:
    """Return the stages of a model, converted or not, in its order.

    They are the Sequentials that are in no other, not counting those around momentum stages.
    """
    stages: dict[str, nn.Sequential] = {}
    for name in _sequentials(model):
        stage = model.get_submodule(name)
        assert isinstance(stage, nn.Sequential)
        if not any(_is_inside(name, outer) for outer in stages) and set(momentum_stages(stage)) <= {
            ""
        }:
            stages[name] = stage
    return [_summarise(name, stage) for name, stage in stages.items()]


def _summarise(name: str, stage: nn.Sequential) -> Stage:
    gamma = stage.gamma if isinstance(stage, MomentumSequential) else 0.0
    runs = (stage.runs or ()) if isinstance(stage, MomentumSequential) and gamma else ()
    momentum = tuple(n for run in runs for n in range(run.start, run.stop))
    return Stage(name, len(stage), momentum, _count_parameters(stage), gamma if momentum else 0.0)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def read_schemes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what :func:`apply_schemes` needs to convert the plain network again, as JSON."""
    return {
        name: {
            "gamma": stage.gamma,
            "velocity": stage.velocity,
            "runs": [asdict(run) for run in stage.runs or ()],
        }
        for name, stage in momentum_stages(model).items()
    }


def apply_schemes(model: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Convert ``model`` as ``schemes``, which may come from a stranger's file, say, and return it.

    Its modules are replaced in place, unless it is itself a stage.

    Raises:
        ModelFileError: They do not fit the model.
    """
    for name, values in schemes.items():
        if name not in find_sequences(model) | find_chains(model):
            raise _unfitting(f"it has no stage {quoted(name)}")
        try:
            scheme = _Scheme.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unfitting(f"{name}.{first['loc']}: {first['msg']}") from error
        plain = model.get_submodule(name)
        runs = [Run(**run.model_dump()) for run in scheme.runs]
        try:
            check_runs(runs, len(plain._modules))
        except UsageError as error:
            raise _unfitting(f"in {name} {error.message}") from error
        stage = _become_stage(plain, scheme.gamma, scheme.velocity, runs)
        model = _replace(model, name, stage)
    if schemes:
        make_stem_recomputable(model)
        set_strategy(model, "auto")
    return model


class _SchemeRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    start: int
    stop: int
    gains: tuple[FiniteFloat, ...]
    exponent: Annotated[int, Field(ge=LOWEST, le=HIGHEST)] | None = None


def _allowed_gamma(gamma: float) -> float:
    try:
        return check_gamma(gamma)
    except UsageError as error:
        raise ValueError(error.message) from error


class _Scheme(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gamma: Annotated[float, AfterValidator(_allowed_gamma)]
    velocity: Velocity
    fraction_bits: int | None = None  # the grid of files that an older momconv wrote
    runs: list[_SchemeRun]


def _unfitting(reason: str) -> ModelFileError:
    return ModelFileError(
        f"the description of the momentum stages does not fit the network: {reason}",
        kind="model_file.inconsistent",
    )


def _with_gains(run: Run, stage: MomentumSequential) -> Run:
    """Return the run with gains that give each residual weight 1 in x, as in the ResNet."""
    if stage.gamma == 0:
        return run
    ones = (1.0,) * len(run.gains)
    lost = weights(stage.gamma, coefficients(stage.gamma, ones, stage.velocity))
    return replace(run, gains=tuple(1 / weight for weight in lost))


def _on_top(run: Run, gains: Sequence[float], restoring: Sequence[float]) -> Run:
    """Return the run with its gains times what ``gains`` have on top of the ``restoring`` ones."""
    factors = (gain / old for gain, old in zip(gains, restoring, strict=True))
    together = zip(run.gains, factors, strict=True)
    return replace(run, gains=tuple(new * factor for new, factor in together))


def _two_images(model: nn.Module) -> Tensor:
    """Return two images without memory: BatchNorm in training mode refuses a single one."""
    description = find_description(model)
    side = description.preprocessing.resolution if description else 224
    parameter = next(model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, 3, side, side, device=parameter.device, dtype=parameter.dtype)


def _find_broken_loops(model: nn.Module, found: Runs, inputs: Sequence[Tensor]) -> list[str]:
    """Return the sequences whose loops do not compute the same if a run is called as one block."""
    # What a loop over a list computes for each block then comes before all blocks.
    loops = {
        name: not isinstance(sequence, nn.ModuleList)
        for name in found
        if has_loop(sequence := model.get_submodule(name))
    }
    expected = {
        in_order: list_operations(model, inputs, in_order=in_order)
        for in_order in {*loops.values()}
    }
    return [
        name
        for name, in_order in loops.items()
        if _try_out(model, name, found[name], inputs, in_order=in_order) != expected[in_order]
    ]


def _try_out(
    model: nn.Module, name: str, runs: list[range], inputs: Sequence[Tensor], *, in_order: bool
) -> list[object] | None:
    """Return what ``model`` computes with a stage in place of a list; None if it is not called."""
    trial, calls = _wrap(copy.deepcopy(model), {name: runs}, 0, "zero"), list[object]()
    trial.get_submodule(name).register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        operations = list_operations(trial, inputs, in_order=in_order)
    except UsageError:  # of a loop that uses what blocks return
        return None
    return operations if calls else None


def _check_names(
    model: nn.Module, found: Runs, refused: Mapping[str, str], stages: str | Sequence[str]
) -> None:
    named = [name for name, runs in found.items() if runs]
    unknown = [] if isinstance(stages, str) else [name for name in stages if name not in named]
    if not unknown and named:
        return
    reasons = [(name, why) for name, why in refused.items() if not unknown or name == unknown[0]]
    reasons.sort(key=lambda one: -_count_parameters(model.get_submodule(one[0])))
    raise UsageError(
        f"this {type(model).__name__} has no two consecutive residual blocks of one shape"
        + (f" in {quoted(unknown[0])}" if unknown else "")
        + "".join(f"\n{name or 'it'}: {why}" for name, why in reasons[:_REASONS]),
        kind="usage.unknown_stage",
        fix=f"--stages with some of {', '.join(named)}" if named else None,
    )


def _wrap(model: nn.Module, found: Runs, gamma: float, velocity: Velocity) -> nn.Module:
    """Return ``model`` with a stage wherever a run was ``found``.

    A Sequential around stages becomes one too, to recompute the stem and what is between them.
    """
    with_runs = [name for name, runs in found.items() if runs]
    for name in found:
        if name not in with_runs and not any(_is_inside(inner, name) for inner in with_runs):
            continue
        runs = [Run(r.start, r.stop, (1.0,) * len(r)) for r in found[name]]
        plain = model.get_submodule(name)
        stage = _become_stage(plain, gamma, velocity, runs)
        model = _replace(model, name, stage)
    return model


def _plain(model: nn.Module) -> nn.Module:
    """Return ``model`` with plain sequences for stages, in place unless it is one itself."""
    restore_stem(model)
    for name, stage in momentum_stages(model).items():
        plain = stage.kind.__new__(stage.kind)  # its __init__ may want something
        unmark(stage, stage.children())
        model = _replace(model, name, _with_contents(plain, stage))
    return model


def _become_stage(
    plain: nn.Module, gamma: float, velocity: Velocity, runs: Sequence[Run]
) -> MomentumSequential:
    kinds = {
        nn.ModuleList: MomentumList,
        nn.ModuleDict: MomentumDict,
        nn.Module: MomentumSequential,
    }
    make = next(made for kind, made in kinds.items() if isinstance(plain, kind))
    stage = _with_contents(make(gamma=gamma, velocity=velocity), plain)
    stage.kind, stage.runs = type(plain), tuple(runs)
    return stage


def _with_contents(new: Module, old: nn.Module) -> Module:
    """Return ``new`` with the blocks of ``old``, and what else was on it, such as hooks."""
    own = MomentumSequential.__annotations__
    vars(new).update({name: value for name, value in vars(old).items() if name not in own})
    return new


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Return ``model`` with another submodule; ``new`` itself where that is all of it."""
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    outer = model.get_submodule(parent)
    if isinstance(outer, nn.TransformerEncoder) and leaf == "layers":
        _settle_nesting(outer, outer.layers, new)
    setattr(outer, leaf, new)
    return model


def _settle_nesting(encoder: nn.TransformerEncoder, old: nn.Module, new: nn.Module) -> None:
    """Let the encoder put no padded sequences into a nested tensor for a stage.

    It does so in inference alone, and there is neither arithmetic nor a grid for these.
    """
    nests = old.nests if isinstance(old, MomentumSequential) else encoder.use_nested_tensor
    if is_stage := isinstance(new, MomentumSequential):
        new.nests = nests
    encoder.use_nested_tensor = nests and not is_stage


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _sequentials(model: nn.Module) -> list[str]:
    """Return the names of the stages and of the plain Sequentials that may become some."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Sequential or isinstance(module, MomentumSequential)
    ]
