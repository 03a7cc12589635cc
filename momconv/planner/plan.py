"""What a plan is asked for, and the plan itself."""

import json
import math
from collections.abc import Set as AbstractSet
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from momconv.errors import ModelFileError
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.allowance import held_bytes
from momconv.planner.devices import find_device
from momconv.planner.measurement import available_bytes
from momconv.planner.micro_batch import StaticBytes, count_steps, largest_part, split_evenly
from momconv.planner.prediction import PeakMemory, Training
from momconv.units import format_bytes, parse_bytes
from momconv.vocabulary import OPTIMIZERS, Precision, Strategies, StrategyChoice

Change = Literal["gamma", "precision", "optimizer", "release_gradients"]
Fixed = Literal["gamma", "resolution", "freeze", "optimizer", "release_gradients"]
Network = Literal["plain", "momentum"]
_OF_FORWARD = 0.3  # of a step's time: what its forward pass takes


@dataclass(frozen=True, slots=True)
class Request(Training):
    """What a step is, and what is to be planned for it.

    Attributes:
        batch_size: Images of an optimisation step.
        images: Of an epoch, whose last batch may be larger by one; None: one batch.
        held_out: Images on which each epoch is validated.
        epochs: Of the run.
        micro_batch: A number to keep to, or "auto".
        strategy: One to keep to, or "auto" for the fastest that fits.
        memory: For everything, what is loaded already included: bytes, or text like "3GiB"; None:
            what is free.
        headroom: The share of what is free that is kept back.
        processes: Among which a batch is divided.
        sharers: Of the processes, those that share the device.
        may_change: What may be changed to be faster.
        fixed: What cannot be changed by who reads of a plan that does not fit.
    """

    _: KW_ONLY
    batch_size: int
    images: int | None = None
    micro_batch: int | Literal["auto"] = "auto"
    strategy: StrategyChoice = "auto"
    memory: int | str | None = None
    headroom: float = 0.1
    processes: int = 1
    sharers: int = 1
    may_change: tuple[Change, ...] = ()
    fixed: tuple[Fixed, ...] = field(default=(), compare=False)
    held_out: int = field(default=0, compare=False)
    epochs: int = field(default=1, compare=False)

    def static_bytes(
        self, model: nn.Module, unused: AbstractSet[Tensor] = frozenset()
    ) -> StaticBytes:
        """As ``Training`` does; several processes reserve the gradients of all that learns."""
        static = Training.static_bytes(self, model, unused)
        if self.processes == 1 or self.shards > 1:
            return static
        return replace(static, gradients=Training.static_bytes(self, model).gradients)

    @property
    def batch(self) -> int:
        """The images of a full batch."""
        return min(self.batch_size, self.images or self.batch_size)

    @property
    def share_size(self) -> int:
        """The largest share of a batch that a process gets, if its epoch has so many images."""
        return math.ceil(self.batch_size / self.processes)

    @property
    def share_images(self) -> int:
        """As many images as make an epoch of such shares."""
        images = self.images or self.batch_size
        others = count_steps(images, self.batch_size) - 1
        last = images - others * self.batch_size
        return others * self.share_size + math.ceil(last / self.processes)

    @property
    def share(self) -> int:
        """The images of a process's share of a full batch."""
        return min(self.share_size, self.share_images)

    @property
    def sizes(self) -> list[int]:
        """The micro-batches to consider, evenly filled, the largest first.

        Released gradients do not add up, so a batch is one, also the last one of an epoch.
        """
        if self.release_gradients:
            return [self.largest_part(self.share_size + 1)]
        if self.micro_batch != "auto":
            return [min(self.micro_batch, self.share)]
        evenly = {split_evenly(self.share, size)[0] for size in range(1, self.share + 1)}
        return sorted(evenly, reverse=True)

    def largest_part(self, micro_batch: int) -> int:
        """Return the images that go through the network at once, at most."""
        return largest_part(self.share_images, self.share_size, micro_batch)

    def count_seconds(self, seconds_per_image: float) -> float:
        """Return the time of an epoch, with validation, in which there is no backward pass."""
        validated = math.ceil(self.held_out / self.processes) * _OF_FORWARD
        return (self.share_images + validated) * seconds_per_image

    def find_limit(self, model: nn.Module) -> int:
        """Return the bytes for everything, the loaded ``model`` included."""
        if self.memory is None:
            device = find_device(self.device)
            free = available_bytes(device, self.headroom)
            return free // self.sharers + held_bytes(model, device)
        return parse_bytes(self.memory) if isinstance(self.memory, str) else self.memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A way to train that was considered.

    Attributes:
        network: The plain one, or its momentum network.
        is_stored: Whether all activations are, or some are computed again.
        micro_batch: The images that go through it at once.
        predicted_bytes: At the peak of a step.
        seconds_per_image: The time of a step, about.
        fits: Whether that is within the limit.
    """

    network: Network
    is_stored: bool
    micro_batch: int
    predicted_bytes: int
    seconds_per_image: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a batch goes through a network within a limit of memory.

    On a GPU the prediction has the CUDA context and libraries in it, which the measurement, the
    allocator's, has not.

    Attributes:
        request: What was asked for, with the precision, the optimiser and the release of gradients
            that were decided on.
        strategy: For ``momconv.set_strategy``: one for all stages, or each stage's by its name;
            "store" if the model has nothing to set.
        stages: What that means for each stage of a model that has the strategy.
        micro_batch: The most images that go through the network at once.
        predicted_bytes: At the peak of a step with the largest micro-batch of an epoch.
        peak: What is alive there; None in a plan from a file.
        limit_bytes: The limit.
        gamma: A larger one for the model's momentum stages, if that was allowed and needed.
        seconds_per_image: The time of a step, about; see cost.py.
        is_calibrated: Whether that comes from steps that were measured on the device.
        measured_bytes: As ``predicted_bytes``, in the first step of a run.
        measured_static_bytes: What of that the first step held whatever the batch is.
        measured_seconds: As ``seconds_per_image``, in its first epoch.
        alternatives: What was considered, if there was a choice of networks.
        reason: Why this one was chosen.
    """

    request: Annotated[Request, Field(alias="setting")]
    strategy: Strategies
    stages: str = ""
    micro_batch: int
    predicted_bytes: int
    peak: Annotated[PeakMemory | None, Field(exclude=True)] = field(default=None, compare=False)
    limit_bytes: int
    gamma: float | None = None
    seconds_per_image: Annotated[float | None, Field(alias="predicted_seconds")] = None
    is_calibrated: bool = False
    measured_bytes: int | None = None
    measured_static_bytes: StaticBytes | None = None
    measured_seconds: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    reason: str = ""

    @property
    def epoch_seconds(self) -> float | None:
        """The time of an epoch, about; None if that of an image is not known."""
        if self.seconds_per_image is None:
            return None
        return self.request.count_seconds(self.seconds_per_image)

    @property
    def precision(self) -> Precision:
        """The one that was asked for, unless it was allowed to change."""
        return self.request.precision

    @property
    def batch_size(self) -> int:
        """Images of an optimisation step."""
        return self.request.batch

    @property
    def sizes(self) -> tuple[int, ...]:
        """The images of each micro-batch of a process's share of a full batch."""
        return split_evenly(self.request.share, self.micro_batch)

    @property
    def is_exceeded(self) -> bool:
        """Whether the measured peak is above the limit."""
        return self.measured_bytes is not None and self.measured_bytes > self.limit_bytes

    def apply(self, model: nn.Module) -> None:
        """Give the stages of ``model`` the chosen strategy."""
        if momentum_stages(model):
            set_strategy(model, self.strategy)

    def halve(self, *, fewest: int) -> Self | None:
        """Return the plan after ``micro_batch`` images did not fit.

        None where parts of at least ``fewest`` images cannot be smaller.
        """
        smaller, largest = max(fewest, self.micro_batch // 2), self.request.largest_part
        if largest(smaller) >= largest(self.micro_batch):
            return None
        return replace(
            self,
            request=replace(self.request, release_gradients=False),  # they have to add up now
            micro_batch=smaller,
            measured_bytes=None,
            measured_static_bytes=None,
            seconds_per_image=None,
            measured_seconds=None,
        )

    def to_json(self) -> str:
        """Return the plan as a JSON document, with the sizes."""
        document = _schema().dump_python(self, mode="json", by_alias=True)
        seconds = self.epoch_seconds
        more = {
            "sizes": self.sizes,
            "seconds_per_epoch": seconds,
            "seconds": seconds and seconds * self.request.epochs,
        }
        return json.dumps(document | more, indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Plan":
        """Return the plan that ``to_json`` wrote, without what is alive at its peak.

        Raises:
            ModelFileError: ``text`` is no plan.
        """
        try:
            return _schema().validate_json(text)
        except ValidationError as error:
            problem = f"plan.json: {error.errors()[0]['msg']}"
            raise ModelFileError(
                f"{problem}\nwithout it, it is planned anew", kind="run.bad_plan"
            ) from error

    def __str__(self) -> str:
        sizes, request = self.sizes, self.request
        parts = f"{len(sizes)} micro-batches of {sizes[0]}" if len(sizes) > 1 else "one micro-batch"
        if sizes[-1] < sizes[0]:
            parts += f" or {sizes[-1]}"
        whose = f" over {request.processes} processes, each" if request.processes > 1 else ""
        how = [self.stages, self.precision]
        how += [request.optimizer] if OPTIMIZERS[request.optimizer].bits == 8 else []
        how += ["gradients released"] if request.release_gradients else []
        how += ["weights divided"] if request.shards > 1 else []
        text = f"batch of {request.batch}{whose} in {parts} ({', '.join(how)})"
        peak, limit = format_bytes(self.predicted_bytes), format_bytes(self.limit_bytes)
        whose = "the limit" if request.memory else "what is free"
        text = f"{text}, {peak} predicted at the peak; {whose} is {limit}"
        if self.is_calibrated and self.seconds_per_image:
            speed = 1 / self.seconds_per_image
            text += f"; about {speed:{',.0f' if speed >= 100 else '.3g'}} images/s"
        return text


@cache
def _schema() -> TypeAdapter[Plan]:
    """Return how a plan is written and read, which takes longer to make than to use."""
    return TypeAdapter(Plan)
