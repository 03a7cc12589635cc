"""Fitting the layers of a converted network to its original's, one after the other, in closed form.

A block of a momentum run reads another x than the block of the original does: what comes before it
has not been added in full yet. So in each block of a run the first linear layer is fitted to what
it gives in the original, from what it gets in the converted network; and the last one to the
residual of the original, and at the end of the run to what leads to the original's x. Earlier
blocks do not make up for errors of those before them, which are fitted anew at the same time: they
would make up for errors that are gone, the more of them the longer the run is.

Both are least squares with a penalty on leaving the weights of the original, as strong as suits
images best that were left out. Images come in chunks. In each, a layer is solved, on all that it
has seen, before what follows it runs, which so is fitted to the inputs that it is going to get.
"""

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.exhaustion import Parts
from momconv.momentum.equations import coefficients
from momconv.momentum.sequential import MomentumSequential, Run, momentum_stages
from momconv.states import in_eval_mode, without_hooks

_WIDEST = 2560  # inputs of a layer: what it takes to solve it grows with their cube
_PENALTIES = [10.0**n for n in range(-5, 4)]  # times the mean square of the inputs
_ROWS = 20  # for each input of a layer, from all images together
_LEFT_OUT = 5  # one image in so many decides on the penalty
_DEAD = 1e-3  # of the most that an output counts for in its block: it is left as it is

Linear = nn.Linear | nn.Conv2d


class Fitting:
    """Fits the layers of all runs of ``model``.

    Attributes:
        layers: How many there are. Blocks that are used several times, and layers in which each
            output has inputs of its own, have none; nor has a network without momentum.
    """

    def __init__(self, model: nn.Module, original: nn.Module, example: Tensor, images: int) -> None:
        """``example`` is an image (1, 3, H, W) on the networks' device, to see them at work on.

        So many ``images`` are to come.
        """
        self._model, self._original = model, original
        self._runs: list[_Run] = []
        self._parts, self._chunks = Parts(), 0
        stages = momentum_stages(model)
        if any(stage.followed for stage in momentum_stages(original).values()):
            return
        with in_eval_mode(model), torch.no_grad():
            order = _Order(model, example)
        for name, stage in stages.items():
            twin = original.get_submodule(name)
            self._runs += [_Run(stage, run, twin, order, images) for run in stage.followed]

    @property
    def layers(self) -> int:  # noqa: D102 (said above)
        return sum(len(run.layers) for run in self._runs)

    def take(self, images: Tensor) -> None:
        """Fit all layers to ``images`` too, on any device; the networks are to be in eval mode."""
        self._parts.work(lambda parts: [self._take(few) for few in parts], images)

    @torch.no_grad()
    def _take(self, images: Tensor) -> None:
        images = images.to(next(self._model.parameters()).device)
        self._chunks += 1
        with ExitStack() as hooks:
            for run in self._runs:
                run.watch(hooks, self._chunks)
            self._original(images)
        with ExitStack() as hooks:
            for run in self._runs:
                run.fit(hooks)
            self._model(images)

    def undo(self) -> None:
        """Give all layers the weights that they had at first."""
        for run in self._runs:
            for layer in run.layers:
                layer.reset()


