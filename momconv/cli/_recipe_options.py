"""The options of ``momconv finetune`` that set a key of the recipe."""

from typing import Annotated

import typer

_IMAGES, _OPTIMISATION, _MEMORY = "Images", "Optimisation", "Memory"
MOMENTUM, RUN = "Momentum", "Recipe and run"
_LEARNING = "What is learnt, and from what"

# What each of them sets, by its name in the program.
KEYS = {
    "data": "data.path",
    "model": "model.name",
    "network": "model.name",
    "arg": "model.arguments",
    "from_file": "model.from_file",
    "weights": "model.weights",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "resolution": "data.resolution",
    "memory": "train.memory",
    "micro_batch": "train.micro_batch",
    "freeze_bn": "train.freeze_bn",
    "sync_bn": "train.sync_bn",
    "tensorboard": "log.tensorboard",
    "plots": "log.plots",
    "gamma": "momentum.gamma",
    "strategy": "momentum.strategy",
    "seed": "train.seed",
    "freeze": "train.freeze",
    "freeze_epochs": "train.freeze_epochs",
    "layer_decay": "train.layer_decay",
    "ema": "train.ema",
    "monitor": "train.monitor",
    "patience": "train.patience",
    "augment": "data.augment",
    "hflip": "data.flip",
    "mixup": "train.mixup",
    "balance": "data.balance",
    "train_dir": "data.train_dir",
    "val_dir": "data.val_dir",
    "unknown_classes": "data.unknown_classes",
    "strict": "data.strict",
    "limit": "data.limit",
    "val_frac": "data.val_frac",
    "max_bad_fraction": "data.max_bad_fraction",
    "precision": "train.precision",
    "device": "train.device",
    "time_limit": "train.time_limit",
    "workers": "data.workers",
}


def _option(
    name: str, metavar: str, help_: str, panel: str | None = None
) -> typer.models.OptionInfo:
    """An option that sets a key of the recipe, whose type decides what is allowed."""
    option: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, help=help_, rich_help_panel=panel, show_default=False
    )
    return option


