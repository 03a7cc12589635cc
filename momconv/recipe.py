"""What a run does, from network to optimiser: a YAML file plus ``key.sub=value`` overrides.

YAML 1.1 reads ``1e-3`` as text and ``no`` as false. Here every scalar but null stays text until
pydantic, which knows the type of the key it belongs to, reads it: ``lr: 1e-3`` is a number and
``name: no`` a name.
"""

import codecs
import difflib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from momconv.errors import UsageError
from momconv.names import NamedPath
from momconv.opening import find_model_file, read_regular
from momconv.units import parse_bytes, parse_duration, parse_path
from momconv.vocabulary import (
    OPTIMIZERS,
    Interpolation,
    MomentumUse,
    Monitor,
    OptimizerName,
    Precision,
    StrategyChoice,
    Velocity,
)
from momconv.words import abridge, find_like, printable, quoted


def _readable_by(parse: Callable[[Any], object]) -> AfterValidator:
    """Return values that ``parse`` can read."""

    def check(text: Any) -> Any:
        try:
            parse(text)
        except UsageError as error:
            raise ValueError(error.message) from None
        return text

    return AfterValidator(check)


def split_channels(value: object) -> object:
    """Return the parts of a text between its commas; a single number is that of all three."""
    parts = value.split(",") if isinstance(value, str) else value
    return parts * 3 if isinstance(parts, list) and len(parts) == 1 else parts


_MOST = 10**9  # of what is counted: more is a slip, and no longer a number to compute with