class _Order:
    """Which layers a network calls, in order, and which BatchNorm follows each."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.norms: dict[nn.Module, _BatchNorm] = {}
        self.shapes: dict[nn.Module, torch.Size] = {}
        self._calls: list[nn.Module] = []
        self._outputs: list[tuple[nn.Module, Tensor]] = []
        with ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_hook(self._note).remove)
            model(example)
        self._outputs.clear()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._calls.append(module)
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            self.norms |= {layer: module for layer, given in self._outputs if given is args[0]}
        if isinstance(output, Tensor):
            self.shapes[module] = output.shape
        if _is_linear(module):
            self._outputs = [*self._outputs[-1:], (module, output)]

    def find(self, block: nn.Module) -> list[Linear]:
        """Return the layers of ``block`` that can be fitted, called once like itself, in order."""
        inside = {*block.modules()}
        called = [module for module in self._calls if module in inside]
        once = [module for module in called if called.count(module) == 1]
        return [m for m in once if _is_linear(m)] if block in once else []  # type: ignore[misc]


def _is_linear(module: nn.Module) -> bool:
    """Return whether each output is a sum over all inputs, that is known from the attributes."""
    if isinstance(module, nn.Linear):
        return module.in_features <= _WIDEST
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    if module.kernel_size == (1, 1):  # also those of classes that pad by themselves
        return module.stride == (1, 1) and module.in_channels <= _WIDEST
    is_own = type(module).forward is not nn.Conv2d.forward
    is_padded = not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return not is_own and is_padded and module.weight[0].numel() <= _WIDEST


class _Layer:
    """A linear layer, and the sums that determine its weights."""

    def __init__(self, module: Linear, norm: _BatchNorm | None) -> None:
        self.module, self._norm = module, norm if module.bias is None else None
        weight = module.weight.detach().flatten(1)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
        self._original = self._values = torch.cat([weight, bias[:, None]], 1)
        self._mean = None if self._norm is None else _mean_of(self._norm).clone()
        self._sums: list[tuple[Tensor, Tensor]] = []  # of the images to fit to, and of the others
        self._chunks, self._penalty = 0, len(_PENALTIES) // 2

    @property
    def inputs(self) -> int:
        """How many inputs each output has."""
        return self._original.shape[1] - 1

    @property
    def shift(self) -> Tensor:
        """What the norm behind the layer adds to its outputs in place of a bias."""
        return self._values[:, -1] if self._norm is not None else self._values.new_zeros(())

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count in ``inputs`` (rows, inputs), of which ``targets`` (rows, outputs) should be made.

        The layer is solved anew whenever the number of calls has doubled.
        """
        border = len(inputs) // _LEFT_OUT
        ones = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        pairs = [(ones[border:], targets[border:]), (ones[:border], targets[:border])]
        sums = [(x.T @ x, y.T @ x) for x, y in pairs]
        before = self._sums or [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in sums]
        both = zip(before, sums, strict=True)
        self._sums = [(old[0] + new[0], old[1] + new[1]) for old, new in both]
        self._chunks += 1
        if self._chunks & (self._chunks - 1) == 0:  # a power of two
            self._put(self._solve())

    def reset(self) -> None:
        """Restore the weights that the layer had at first."""
        self._put(self._original)

    def _solve(self) -> Tensor:
        """Return the weights that suit best, in double precision on the CPU."""
        (a, b), (a_, b_) = [(a.cpu().double(), b.cpu().double()) for a, b in self._sums]
        original = self._original.cpu().double()
        importance = self._weigh_outputs().cpu().double()
        unit = torch.eye(len(a), dtype=a.dtype) * a.diagonal()[:-1].mean()
        unit[-1, -1] *= 1e-9 if self._is_shifting else 1e9

        def err(weights: Tensor) -> float:
            """Return the error on the images left out, without the part that no weights change."""
            fit = ((weights @ a_) * weights).sum(1) - 2 * (weights * b_).sum(1)
            return (fit @ importance).nan_to_num(nan=math.inf).item()

        @functools.cache
        def err_of_penalty(number: int) -> float:
            return err(_ridge(a, b, _PENALTIES[number] * unit, original))

        self._penalty = _descend(err_of_penalty, self._penalty, len(_PENALTIES))
        if err(original) <= err_of_penalty(self._penalty):
            return self._original
        grown = _PENALTIES[self._penalty] * (1 + a_[-1, -1] / a[-1, -1])
        return _ridge(a + a_, b + b_, grown * unit, original).to(self._original)

    @property
    def _is_shifting(self) -> bool:
        return self.module.bias is not None or self._norm is not None

    def _weigh_outputs(self) -> Tensor:
        """Return what a squared error of each output counts for: as much as the norm scales it."""
        norm = self._norm
        if norm is None or norm.running_var is None:
            return torch.ones(len(self._original))
        scale = 1 if norm.weight is None else norm.weight.detach().square()
        return scale / (norm.running_var + norm.eps)

    @torch.no_grad()
    def _put(self, values: Tensor) -> None:
        self._values = values
        self.module.weight.copy_(values[:, :-1].view_as(self.module.weight))
        if self.module.bias is not None:
            self.module.bias.copy_(values[:, -1])
        elif self._norm is not None and self._mean is not None:
            _mean_of(self._norm).copy_(self._mean - values[:, -1])