Data = Annotated[
    str | None, _option("--data", "FOLDER", "Images: train/ and val/, or one folder a class.")
]
Model = Annotated[
    str | None, _option("--model", "NAME", "The network to start from. (default: resnet152)")
]
FromFile = Annotated[
    str | None, _option("--from", "FILE", "A converted network to start from instead.")
]
Weights = Annotated[
    str | None,
    _option("--weights", "NAME", "Its weights: a name, a file, or none for random ones."),
]
Epochs = Annotated[
    str | None, _option("--epochs", "N", "Passes over the images. (default: 10)", _OPTIMISATION)
]
BatchSize = Annotated[
    str | None,
    _option("--batch-size", "N", "Images of an optimisation step. (default: 32)", _OPTIMISATION),
]
Lr = Annotated[
    str | None,
    _option("--lr", "RATE", "Highest learning rate, or auto to look for one.", _OPTIMISATION),
]
Resolution = Annotated[
    str | None,
    _option("--resolution", "PIXELS", "Side of the images in the network.", _OPTIMISATION),
]
Seed = Annotated[
    str | None, _option("--seed", "N", "Of the order, augmentation and head.", _OPTIMISATION)
]
Freeze = Annotated[
    list[str] | None,
    _option(
        "--freeze", "STAGE", "Keep stem, layer1, … or all-but-head; may be repeated.", _LEARNING
    ),
]
FreezeEpochs = Annotated[
    str | None,
    _option("--freeze-epochs", "N", "At first, only the head learns. (default: 0)", _LEARNING),
]
LayerDecay = Annotated[
    str | None,
    _option("--layer-decay", "F", "Of the rate from stage to stage. (default: 1)", _LEARNING),
]
Ema = Annotated[
    str | None,
    _option("--ema", "DECAY", "Average the weights, such as with 0.999.", _LEARNING),
]
Monitor = Annotated[
    str | None,
    _option("--monitor", "FIGURE", "val/top1 (default), val/macro_f1 or val/loss.", _LEARNING),
]
Patience = Annotated[
    str | None,
    _option("--patience", "N", "Stop after N epochs without a better figure.", _LEARNING),
]
Augment = Annotated[
    str | None,
    _option("--augment", "LEVEL", "none, light (default), trivial or randaug.", _LEARNING),
]
Hflip = Annotated[
    bool | None,
    typer.Option(
        "--hflip/--no-hflip",
        help="Mirror images, but not digits or text. (default: yes)",
        rich_help_panel=_LEARNING,
        show_default=False,
    ),
]
Mixup = Annotated[
    str | None,
    _option("--mixup", "ALPHA", "Blend pairs of images, such as with 0.2.", _LEARNING),
]
Balance = Annotated[
    str | None,
    _option("--balance", "HOW", "none, loss or sampler, for classes of unequal size.", _LEARNING),
]
TrainDir = Annotated[
    str | None, _option("--train-dir", "FOLDER", "Train on this one instead.", _IMAGES)
]
ValDir = Annotated[
    str | None, _option("--val-dir", "FOLDER", "Validate on this one instead.", _IMAGES)
]
ValFrac = Annotated[
    str | None,
    _option("--val-frac", "F", "Held out where there is no val/. (default: 0.2)", _IMAGES),
]
Limit = Annotated[
    str | None, _option("--limit", "F", "Only that part of each class, for a try.", _IMAGES)
]
UnknownClasses = Annotated[
    str | None,
    _option(
        "--unknown-classes",
        "WHAT",
        "Classes only in val/: error (default), or skip.",
        _IMAGES,
    ),
]
MaxBadFraction = Annotated[
    str | None,
    _option("--max-bad-fraction", "F", "Of unreadable images, left out. (default: 0.05)", _IMAGES),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Take any warning about the images for an error.",
        rich_help_panel=_IMAGES,
        show_default=False,
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        "-j",
        metavar="N",
        help="Processes that read images. (default: auto)",
        rich_help_panel=_IMAGES,
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    _option("--memory", "AMOUNT", "Limit, such as 3GiB. (default: what is free)", _MEMORY),
]
MicroBatch = Annotated[
    str | None,
    _option("--micro-batch", "N", "Images in the network at once. (default: auto)", _MEMORY),
]
Strategy = Annotated[
    str | None,
    _option("--strategy", "NAME", "auto (the fastest that fits), store, …", _MEMORY),
]
FreezeBn = Annotated[
    bool | None,
    typer.Option(
        "--freeze-bn",
        help="Keep BatchNorm as it is, for small micro-batches.",
        rich_help_panel=_MEMORY,
        show_default=False,
    ),
]
SyncBn = Annotated[
    bool | None,
    typer.Option(
        "--sync-bn",
        help="Let BatchNorm see the images of all processes; on GPUs.",
        rich_help_panel=_MEMORY,
        show_default=False,
    ),
]
Precision = Annotated[
    str | None, _option("--precision", "NAME", "auto, fp32, bf16 or fp16 (on GPUs).", _MEMORY)
]
Device = Annotated[str | None, _option("--device", "NAME", "auto, cpu, cuda or cuda:1.", _MEMORY)]
Gamma = Annotated[
    str | None,
    _option("--gamma", "G", "0 … 1; 0 is the plain network. (default: 0.9)", MOMENTUM),
]
TimeLimit = Annotated[
    str | None,
    _option("--time-limit", "TIME", "Such as 2h: then save and stop, to be resumed.", RUN),
]
Tensorboard = Annotated[
    bool | None,
    typer.Option(
        "--tensorboard",
        help="Write the numbers for TensorBoard too.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Plots = Annotated[
    bool | None,
    typer.Option(
        "--plots/--no-plots",
        help="Draw curves, confusion and more. (default: yes)",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