UnitInterval = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountFromZero = Annotated[int, Field(ge=0, le=_MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Pixels = Annotated[int, Field(ge=16, le=_MOST)]
Memory = Annotated[
    str,
    _readable_by(parse_bytes),
    WithJsonSchema({"description": "an amount of memory like 3GiB"}),
]
Duration = Annotated[
    str,
    _readable_by(parse_duration),
    WithJsonSchema({"description": "a duration like 10min"}),
]
Channels = Annotated[
    tuple[float, float, float],
    BeforeValidator(split_channels),
    WithJsonSchema({"description": "three numbers like 0.5,0.5,0.5"}),
]
PositiveChannels = Annotated[
    tuple[PositiveFloat, PositiveFloat, PositiveFloat],
    BeforeValidator(split_channels),
    WithJsonSchema({"description": "three numbers > 0 like 0.5,0.5,0.5"}),
]
FileOrFolder = Annotated[NamedPath, _readable_by(parse_path), AfterValidator(parse_path)]
NameOrPath = Annotated[
    str,
    _readable_by(parse_path),
    AfterValidator(os.path.expanduser),
    WithJsonSchema({"description": "a name or a path"}),
]

_VARIABLE = "MOMCONV_"  # then section, two underscores and name, in capitals
ANNEAL_FROM = 0.1  # γ where annealing begins: the rule is still close to that of the ResNet


PANELS = (  # of the help of finetune, in their order
    "",
    "Optimisation",
    "What is learnt, and from what",
    "Images",
    "Memory",
    "Momentum",
    "Recipe and run",
)
_OPTIMISATION, _LEARNING, _IMAGES, _MEMORY, _MOMENTUM, _RUN = PANELS[1:]


@dataclass(frozen=True, slots=True)
class Option:
    """An option of ``momconv finetune`` that sets a key; it stands on the key's field.

    Attributes:
        flags: As they are typed: ``--workers -j``, or ``--plots/--no-plots``.
        metavar: What stands for the value; nothing for a switch.
        help: With ``{}`` in place of the default.
        panel: One of the ``PANELS``.
    """

    flags: str
    metavar: str
    help: str
    panel: str = ""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRecipe(_Section):
    """The network to start from."""

    name: Annotated[
        NameOrPath, Option("--model", "NAME", "The network to start from. (default: {})")
    ] = "resnet152"  # or a function that makes it, as model.py:make
    arguments: Annotated[
        list[str],
        Option("--arg", "KEY=VALUE", "An argument of its function; again for more."),
    ] = []
    weights: Annotated[
        NameOrPath,
        Option("--weights", "NAME", "Its weights: a name, a file, or none for random ones."),
    ] = "DEFAULT"
    from_file: Annotated[
        Annotated[FileOrFolder, AfterValidator(find_model_file)] | None,
        Option("--from", "FILE", "A converted network, or a run's folder, to start from instead."),
    ] = None


class MomentumRecipe(_Section):
    """Whether and how its blocks become momentum blocks, and what the backward pass stores.

    Who sets how blocks change wants them to: then ``use`` is "always" unless it is set too.
    """

    use: Annotated[
        MomentumUse,
        Option("--momentum", "WHEN", "{} (where it pays; default), always or never.", _MOMENTUM),
    ] = "auto"  # of a network by its name; one from a file is what it is
    gamma: Annotated[
        UnitInterval,
        Option("--gamma", "G", "0 … 1; 0 is the plain network. (default: {})", _MOMENTUM),
    ] = 0.9
    stages: Literal["auto", "all"] | list[str] = "auto"
    velocity: Velocity = "zero"
    gain: bool = True
    calibrate: Annotated[
        bool,
        Option(
            "--calibrate/--no-calibrate",
            "",
            "First adapt the converted network to its original. (default: {})",
            _MOMENTUM,
        ),
    ] = True  # on the training images
    anneal: NonNegativeFloat = 0  # epochs in which γ rises to ``gamma``
    strategy: Annotated[
        StrategyChoice,
        Option("--strategy", "NAME", "auto (the fastest that fits), store, …", _MEMORY),
    ] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _settle_use(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "use" in given:
            return given
        is_wanted = given.keys() & _OF_MOMENTUM or given.get("strategy") == "momentum"
        return {**given, "use": "always"} if is_wanted else given


class DataRecipe(_Section):
    """The images. A relative path starts at the working directory."""

    path: Annotated[
        FileOrFolder | None,
        Option("--data", "FOLDER", "Images: train/ and val/, or one folder a class."),
    ] = None
    train_dir: Annotated[
        FileOrFolder | None, Option("--train-dir", "FOLDER", "Train on this one instead.", _IMAGES)
    ] = None  # instead of the one below ``path``
    val_dir: Annotated[
        FileOrFolder | None, Option("--val-dir", "FOLDER", "Validate on this one instead.", _IMAGES)
    ] = None
    labels: Annotated[
        FileOrFolder | None,
        Option("--labels", "FILE", "Classes from a CSV: columns file and label.", _IMAGES),
    ] = None  # instead of folders
    unknown_classes: Annotated[
        Literal["error", "skip"],
        Option(
            "--unknown-classes", "WHAT", "Classes only in val/: {} (default), or skip.", _IMAGES
        ),
    ] = "error"  # of validation, which training lacks
    strict: Annotated[
        bool, Option("--strict", "", "Take any warning about the images for an error.", _IMAGES)
    ] = False  # whether a warning about the images is an error
    resolution: Annotated[
        Pixels | None,
        Option("--resolution", "PIXELS", "Side of the images in the network.", _OPTIMISATION),
    ] = None  # None: what the weights were made for
    resize: Annotated[
        Pixels | None,
        Option("--resize", "PIXELS", "Shorter side before the centre crop.", _IMAGES),
    ] = None  # None: as the network says, like the following; in proportion to ``resolution``
    crop: Annotated[
        Fraction | Pixels | None,
        Option("--crop", "F", "Share of that which the crop keeps, as 0.875; or pixels.", _IMAGES),
    ] = None  # instead of ``resize``, or of ``resolution``
    mean: Annotated[
        Channels | None,
        Option("--mean", "R,G,B", "Subtracted from colours of 0 to 1.", _IMAGES),
    ] = None
    std: Annotated[
        PositiveChannels | None, Option("--std", "R,G,B", "What they are divided by then.", _IMAGES)
    ] = None
    interpolation: Annotated[
        Interpolation | None,
        Option("--interpolation", "NAME", "Of the resizing: bilinear, bicubic, …", _IMAGES),
    ] = None
    limit: Annotated[
        Fraction, Option("--limit", "F", "Only that part of each class, for a try.", _IMAGES)
    ] = 1  # of the images of each class, for a try
    max_images: Annotated[int, Field(ge=2, le=_MOST)] | None = None  # of each split, for the same
    val_frac: Annotated[
        BelowOne,
        Option("--val-frac", "F", "Held out where there is no val/. (default: {})", _IMAGES),
    ] = 0.2
    split_seed: Seed = 0
    max_bad_fraction: Annotated[
        UnitInterval,
        Option("--max-bad-fraction", "F", "Of unreadable images, left out. (default: {})", _IMAGES),
    ] = 0.05
    workers: Annotated[
        CountFromZero | Literal["auto"],
        Option("--workers -j", "N", "Processes that read images. (default: {})", _IMAGES),
    ] = "auto"
    balance: Annotated[
        Literal["none", "loss", "sampler"],
        Option(
            "--balance", "HOW", "none, loss or sampler, for classes of unequal size.", _LEARNING
        ),
    ] = "none"  # against classes of unequal size
    augment: Annotated[
        Literal["none", "light", "trivial", "randaug"],
        Option("--augment", "LEVEL", "none, {} (default), trivial or randaug.", _LEARNING),
    ] = "light"
    flip: Annotated[
        bool,
        Option(
            "--hflip/--no-hflip",
            "",
            "Mirror images, but not digits or text. (default: {})",
            _LEARNING,
        ),
    ] = True  # mirrored half of the time; never with augment: none


class TrainRecipe(_Section):
    """The optimisation. Memory decides the micro-batch, never the batch."""

    epochs: Annotated[
        Count, Option("--epochs", "N", "Passes over the images. (default: {})", _OPTIMISATION)
    ] = 10
    batch_size: Annotated[
        Count,
        Option("--batch-size", "N", "Images of an optimisation step. (default: {})", _OPTIMISATION),
    ] = 32
    micro_batch: Annotated[
        Count | Literal["auto"],
        Option("--micro-batch", "N", "Images in the network at once. (default: {})", _MEMORY),
    ] = "auto"
    optimizer: Annotated[
        OptimizerName,
        Option(
            "--optimizer", "NAME", "{} (default), adamw, sgd-8bit or adamw-8bit.", _OPTIMISATION
        ),
    ] = "sgd"
    lr: Annotated[
        PositiveFloat | Literal["auto"] | None,
        Option("--lr", "RATE", "Highest learning rate, or auto to look for one.", _OPTIMISATION),
    ] = None  # auto: looked for; None: see resolved_lr
    head_lr: PositiveFloat | None = None  # of the head; None: the same
    layer_decay: Annotated[
        Fraction,
        Option("--layer-decay", "F", "Of the rate from stage to stage. (default: {})", _LEARNING),
    ] = 1  # factor of the rate from each stage to the one below it
    schedule: Literal["cosine", "constant", "onecycle"] = "cosine"  # after the warm-up
    momentum: BelowOne = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    ema: Annotated[
        BelowOne, Option("--ema", "DECAY", "Average the weights, such as with 0.999.", _LEARNING)
    ] = 0  # decay of an average of the weights, which is then the result; 0: none
    warmup_epochs: NonNegativeFloat = 1
    label_smoothing: BelowOne = 0.1
    mixup: Annotated[
        NonNegativeFloat,
        Option("--mixup", "ALPHA", "Blend pairs of images, such as with 0.2.", _LEARNING),
    ] = 0  # α of the Beta distribution; 0.2 is usual
    cutmix: NonNegativeFloat = 0  # the same; 1 is usual
    clip: PositiveFloat | None = None  # the largest norm of the gradient
    monitor: Annotated[
        Monitor, Option("--monitor", "FIGURE", "{} (default), val/macro_f1 or val/loss.", _LEARNING)
    ] = "val/top1"  # which figure of the held-out images says what is best
    patience: Annotated[
        Count | None,
        Option("--patience", "N", "Stop after N epochs without a better figure.", _LEARNING),
    ] = None  # epochs without a better one after which to stop
    min_delta: NonNegativeFloat = 0  # what counts as better; of top-1 and F1, a fraction
    precision: Annotated[
        Literal["auto", Precision],
        Option("--precision", "NAME", "auto, fp32, bf16 or fp16 (on GPUs).", _MEMORY),
    ] = "auto"
    channels_last: Annotated[
        bool,
        Option(
            "--channels-last/--no-channels-last",
            "",
            "Lay images out by pixel, mostly faster. (default: {})",
            _MEMORY,
        ),
    ] = True  # otherwise by channel
    compile: bool = False  # the residual blocks, by torch.compile
    deterministic: bool = False  # algorithms that repeat their results on a GPU
    seed: Annotated[
        Seed, Option("--seed", "N", "Of the order, augmentation and head.", _OPTIMISATION)
    ] = 0
    memory: Annotated[
        Memory | None,
        Option("--memory", "AMOUNT", "Limit, such as 3GiB. (default: what is free)", _MEMORY),
    ] = None
    headroom: Annotated[
        BelowOne,
        Option("--headroom", "F", "Of what is free, kept back without --memory. ({})", _MEMORY),
    ] = 0.1  # of the free memory, kept back where ``memory`` is not given
    release_gradients: bool | Literal["auto"] = "auto"  # use and free each in the backward pass
    may_change: list[Literal["gamma", "precision", "optimizer"]] = []  # by the plan
    device: Annotated[str, Option("--device", "NAME", "auto, cpu, cuda or cuda:1.", _MEMORY)] = (
        "auto"
    )
    freeze: Annotated[
        list[str],
        Option(
            "--freeze", "STAGE", "Keep stem, layer1, … or all-but-head; may be repeated.", _LEARNING
        ),
    ] = []  # stages that stay as they are: stem, layer1, …, or all-but-head
    freeze_epochs: Annotated[
        CountFromZero,
        Option("--freeze-epochs", "N", "At first, only the head learns. (default: {})", _LEARNING),
    ] = 0  # first, in which only the head learns
    probe: Annotated[
        bool,
        Option("--probe", "", "Also score a linear head on frozen features, first.", _LEARNING),
    ] = False  # a linear head on frozen features is scored first, to compare with
    save_every: Annotated[
        Count | Duration,
        Option("--save-every", "TIME", "Steps or time between states. (default: {})", _RUN),
    ] = "10min"  # steps or time, inside an epoch; its end always
    keep: Annotated[
        Annotated[int, Field(ge=0, le=2)],
        Option("--keep", "N", "States kept once it is done, to train on. (default: {})", _RUN),
    ] = 2  # 2: also the one before, should the last be damaged
    time_limit: Annotated[
        Duration | None,
        Option("--time-limit", "TIME", "Such as 2h: then save and stop, to be resumed.", _RUN),
    ] = None  # after which a process stops, to be resumed
    freeze_bn: Annotated[
        bool,
        Option("--freeze-bn", "", "Keep BatchNorm as it is, for small micro-batches.", _MEMORY),
    ] = False  # BatchNorm keeps its statistics and weights
    sync_bn: Annotated[
        bool,
        Option("--sync-bn", "", "Let BatchNorm see the images of all processes; on GPUs.", _MEMORY),
    ] = False  # BatchNorm sees a micro-batch of all processes
    shard: Annotated[
        bool | Literal["auto"],
        Option(
            "--shard",
            "auto|true|false",
            "Divide weights, gradients and optimiser state among processes. (default: {})",
            _MEMORY,
        ),
    ] = "auto"  # weights, gradients and optimiser state are divided among the processes

    @property
    def can_shard(self) -> bool:
        """Whether nothing is asked for that is not divided among processes."""
        return not self._find_undivided()

    def _find_undivided(self) -> dict[str, str]:
        """Return what asks for whole weights, gradients or states, and what does not."""
        own = {
            f"--optimizer {self.optimizer}, whose blocks of values have one scale": (
                OPTIMIZERS[self.optimizer].bits == 8,
                f"--optimizer {self.optimizer.removesuffix('-8bit')}",
            ),
            "train.release_gradients, as they are freed in backward anyway": (
                self.release_gradients is True,
                "--set train.release_gradients=auto",
            ),
            "train.compile, as weights come and go around each block": (
                self.compile,
                "--set train.compile=false",
            ),
        }
        return {name: fix for name, (is_asked, fix) in own.items() if is_asked}

    @model_validator(mode="after")
    def _check_shard(self) -> Self:
        undivided = self._find_undivided()
        if self.shard is not True or not undivided:
            return self
        name, fix = next(iter(undivided.items()))
        raise UsageError(
            f"--shard true does not go with {name}",
            kind="usage.conflict",
            fix=f"{fix}\n--shard false",
        )

    @property
    def can_release_gradients(self) -> bool:
        """Whether nothing asks for all gradients at once; in fp16, the scale of the loss does."""
        undivided = self.micro_batch == "auto" or self.micro_batch > self.batch_size
        return undivided and self.clip is None and self.precision != "fp16"

    @model_validator(mode="after")
    def _check_release(self) -> Self:
        if self.release_gradients is not True or self.can_release_gradients:
            return self
        raise UsageError(
            "train.release_gradients needs the whole batch at once, and neither the norm of all "
            "gradients (train.clip) nor fp16, which looks at all of them",
            kind="usage.conflict",
            fix="--set train.release_gradients=auto",
        )

    @property
    def resolved_lr(self) -> float:
        """``lr``, or the default of the optimiser for the batch.

        The default also stands for "auto" until a rate is found.
        """
        if isinstance(self.lr, float):
            return self.lr
        return OPTIMIZERS[self.optimizer].default_rate(self.batch_size)


class LogRecipe(_Section):
    """What is written down besides metrics.csv and events.jsonl."""

    tensorboard: Annotated[
        bool, Option("--tensorboard", "", "Write the numbers for TensorBoard too.", _RUN)
    ] = False
    plots: Annotated[
        bool,
        Option("--plots/--no-plots", "", "Draw curves, confusion and more. (default: {})", _RUN),
    ] = True


_OF_MOMENTUM = {"gamma", "stages", "velocity", "gain", "anneal"}  # keys of that section
PATHS = ("path", "train_dir", "val_dir", "labels")  # of the images


class Recipe(_Section):
    """All that a run depends on besides the images and the weights themselves."""

    model: ModelRecipe = ModelRecipe()
    momentum: MomentumRecipe = MomentumRecipe()
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    log: LogRecipe = LogRecipe()

    def change(self, **sections: Mapping[str, Any]) -> Self:
        """Return a copy in which fields of the sections have other values, which are not validated.

        >>> Recipe().change(train={"epochs": 2}, data={"workers": 0}).train.epochs
        2
        """
        changed = {name: getattr(self, name).model_copy(update=v) for name, v in sections.items()}
        return self.model_copy(update=changed)

    def with_absolute_paths(self) -> Self:
        """Return the recipe as it must be to be replayed from another working directory."""
        data = {name: getattr(self.data, name) for name in PATHS}
        return self.change(
            data={name: folder and folder.absolute() for name, folder in data.items()},
            model={"from_file": self.model.from_file and self.model.from_file.absolute()},
        )

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.model.from_file is None:
            return self
        default = MomentumRecipe()
        for name in ("gamma", "stages", "velocity", "gain"):
            value, allowed = getattr(self.momentum, name), getattr(default, name)
            if value != allowed:
                raise UsageError(
                    f"momentum.{name} is {quoted(value)}, "
                    "but the network in model.from_file is converted",
                    kind="usage.conflict",
                    fix=f"--set momentum.{name}={str(allowed).lower()}",
                )
        return self

    @model_validator(mode="after")
    def _check_annealing(self) -> Self:
        if not self.momentum.anneal:
            return self
        gamma, epochs = self.momentum.gamma, self.train.epochs
        if self.model.from_file is not None:
            raise _cannot_anneal("the network in model.from_file has its γ already")
        if gamma <= ANNEAL_FROM:
            raise _cannot_anneal(f"γ rises from {ANNEAL_FROM}, and momentum.gamma is {gamma:g}")
        if self.momentum.anneal > epochs:
            raise _cannot_anneal(
                f"{self.momentum.anneal:g} epochs are more than train.epochs, which is {epochs}"
            )
        return self


SECTIONS: dict[str, type[_Section]] = {name: type(section) for name, section in Recipe()}
KEYS = [f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields]


def load_recipe(
    path: Path | None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    options: Mapping[str, object] = MappingProxyType({}),
) -> Recipe:
    """Return the recipe in the YAML file ``path`` (or the defaults), changed by ``overrides``.

    Between the two stand variables of the ``environment`` such as ``MOMCONV_TRAIN__LR``, and then
    ``options``, which are values by key that are not YAML.

    >>> load_recipe(None, ["train.lr=1e-3", "momentum.stages=[layer3]"]).train.lr
    0.001

    Raises:
        UsageError: the file is missing or is not YAML; a key is unknown; a value is not allowed; a
            function of the user's is named in the file and not in ``overrides``.
    """
    settings = {} if path is None else _read_file(path)
    given = _read_environment(environment)
    given |= {key: _Setting(key, value, where="") for key, value in options.items()}
    for override in overrides:
        given |= _read_override(override)
    recipe = _validate(settings | given)
    _refuse_code(settings, given)
    return recipe


def shorten(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with all its parts, but two steps to train and images for two to validate.

    >>> shorten(load_recipe(None, ["train.batch_size=8", "train.epochs=90"])).data.max_images
    16
    """
    return recipe.change(
        momentum={"anneal": min(1, recipe.momentum.anneal)},
        data={"max_images": 2 * recipe.train.batch_size},
        train={"epochs": 1, "freeze_epochs": 0, "time_limit": None},
    )


def recall_recipe(path: Path) -> Recipe:
    """Return the recipe that :func:`dump_recipe` wrote, to be read and not to be run."""
    return _validate(_read_file(path))


def _validate(settings: dict[str, "_Setting"]) -> Recipe:
    sections: dict[str, dict[str, object]] = {}
    for setting in settings.values():
        _check_key(setting)
        section, _, name = setting.key.partition(".")
        sections.setdefault(section, {})[name] = setting.value
    try:
        return Recipe.model_validate(sections)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        section, name = map(str, first["loc"][:2])
        most = f" up to {_MOST}" if first.get("ctx") == {"le": _MOST} else ""
        raise _bad_value(settings[f"{section}.{name}"], most) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML with every default, from which an equal one is read."""
    document = recipe.model_dump(mode="json")
    return yaml.safe_dump(document, sort_keys=False)  # in ASCII: PyYAML leaves a raw NEL unquoted


@dataclass(frozen=True, slots=True)
class _Setting:
    key: str  # "train.epochs"
    value: object
    where: str  # "recipe.yaml:3: ", "MOMCONV_TRAIN__LR: ", or nothing for an override


def _refuse_code(settings: dict[str, _Setting], given: dict[str, _Setting]) -> None:
    """Do nothing if the file's ``settings`` name no function that the user has not ``given``."""
    name, arguments = (
        None if key in given else settings.get(key) for key in ("model.name", "model.arguments")
    )
    options = ["--network", str(name.value)] if name and names_code(str(name.value)) else []
    if arguments and isinstance(arguments.value, list):
        options += [word for text in arguments.value for word in ("--arg", text)]
    found = name if name and options[:1] == ["--network"] else arguments
    if options and found:
        raise UsageError(
            f"{found.where}{found.key} is of a network of your own\n"
            "momconv runs no code because of what a file says: name the function again",
            kind="usage.own_network",
            fix=shlex.join(options),
        )


def names_code(network: str) -> bool:
    """Return whether ``network`` is the name of a function of the user's."""
    return ":" in network and not network.startswith("timm:")


_YAML = "tag:yaml.org,2002:"
_NULL, _STR, _MAP, _SEQ = (f"{_YAML}{kind}" for kind in ("null", "str", "map", "seq"))
# Tags that say of a text what it has to be. How it is read is still up to its key.
_KINDS = {f"{_YAML}{kind.__name__}": TypeAdapter[object](kind) for kind in (bool, float, int)}


class _TextLoader(yaml.SafeLoader):
    """Resolves null and nothing else: see the head of this module."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and the type are PyYAML's)
        first: [resolver for resolver in resolvers if resolver[0] == _NULL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_text(self, node: yaml.ScalarNode) -> str | None:
        """Return the text of a scalar, if it is what its tag says, or ``None``."""
        text: str = self.construct_scalar(node)
        implicit = self.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if node.tag == _NULL == implicit:
            return None
        try:
            _KINDS[node.tag].validate_python(text)
        except (KeyError, ValidationError):
            raise _wrong(node, f"{quoted(text)} is not {node.tag.replace(_YAML, '!!')}") from None
        return text

    def refuse(self, node: yaml.Node) -> Any:
        """Raise an error: neither pydantic nor a person expects such values in a recipe."""
        raise _wrong(node, f"no key has a value of {abridge(node.tag.replace(_YAML, '!!'), 80)}")

    yaml_constructors = {  # noqa: RUF012
        **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (_STR, _MAP, _SEQ)},
        **dict.fromkeys([_NULL, *_KINDS], construct_text),
        None: refuse,
    }


def _wrong(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _read_file(path: Path) -> dict[str, _Setting]:
    try:
        text = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except OSError as error:
        problem = f"cannot read recipe {path}: {error.strerror}"
        raise UsageError(problem, kind="usage.unreadable_recipe") from None
    return _parse(_decode(text, path), source=str(path))


def _decode(data: bytes, path: Path) -> str:
    """Return the text in a file, in UTF-8 or, with a mark at its beginning, in UTF-16."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problem = f"{path}:{line}: not valid YAML: {error.reason}"
        raise UsageError(problem, kind="usage.bad_yaml") from None


def _read_override(override: str) -> dict[str, _Setting]:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise UsageError(
            f"{quoted(override)} does not set anything",
            kind="usage.bad_override",
            fix="--set train.epochs=5",
        )
    return _parse(text, source="", key=key)


def _read_environment(environment: Mapping[str, str]) -> dict[str, _Setting]:
    """Return what the variables that are named after keys say, as ``MOMCONV_TRAIN__LR``."""
    found: dict[str, _Setting] = {}
    for name, text in environment.items():
        if not name.startswith(_VARIABLE):
            continue
        section, mark, key = name.removeprefix(_VARIABLE).lower().partition("__")
        if not mark:
            _require_no_key(name, text)
        else:
            for setting in _parse(text, source="", key=f"{section}.{key}").values():
                found[setting.key] = replace(setting, where=f"{name}: ")
    return found


def _require_no_key(name: str, text: str) -> None:
    """Refuse a variable that has one underscore where two were meant."""
    section, _, key = name.removeprefix(_VARIABLE).lower().partition("_")
    if f"{section}.{key}" in KEYS:
        raise UsageError(
            f"{name} sets nothing: between section and key stand two underscores",
            kind="usage.bad_variable",
            fix=f"{_VARIABLE}{section}__{key}".upper() + f"={shlex.quote(text)}",
        )


def _parse(text: str, source: str, key: str = "") -> dict[str, _Setting]:
    """Return the settings in the YAML document ``text``, or in the value of ``key`` that it is."""
    settings: dict[str, _Setting] = {}
    try:
        loader = _TextLoader(text)
        for setting in _walk_document(loader, source, key):
            if setting.key in settings:
                problem = f"{setting.where}{setting.key} is given twice"
                raise UsageError(problem, kind="usage.duplicate_key")
            settings[setting.key] = setting
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _not_yaml(f"character {quoted(chr(error.character))}", line, source, key) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = error.problem or str(error)
        raise _not_yaml(problem, mark.line + 1 if mark else 1, source, key) from None
    except RecursionError:
        raise _not_yaml("nested too deeply", loader.line + 1, source, key) from None
    return settings


def _walk_document(loader: _TextLoader, source: str, key: str) -> Iterator[_Setting]:
    root = loader.get_single_node()
    if key:
        value = root or yaml.ScalarNode(_NULL, "")
        root = yaml.MappingNode(_MAP, [(yaml.ScalarNode(_STR, key), value)])
    if isinstance(root, yaml.MappingNode):
        yield from _walk(loader, root, source)
    elif root is not None and loader.construct_object(root, deep=True) is not None:
        problem = f"{source} is not a recipe: it has none of {', '.join(SECTIONS)}"
        raise UsageError(problem, kind="usage.bad_recipe")


def _walk(
    loader: _TextLoader, mapping: yaml.MappingNode, source: str, section: str = ""
) -> Iterator[_Setting]:
    if mapping.tag != _MAP:
        loader.construct_object(mapping)  # which refuses it
    for key_node, value in mapping.value:
        name = loader.construct_object(key_node, deep=True)
        key = f"{section}{name if isinstance(name, str) else quoted(name)}"
        if isinstance(value, yaml.MappingNode) and "." not in key:
            yield from _walk(loader, value, source, f"{key}.")
        elif not (key in SECTIONS and value.tag == _NULL):  # a section may be empty
            where = f"{source}:{key_node.start_mark.line + 1}: " if source else ""
            yield _Setting(key, loader.construct_object(value, deep=True), where)


def _check_key(setting: _Setting) -> None:
    if setting.key in KEYS:
        return
    key = abridge(printable(setting.key), 80)
    if setting.key in SECTIONS:
        problem = f"{setting.where}{key} is a section, not a value"
        hint = f"\nits keys: {', '.join(SECTIONS[setting.key].model_fields)}"
    else:
        problem = f"{setting.where}unknown key {key}"
        nearest = _nearest_key(setting.key)
        hint = f" — did you mean {nearest}?" if nearest else f"\nsections: {', '.join(SECTIONS)}"
    raise UsageError(problem + hint, kind="usage.unknown_key")


def _nearest_key(key: str) -> str | None:
    """Return the known key most like ``key``, or like it in the part behind the section."""
    nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
    if nearest:
        return nearest[0]
    by_name = {known.partition(".")[2]: known for known in KEYS}
    names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
    return by_name[names[0]] if names else None


def _bad_value(setting: _Setting, most: str) -> UsageError:
    section, _, name = setting.key.partition(".")
    value = "null" if setting.value is None else quoted(setting.value)
    field = SECTIONS[section].model_json_schema()["properties"][name]
    problem = f"{setting.where}{setting.key}: {value} is not {_allowed(field)}{most}"
    return UsageError(problem, kind="usage.bad_value")


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "path": "a path",
    "array": "a list of names",
    "null": "null",
}


def _allowed(schema: dict[str, Any]) -> str:
    """Return what a JSON schema allows, in words.

    >>> _allowed({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]})
    'an integer ≥ 1 or auto'
    """
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(schema["enum"])
    noun = schema.get("description") or schema.get("const")
    noun = noun or _NOUNS[schema.get("format", schema["type"])]
    bounds = [
        f"{sign} {schema[name]:.10g}"
        for name, sign in _BOUNDS.items()
        if schema.get(name, _MOST) != _MOST
    ]
    return " ".join([noun, " and ".join(bounds)]).rstrip()


def _cannot_anneal(reason: str) -> UsageError:
    return UsageError(
        f"momentum.anneal: {reason}", kind="usage.bad_annealing", fix="--set momentum.anneal=0"
    )


def _not_yaml(problem: str, line: int, source: str, key: str) -> UsageError:
    where = f"{source}:{line}" if source else abridge(printable(key), 80)
    return UsageError(f"{where}: not valid YAML: {problem}", kind="usage.bad_yaml")


def _missing(path: Path) -> UsageError:
    """Return the error for a recipe that does not exist, with the file or folder most like it."""
    like = find_like(path)
    return UsageError(
        f"recipe does not exist: {path}",
        kind="usage.no_recipe",
        fix=f"closest existing path is {like}" if like else None,
    )