def _mean_of(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _descend(height: Callable[[int], float], start: int, count: int) -> int:
    """Return where, among ``count`` places in a row, going down from ``start`` ends."""
    place = start
    while (
        lowest := min(range(max(0, place - 1), min(count, place + 2)), key=height)
    ) != place and height(lowest) < height(place):
        place = lowest
    return place


def _ridge(a: Tensor, b: Tensor, penalty: Tensor, original: Tensor) -> Tensor:
    """Return the W for which W (a + penalty) = b + original · penalty; NaN if there is none."""
    factor, failed = torch.linalg.cholesky_ex(a + penalty)
    if failed:
        return torch.full_like(original, torch.nan)
    return original + torch.cholesky_solve((b - original @ a).T, factor).T


class _Run:
    """The blocks of a run beside those of the original, at a sample of places in each image."""

    def __init__(
        self, stage: MomentumSequential, run: Run, twin: nn.Module, order: _Order, images: int
    ) -> None:
        names = [*stage._modules]
        blocks = [stage.get_submodule(names[n]) for n in run.blocks]
        steps = coefficients(stage.gamma, run.gains, stage.velocity)
        lasts = [layers[-1] for block in blocks if (layers := order.find(block))]
        is_image = isinstance(next(iter(lasts), None), nn.Conv2d)
        self._blocks = [
            _Block(block, twin.get_submodule(names[n]), step, order, is_image=is_image)
            for block, n, step in zip(blocks, run.blocks, steps, strict=True)
        ]
        self._gamma = stage.gamma
        inputs = max((layer.inputs for layer in self.layers), default=0)
        self._places = math.ceil(_ROWS * inputs / images)

    @property
    def layers(self) -> list[_Layer]:
        """The layers that are fitted."""
        return [layer for block in self._blocks for layer in block.layers]

    def watch(self, hooks: ExitStack, chunk: int) -> None:
        """Note what the original makes of the images of the ``chunk`` of this number."""
        for block in self._blocks:
            block.watch(hooks, partial(_choose, chunk, self._places))

    def fit(self, hooks: ExitStack) -> None:
        """Fit the layers as they are called."""
        path = _Path(self._gamma)
        for block in self._blocks:
            block.fit(hooks, path, is_last=block is self._blocks[-1])


Places = Callable[[int], Tensor]  # the chosen ones of so many


def _choose(seed: int, wanted: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted]


def _sample(x: Tensor, places: Places, *, is_image: bool) -> Tensor:
    """Return the values (rows, channels) at some places of each image."""
    if x.ndim == 2:
        x = x[:, None]
    x = x.flatten(2).transpose(1, 2) if is_image else x.flatten(1, -2)
    return x[:, places(x.shape[1]).to(x.device)].flatten(0, 1)


def _sample_inputs(x: Tensor, layer: Linear, places: Places) -> Tensor:
    """Return all that the outputs of ``layer`` there are sums over, (rows, inputs)."""
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
        return _sample(x, places, is_image=isinstance(layer, nn.Conv2d))
    (high, wide), (down, right), (step, stride) = layer.kernel_size, layer.dilation, layer.stride
    above, beside = map(int, layer.padding)
    x = F.pad(x, (beside, beside, above, above))
    columns = (x.shape[3] - right * (wide - 1) - 1) // stride + 1
    rows = (x.shape[2] - down * (high - 1) - 1) // step + 1
    chosen = places(rows * columns)[:, None, None]
    heights = chosen // columns * step + (torch.arange(high) * down)[:, None]
    widths = chosen % columns * stride + torch.arange(wide) * right
    patches = x[:, :, heights.to(x.device), widths.to(x.device)]  # B × C × places × kernel
    return patches.transpose(1, 2).flatten(2).flatten(0, 1)


class _Path:
    """The velocity of a run, at a sample of places."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.v = torch.zeros(())  # a scalar until the first step

    def follow(self, step: float, residual: Tensor) -> None:
        """Let the velocity have the ``residual`` of the run's own block."""
        self.v = self.gamma * self.v.to(residual) + step * residual

    def missing(self, step: float, x: Tensor, end: Tensor) -> Tensor:
        """Return the residual with which the next step leads from ``x`` to ``end``."""
        return (end - x - self.gamma * self.v.to(x)) / step


class _Block:
    """A block of a run, its first and last layer, and what the original does in its place."""

    def __init__(
        self, block: nn.Module, twin: nn.Module, step: float, order: _Order, *, is_image: bool
    ) -> None:
        self._block, self._twin, self._step = block, twin, step
        layers = order.find(block)
        reaches_out = (
            len(layers) > 1
            and isinstance(layers[-1], nn.Conv2d) == is_image
            and order.shapes[layers[-1]] == order.shapes[block]
        )
        self._first = _Layer(layers[0], order.norms.get(layers[0])) if layers else None
        self._last = _Layer(layers[-1], order.norms.get(layers[-1])) if reaches_out else None
        names = {module: name for name, module in block.named_modules()}
        self._twin_first = twin.get_submodule(names[layers[0]]) if layers else None
        self._is_image, self._is_at_end = is_image, False
        self._x = self._y = self._wanted = self._inputs = self._output = torch.empty(0)

    @property
    def layers(self) -> list[_Layer]:
        """The layers that are fitted."""
        return [layer for layer in (self._first, self._last) if layer]

    def watch(self, hooks: ExitStack, places: Places) -> None:
        """Note what the original does at these ``places``."""
        self._places = places
        hooks.callback(self._twin.register_forward_hook(self._note).remove)
        if self._twin_first is not None:
            hooks.callback(self._twin_first.register_forward_hook(self._note_first).remove)

    def _sample(self, x: Tensor) -> Tensor:
        return _sample(x, self._places, is_image=self._is_image)

    def _note(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._x, self._y = self._sample(args[0]), self._sample(output)

    def _note_first(self, module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        self._wanted = _sample(output, self._places, is_image=isinstance(module, nn.Conv2d))

    def fit(self, hooks: ExitStack, path: _Path, *, is_last: bool) -> None:
        """Fit its layers as they are called."""
        if self._first:
            first = self._first.module.register_forward_hook(self._fit_first)
            hooks.callback(first.remove)
        if self._last:
            last = self._last.module.register_forward_hook(self._split)
            hooks.callback(last.remove)
        self._path, self._is_at_end = path, is_last
        end = self._block.register_forward_hook(self._fit_last, with_kwargs=True)
        hooks.callback(end.remove)

    def _fit_first(self, module: Linear, args: tuple[Tensor], _output: Tensor) -> Tensor:
        assert self._first is not None
        self._first.add(_sample_inputs(args[0], module, self._places), self._wanted)
        result: Tensor = module.forward(args[0])
        return result

    def _split(self, module: Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Begin a graph at the output of the last layer, to differentiate what follows by it."""
        self._inputs = _sample_inputs(args[0], module, self._places)
        self._output = output.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self._output.clone()

    def _fit_last(
        self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        path, x = self._path, self._sample(args[0])
        if self._last:
            (slopes,) = torch.autograd.grad(output.sum(), self._output)
            torch.set_grad_enabled(False)
            residual = self._y - self._x
            if self._is_at_end:
                residual = path.missing(self._step, x, self._y)
            targets = self._find_targets(x + residual, output, slopes)
            self._last.add(self._inputs, targets + self._last.shift)
            with without_hooks([block]):
                output = block(*args, **kwargs)
        path.follow(self._step, self._sample(output) - x)
        return output

    def _find_targets(self, wanted: Tensor, output: Tensor, slopes: Tensor) -> Tensor:
        """Return the outputs of the last layer with which the block gives what is ``wanted``.

        What follows it is a straight line for each channel, or one that is cut off as by a ReLU.
        """
        y, u, slope = (self._sample(t.detach()) for t in (output, self._output, slopes))
        steepest = slope.abs().amax(0) * slope.sum(0).sign()
        missing = wanted.clamp(y.amin(0), y.amax(0)) - y
        is_cut = (slope == 0) & (missing * steepest.sign() <= 0)
        is_dead = steepest.abs() <= _DEAD * steepest.abs().max()
        return u + torch.where(is_cut | is_dead, 0, missing / steepest)
