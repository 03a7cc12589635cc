"""How a run fits its memory: planned by prediction, and checked against its first step."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from momconv.determinism import describe_tf32
from momconv.errors import ModelFileError, ResourceError
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.allowance import held_bytes
from momconv.planner.measurement import available_bytes
from momconv.planner.micro_batch import count_steps, largest_part, split_evenly
from momconv.planner.outlook import FEW, Change, Fixed, Request, has_batch_norm
from momconv.planner.prediction import Training
from momconv.planner.search import search
from momconv.planner.speed import measure_speed
from momconv.training.processes import Processes
from momconv.training.progress import Listener
from momconv.units import format_bytes, parse_bytes
from momconv.vocabulary import OptimizerName, Precision, StrategyChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a plan depends on, besides the network."""

    images: int  # of an epoch
    batch_size: int
    micro_batch: int | Literal["auto"]
    resolution: int  # pixels
    strategy: StrategyChoice  # "auto": the fastest that fits
    precision: Precision
    optimizer: OptimizerName
    device: str
    memory: str | None  # None: what is free
    headroom: float = 0.1  # of what is free
    ema: bool = False  # whether an average of the weights is kept
    processes: int = 1  # among which a batch is divided
    sharers: int = 1  # of them, those that share the device
    may_change: tuple[Change, ...] = ()  # to be faster
    fixed: tuple[Fixed, ...] = field(default=(), compare=False)  # not to be advised to change

    @property
    def batch(self) -> int:
        """The images of a full batch."""
        return min(self.images, self.batch_size)

    @property
    def own_batch_size(self) -> int:
        """The largest share of a full batch that a process gets."""
        return math.ceil(self.batch_size / self.processes)

    @property
    def own_images(self) -> int:
        """As many images as make an epoch of such shares."""
        others = count_steps(self.images, self.batch_size) - 1
        last = self.images - others * self.batch_size
        return others * self.own_batch_size + math.ceil(last / self.processes)

    def find_limit(self, model: nn.Module) -> int:
        """The bytes for everything, the loaded ``model`` included."""
        if self.memory is not None:
            return parse_bytes(self.memory)
        device = torch.device(self.device)
        free = available_bytes(device, self.headroom)
        return free // self.sharers + held_bytes(model, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How a batch is split, and what it takes.

    On a GPU the prediction has the CUDA context and libraries in it, which the measurement, the
    allocator's, has not.
    """

    setting: Setting
    strategy: StrategyChoice  # the chosen one
    stages: str  # what that means for each stage
    micro_batch: int
    predicted_bytes: int  # at the peak of a step with the largest micro-batch of an epoch
    limit_bytes: int
    measured_bytes: int | None = None  # the same in the first step of the run
    predicted_seconds: float | None = None  # of an image in a step, about
    is_calibrated: bool = False  # whether by steps on the device
    measured_seconds: float | None = None  # the same in the first epoch
    gamma: float | None = None  # if it has to be larger than in the network

    @property
    def sizes(self) -> list[int]:
        """The images of each micro-batch of a process's share of a full batch."""
        share = min(self.setting.own_images, self.setting.own_batch_size)
        return list(split_evenly(share, self.micro_batch))

    def apply(self, model: nn.Module) -> None:
        """Give the stages of ``model`` the chosen strategy."""
        if momentum_stages(model):
            set_strategy(model, self.strategy)

    @property
    def is_exceeded(self) -> bool:
        """Whether the measured peak is above the limit."""
        return self.measured_bytes is not None and self.measured_bytes > self.limit_bytes

    def halve(self, *, fewest: int) -> Self | None:
        """The plan after ``micro_batch`` images did not fit; None where parts cannot be smaller."""
        smaller = max(fewest, self.micro_batch // 2)
        images, batch = self.setting.own_images, self.setting.own_batch_size
        if largest_part(images, batch, smaller) >= largest_part(images, batch, self.micro_batch):
            return None
        return replace(
            self,
            micro_batch=smaller,
            measured_bytes=None,
            predicted_seconds=None,
            measured_seconds=None,
        )

    def to_json(self) -> str:
        """The plan as a JSON document, with the sizes."""
        return json.dumps(asdict(self) | {"sizes": self.sizes}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of ``to_json``.

        Raises:
            ModelFileError: ``text`` is no plan.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            problem = f"plan.json: {error.errors()[0]['msg']}"
            raise ModelFileError(
                f"{problem}\nwithout it, it is planned anew", kind="run.bad_plan"
            ) from error

    def __str__(self) -> str:
        sizes, setting = self.sizes, self.setting
        parts = f"{len(sizes)} micro-batches of {sizes[0]}" if len(sizes) > 1 else "one micro-batch"
        if sizes[-1] < sizes[0]:
            parts += f" or {sizes[-1]}"
        whose = f" over {setting.processes} processes, each" if setting.processes > 1 else ""
        text = f"batch of {setting.batch}{whose} in {parts} ({self.stages}, {setting.precision})"
        peak, limit = format_bytes(self.predicted_bytes), format_bytes(self.limit_bytes)
        whose = "the limit" if setting.memory else "what is free"
        text = f"{text}, {peak} predicted at the peak; {whose} is {limit}"
        if self.is_calibrated and self.predicted_seconds:
            text += f"; about {1 / self.predicted_seconds:.3g} images/s"
        return text


def plan_batches(model: nn.Module, setting: Setting) -> BatchPlan:
    """The fastest strategy and the largest micro-batch that fit, unless they are asked for.

    ``model`` is planned for as it is, in training mode, and gets the strategy.

    Raises:
        ResourceError: Nothing fits.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    device = torch.device(setting.device)
    training = Training(
        setting.resolution,
        setting.precision,
        setting.optimizer,
        ema=setting.ema,
        device=device.type,
    )
    limit = setting.find_limit(model)
    found = search(
        model,
        Request(
            training,
            batch_size=setting.own_batch_size,
            limit_bytes=limit,
            micro_batch=setting.micro_batch,
            strategy=setting.strategy,
            images=setting.own_images,
            find_speed=lambda training: measure_speed(model, training, device, limit),
            may_change=setting.may_change,
            fixed=setting.fixed,
        ),
    )
    plan = BatchPlan(
        setting=replace(setting, precision=found.precision, may_change=(), fixed=()),  # decided now
        strategy=found.strategy,
        stages="",
        micro_batch=found.micro_batch,
        predicted_bytes=found.peak.total,
        limit_bytes=limit,
        predicted_seconds=found.seconds_per_image,
        is_calibrated=found.is_calibrated,
        gamma=found.gamma,
    )
    plan.apply(model)
    return replace(plan, stages=_name_strategies(model))


def _name_strategies(model: nn.Module) -> str:
    """How backward gets the activations of each stage of ``model``."""
    stages: dict[str, list[str]] = {}
    for name, stage in momentum_stages(model).items():
        stages.setdefault(stage.strategy, []).append(name)
    if len(stages) <= 1:
        return next(iter(stages), "store")
    return ", ".join(f"{'+'.join(names)} {strategy}" for strategy, names in stages.items())


def plan_again(plan: BatchPlan, setting: Setting, model: nn.Module) -> BatchPlan:
    """The plan for a run that goes on under ``setting``, if possible with the same micro-batch.

    Strategies give the same values, bit for bit, but BatchNorm sees the micro-batch.
    """
    peak = max(plan.predicted_bytes, plan.measured_bytes or 0)
    if plan.setting == setting and peak <= setting.find_limit(model):
        plan.apply(model)
        return plan
    if setting.micro_batch != "auto" or setting.batch_size != plan.setting.batch_size:
        return plan_batches(model, setting)
    try:
        same = plan_batches(model, replace(setting, micro_batch=plan.micro_batch))
    except ResourceError:
        return plan_batches(model, setting)
    return replace(same, setting=setting)


def plan_together(plan: BatchPlan, model: nn.Module, processes: Processes) -> BatchPlan:
    """``plan`` with the smallest micro-batch of all processes, whose devices may differ.

    Raises:
        ResourceError: A process is gone.
    """
    (negative,) = processes.largest(-plan.micro_batch)
    if -negative == plan.micro_batch:
        return plan
    smaller = plan_batches(model, replace(plan.setting, micro_batch=-negative))
    return replace(smaller, setting=plan.setting)


def warn_of_noise(plan: BatchPlan, model: nn.Module) -> str | None:
    """What to tell if BatchNorm sees only a few images of a batch."""
    fewest = plan.sizes[-1]
    if fewest >= min(FEW, plan.setting.batch) or not has_batch_norm(model):
        return None
    return (
        f"warning: BatchNorm sees only {fewest} of {plan.setting.batch} images at a time, whose "
        "statistics are noise; --freeze-bn keeps the trained ones"
    )


def tell_of_plan(plan: BatchPlan, model: nn.Module, listener: Listener) -> None:
    """How the batch is split, and what to mind."""
    listener.tell(f"note: {plan}")
    device = torch.device(plan.setting.device)
    if plan.setting.precision == "fp32" and device.type == "cuda":
        listener.tell(f"note: fp32 on this GPU is {describe_tf32(device)}")
    if warning := warn_of_noise(plan, model):
        listener.tell(warning)
