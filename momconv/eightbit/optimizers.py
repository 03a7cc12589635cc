"""SGD with momentum and AdamW whose state takes a byte a value.

They compute in single precision, and round what they keep. On a CPU a step is one pass over memory
(loops.py); elsewhere, and without Numba, a few operations for each piece of a parameter. Both give
the same bits. No state exists as a whole in single precision, but where a layout has changed.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, AdamW, Optimizer

from momconv.eightbit.blocks import SMALLEST, Blocks, count_blocks
from momconv.errors import UsageError

_PIECE = 2**20  # values at a time where there is no loop; whole blocks
SCALES = "_scales"  # the end of a name, beside that of the bytes
ORDER = "order"  # of the dimensions of what scales belong to, in memory; files do not keep it
_T = TypeVar("_T")


class _Optimizer(Optimizer):
    """What both have in common: where the state is, and how a step goes through it."""

    signs: ClassVar[Mapping[str, bool]]  # the states, and whether their values may be negative
    loop: ClassVar[str]  # in loops.py
    widths: ClassVar[Mapping[int, int]]  # bytes to step a value of so many, where there is no loop

    @classmethod
    def step_bytes(cls, parameter: Tensor, device: str) -> int:
        """Return what a step of ``parameter`` needs for itself on this kind of device."""
        if _has_loop(parameter.dtype, device):
            return 0
        return cls.widths[parameter.itemsize] * min(parameter.numel(), _PIECE)

    @abstractmethod
    def find_constants(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """Return what a parameter's step depends on besides its values."""

    @staticmethod
    @abstractmethod
    def compute(parameter: Tensor, gradient: Tensor, states: list[Tensor], *constants: Any) -> None:
        """Change a piece of a parameter and of its states, all in single precision, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], _T] | None = None) -> _T | None:  # type: ignore[override]
        """Change each parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad, group)
        return loss

    def _change(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        _require_dense(gradient, self.loop)
        order, state = _find_order(parameter), self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in self.signs:
                _begin(state, name, parameter)
            state[ORDER] = _as_tensor(order)
        elif state[ORDER].tolist() != order:
            for name, signed in self.signs.items():
                _lay_out(state, name, parameter, signed=signed)
            state[ORDER] = _as_tensor(order)
        state["step"] += 1
        constants = self.find_constants(group, int(state["step"]))
        target = parameter.detach().permute(order)
        values, gradient = target.reshape(-1), _flatten(gradient, order)
        states = [_flatten(state[name], order) for name in self.signs]
        if len(values) < SMALLEST:
            self._change_piece(values, gradient, states, constants)
        else:
            scales = (state[f"{name}{SCALES}"] for name in self.signs)
            blocks = [*map(Blocks, states, scales, self.signs.values())]
            self._change_in_blocks(values, gradient, blocks, constants)
        if values.data_ptr() != target.data_ptr():  # a copy, as the parameter has gaps in memory
            target.copy_(values.view_as(target))
        increment_version(parameter)  # as PyTorch's operations do

    def _change_in_blocks(
        self, values: Tensor, gradient: Tensor, blocks: list[Blocks], constants: tuple[float, ...]
    ) -> None:
        if all(_has_loop(x.dtype, x.device.type) for x in (values, gradient)):
            import_module("momconv.eightbit.loops").run(
                self.loop, values, gradient, blocks, constants
            )
        else:
            self._change_in_pieces(values, gradient, blocks, constants)

    def _change_in_pieces(
        self, values: Tensor, gradient: Tensor, blocks: list[Blocks], constants: Iterable[float]
    ) -> None:
        for start in range(0, len(values), _PIECE):
            stop = min(start + _PIECE, len(values))
            states = [state.read(start, stop) for state in blocks]
            self._change_piece(values[start:stop], gradient[start:stop], states, constants)
            for block, state in zip(blocks, states, strict=True):
                block.write(start, state)
            del states, state  # before the next are read

    def _change_piece(
        self, values: Tensor, gradient: Tensor, states: list[Tensor], constants: Iterable[float]
    ) -> None:
        """Compute in single precision, which holds the square of a gradient that half does not."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        wide = values.to(dtype)
        self.compute(wide, gradient.to(dtype), states, *constants)
        if wide is not values:
            values.copy_(wide)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what ``state_dict`` returned; PyTorch's own would make floats of the bytes.

        Until the next step, the bytes are laid out as those that their scales were made for.

        Raises:
            UsageError: It is the state of another kind of optimiser.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        states = [state_dict["state"].get(number) for number in numbers]
        pairs = [(p, own) for p, own in zip(parameters, states, strict=False) if own]
        for parameter, own in pairs:
            self._require_own(own, parameter)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for parameter, own in pairs:
            self.state[parameter].update(_take(own, parameter))

    def _require_own(self, saved: Mapping[str, Any], parameter: Tensor) -> None:
        scales = self.signs if parameter.numel() >= SMALLEST else ()
        wanted = {"step", *self.signs, *(f"{name}{SCALES}" for name in scales)}
        if saved.keys() - {ORDER} != wanted:
            raise UsageError(
                f"a state of {', '.join(sorted(saved))} is none of {self.loop}-8bit, which has "
                f"{', '.join(sorted(wanted))}",
                kind="usage.bad_value",
                fix="load it into an optimiser of the class that it was saved from",
            )


class SGD8bit(_Optimizer):
    """torch.optim.SGD, with a momentum buffer of a byte a value.

    Args:
        params: As for every optimiser of PyTorch's.
        lr: The learning rate.
        momentum: Its factor of the buffer.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Whether the step looks ahead.

    Raises:
        ValueError: Where torch.optim.SGD raises it.
    """

    signs: ClassVar = {"momentum_buffer": True}
    loop = "sgd"
    widths: ClassVar = {2: 20, 4: 20, 8: 28}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults["nesterov"] = nesterov
        SGD([torch.empty(0)], **defaults)  # checks them
        super().__init__(params, defaults)

    def find_constants(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """Return rate, weight decay, momentum, and whether the step looks ahead."""
        names = "lr", "weight_decay", "momentum", "nesterov"
        return tuple(float(group[name]) for name in names)

    @staticmethod
    def compute(parameter: Tensor, gradient: Tensor, states: list[Tensor], *constants: Any) -> None:
        """Take a step of SGD."""
        (buffer,), (rate, decay, momentum, looks_ahead) = states, constants
        gradient = parameter * decay + gradient
        buffer.mul_(momentum).add_(gradient)
        change = gradient.add_(buffer * momentum) if looks_ahead else buffer
        parameter.sub_(change * rate)


class AdamW8bit(_Optimizer):
    """torch.optim.AdamW, with both moments of a byte a value.

    Args:
        params: As for every optimiser of PyTorch's.
        lr: The learning rate.
        betas: How much of the moments stays.
        eps: Added to the root of the second moment.
        weight_decay: Of the parameters, times the rate.

    Raises:
        ValueError: Where torch.optim.AdamW raises it.
    """

    signs: ClassVar = {"exp_avg": True, "exp_avg_sq": False}
    loop = "adamw"
    widths: ClassVar = {2: 32, 4: 24, 8: 32}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults["weight_decay"] = weight_decay
        AdamW([torch.empty(0)], **defaults)  # checks them
        super().__init__(params, defaults)

    def find_constants(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """Return the factors of parameter, moments, root and change, and what keeps from zero."""
        rate, (first, second) = float(group["lr"]), group["betas"]
        decay = 1 - rate * group["weight_decay"]
        root = 1 / math.sqrt(1 - second**step)
        return decay, 1 - first, second, 1 - second, root, group["eps"], rate / (1 - first**step)

    @staticmethod
    def compute(parameter: Tensor, gradient: Tensor, states: list[Tensor], *constants: Any) -> None:
        """Take a step of AdamW."""
        mean, square = states
        decay, fresh, kept, fresh_square, root, eps, rate = constants
        mean.add_((gradient - mean).mul_(fresh))
        square.mul_(kept).add_((gradient * gradient).mul_(fresh_square))
        # In single precision, libraries round roots as they like.
        change = mean / square.double().sqrt().float().mul_(root).add_(eps)
        parameter.mul_(decay).sub_(change.mul_(rate))


def _begin(state: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Add a state of zeros."""
    if parameter.numel() < SMALLEST:
        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return
    state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
    blocks = count_blocks(parameter.numel())
    state[f"{name}{SCALES}"] = torch.zeros(blocks, device=parameter.device)


def _take(saved: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Return a copy of a parameter's saved state, in the layout that its scales were made for."""
    order = saved.get(ORDER, _as_tensor(_find_order(like)))  # older ones have none
    taken = {"step": saved["step"].clone(), ORDER: order.clone()}
    for name in saved.keys() - taken.keys():
        value = saved[name].to(like.device)
        if name.endswith(SCALES):
            taken[name] = value.clone()
        else:
            taken[name] = _make_empty(order.tolist(), value).copy_(value)
    return taken


def _lay_out(state: dict[str, Tensor], name: str, like: Tensor, *, signed: bool) -> None:
    """Lay a state out in memory as ``like``, with scales that belong to that."""
    old, new = state[name], torch.empty_like(like, dtype=state[name].dtype)
    scales = state.get(f"{name}{SCALES}")
    if scales is None:
        new.copy_(old)
    else:
        values = torch.empty_like(old, dtype=torch.float32)
        before, order = _find_order(old), _find_order(new)
        blocks = Blocks(_flatten(old, before), scales, signed)
        _flatten(values, before).copy_(blocks.read(0, old.numel()))
        Blocks(_flatten(new, order), scales, signed).write(0, _flatten(values, order))
    state[name] = new


def _find_order(x: Tensor) -> list[int]:
    """Return the dimensions of x from the one with the longest way in memory to the shortest."""
    return sorted(range(x.dim()), key=lambda n: (x.shape[n] > 1, -x.stride()[n]))


def _as_tensor(order: list[int]) -> Tensor:
    return torch.tensor(order, dtype=torch.long)


def _make_empty(order: list[int], like: Tensor) -> Tensor:
    """Return an empty tensor like this one whose dimensions lie in this order in memory."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return like.new_empty([like.shape[n] for n in order]).permute(back)


def _flatten(x: Tensor, order: list[int]) -> Tensor:
    """Return x with its dimensions in this order: a view, if it lies so in memory, densely."""
    return x.permute(order).reshape(-1)


def _require_dense(gradient: Tensor, name: str) -> None:
    if gradient.layout != torch.strided or gradient.is_complex():
        raise UsageError(
            f"{name}-8bit takes real, dense gradients, not {gradient.dtype}, {gradient.layout}",
            kind="usage.bad_value",
            fix=f"the optimiser {name} of torch.optim",
        )


def _has_loop(dtype: torch.dtype, device: str) -> bool:
    return dtype == torch.float32 and device == "cpu" and _has_loops()


@cache
def _has_loops() -> bool:
    return find_spec("numba") is not None
