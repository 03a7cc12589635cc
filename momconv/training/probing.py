"""A linear probe: how far the features of the network as it came go, with nothing in it trained.

The plain network gives the features of each image once, in eval mode, prepared as for evaluation.
On those of the training images a linear classifier is fitted, and the held-out ones score it. That
costs one forward pass over the images, and is what fine-tuning has to beat.

The classifier is a multinomial logistic regression with an L2 penalty: a convex problem, which
L-BFGS solves. A part of the training images, on which it is not fitted then, says how strong the
penalty should be.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.decoding import UnreadableImage
from momconv.data.splits import hold_out, shuffle
from momconv.data.transforms import evaluation_transform
from momconv.errors import UsageError
from momconv.exhaustion import Parts
from momconv.files import model_file
from momconv.planner.measurement import autocast
from momconv.states import in_eval_mode, keeping_random_state
from momconv.surgery.drift import answers, wilson_interval
from momconv.training import network
from momconv.training.omission import find_number, leave_out, select
from momconv.training.progress import ProbeScore, SplitName
from momconv.training.run import TrainingRun
from momconv.units import format_duration
from momconv.words import plural
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import find_head

_SHARE = 8  # of the memory, one part in so many is for features
_HELD_OUT = 0.2  # of the training images
_PENALTIES = [10.0**-n for n in range(8)]  # from the strongest on
_STEPS = 200  # of L-BFGS, at most
_ZERO = 1e-12  # where all features are the same
_Batches = Iterator[tuple[Tensor, Tensor]]  # features (images, features) and labels (images,)


def probe(run: TrainingRun) -> None:
    """Score a linear probe of the ``run`` that is about to start, tell, and save it as a model.

    The network and all that is random are afterwards as before. An image that cannot be read any
    more is left out, as in training.

    Raises:
        UsageError: The input of the network's last linear layer is not a vector for each image.
        OutOfMemory: Not even one image fits.
        DataError: Too many images cannot be read any more.
    """
    began = time.perf_counter()
    with keeping_random_state(run.device), _frozen(run) as (model, head):
        batches = _compute(run, model, "train", _choose_images(run, head))
        features, labels = map(torch.cat, zip(*batches, strict=True))
        penalty = fit(head, features, labels, run.listener.advance)
        del features
        right = _judge(head, _compute(run, model, "val", range(len(run.splits.val.samples))))
        score = ProbeScore(
            top1=sum(right) / len(right),
            interval=wilson_interval(sum(right), len(right)),
            n=len(right),
            images=len(labels),
            penalty=penalty,
            seconds=time.perf_counter() - began,
        )
        data = {"fingerprint": run.splits.fingerprint}
        model_file.save(model, run.folder.probe, {"probe": asdict(score), "data": data})
    run.progress.probe = score
    run.listener.tell(_describe(score, run))


def fit(
    head: nn.Linear,
    features: Tensor,
    labels: Tensor,
    advance: Callable[[str, int, int], None] = lambda _title, _done, _total: None,
) -> float:
    """Make ``head`` the classifier of ``features`` (images, features), which are spoilt.

    Returns the strength of the penalty: the mean loss has half of it times the squared norm of the
    weights added, for features that are centred and have a mean squared norm of 1.
    """
    centre = features.mean(0) if head.bias is not None else torch.zeros_like(features[0])
    scale = features.sub_(centre).square().sum(1).mean().sqrt().clamp_min(_ZERO)
    classifier = _Classifier(features.div_(scale), labels, head)
    parts = hold_out(labels.tolist(), _HELD_OUT, seed=0)
    known, unknown = (labels.new_tensor(part) for part in parts)
    best, lowest = _PENALTIES[0], math.inf
    for done, penalty in enumerate(_PENALTIES):
        advance("fitting the linear probe", done, len(_PENALTIES))
        classifier.fit(penalty, known)
        loss = classifier.measure(unknown)
        if not loss < lowest:  # nor is it without two images of a class
            break
        best, lowest = penalty, loss
    classifier.fit(best, torch.cat([known, unknown]))
    with torch.no_grad():
        head.weight.copy_(classifier.weight / scale)
        if head.bias is not None:
            head.bias.copy_(classifier.bias - head.weight @ centre)
    return best


class _Classifier:
    """A linear classifier of ``features``, with a bias if ``head`` has one."""

    def __init__(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        self._features, self._labels = features, labels
        self.weight = torch.zeros_like(head.weight, dtype=features.dtype, requires_grad=True)
        self.bias = self.weight.new_zeros(len(head.weight), requires_grad=head.bias is not None)

    def fit(self, penalty: float, images: Tensor) -> None:
        """Lower the mean loss of the ``images`` as far as the ``penalty`` lets it, from here on."""
        learnt = [part for part in (self.weight, self.bias) if part.requires_grad]
        optimizer = torch.optim.LBFGS(learnt, max_iter=_STEPS, line_search_fn="strong_wolfe")

        def measure() -> float:
            optimizer.zero_grad()
            loss = self._find_loss(images) + penalty / 2 * self.weight.square().sum()
            loss.backward()
            return float(loss.detach())

        optimizer.step(measure)

    @torch.no_grad()
    def measure(self, images: Tensor) -> float:
        """Return the mean loss of the ``images``."""
        return float(self._find_loss(images))

    def _find_loss(self, images: Tensor) -> Tensor:
        outputs = F.linear(self._features, self.weight, self.bias)
        return F.cross_entropy(outputs, self._labels, reduction="none")[images].mean()


def compare(probe: ProbeScore, top1: float, n: int) -> str:
    """Return both scores, and what fine-tuning bought that came to ``top1`` on ``n`` images."""
    low, high = wilson_interval(round(top1 * n), n)
    if low <= probe.top1 <= high:
        bought = f"bought nothing that {plural(n, 'image')} can show"
    else:
        verb = "gained" if top1 > probe.top1 else "lost"
        bought = f"{verb} {100 * abs(top1 - probe.top1):.1f} points"
    return f"{probe.top1:.1%}, fine-tuned {top1:.1%}: fine-tuning {bought}"


@torch.no_grad()
def _judge(head: nn.Linear, batches: _Batches) -> list[bool]:
    """Return of each image whether ``head`` names its class."""
    return [hit for f, labels in batches for hit in (answers(head(f)) == labels).tolist()]


def _describe(score: ProbeScore, run: TrainingRun) -> str:
    low, high = score.interval
    return (
        f"note: linear probe, on frozen features of {plural(score.images, 'training image')}: "
        f"top-1 {score.top1:.1%} on {plural(score.n, 'held-out image')} (95 % interval {low:.1%} "
        f"to {high:.1%}), in {format_duration(score.seconds)}; it is {run.folder.probe}"
    )


@contextmanager
def _frozen(run: TrainingRun) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """Give the network as it came, in eval mode, and a final layer that it has inside."""
    model = run.model
    if run.recipe.model.from_file is None and network.read_gamma(model):
        side = network.read_preparation(run.recipe.data).side
        model = network.load_plain(run.recipe.model, side)
        network.place(model, run.device, run.recipe.train)
        attach(model, describe(run.model))
    head = copy.deepcopy(run.model.get_submodule(find_head(run.model)))
    assert isinstance(head, nn.Linear)
    with network.wearing(model, head), in_eval_mode(model):
        yield model, head


def _choose_images(run: TrainingRun, head: nn.Linear) -> list[int]:
    """Return the numbers of the training images; only some where memory is short of features.

    Features are there twice while they are put together, and so is what is said of them.
    """
    image_bytes = 2 * 4 * (head.in_features + head.out_features)
    most = max(1, run.plan.limit_bytes // _SHARE // image_bytes)
    return shuffle(range(len(run.splits.train.samples)), seed=0)[:most]


def _compute(
    run: TrainingRun, model: nn.Module, split: SplitName, images: Sequence[int]
) -> _Batches:
    """Yield the features of those ``images`` of the ``split`` that can be read, with labels."""
    features, preprocessing, parts = _Features(model), describe(model).preprocessing, Parts()
    transform, samples = evaluation_transform(preprocessing), select(run.splits, split)
    precision = run.plan.precision if run.device.type == "cuda" else "fp32"  # as in validation
    left = [number for number in images if number not in run.progress.left_out(split)]
    total = len(left)
    while left:
        own = samples.select(left)
        dataset = LabelledImages(own, transform, seed=None, ranges=preprocessing.ranges)
        size = min(run.evaluation_batch, run.plan.micro_batch)
        try:
            for pictures, labels in read_batches(
                make_loader(dataset, workers=run.workers, batch_size=size)
            ):
                with torch.no_grad(), autocast(precision, run.device):
                    found = parts.forward(features, pictures, run.device)
                yield found.float(), labels.to(run.device)
                left = left[len(labels) :]
                run.listener.advance("computing features", total - len(left), total)
        except UnreadableImage as error:
            leave_out(run, split, error)
            left.remove(find_number(samples, error))


class _Features(nn.Module):
    """A network up to the input of its last linear layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of ``images``, (images, features).

        Raises:
            UsageError: The last linear layer does not take one vector for each image.
        """
        seen: list[Tensor] = []
        head = self.model.get_submodule(find_head(self.model))
        with head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0])):
            self.model(images)
        if [features.ndim for features in seen] != [2]:
            raise UsageError(
                f"--probe: the last linear layer of this {type(self.model).__name__} does not take "
                "one vector for each image",
                kind="usage.no_probe",
                fix="--set train.probe=false",
            )
        return seen[0]
