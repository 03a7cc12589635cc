"""The sequences of a network in which residual blocks follow one another."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from momconv.exhaustion import is_exhaustion
from momconv.states import in_eval_mode, in_training_mode
from momconv.tracing.runs import (
    Observation,
    explain_no_run,
    group_runs,
    has_neighbours,
    is_chain,
    observe,
)

Runs = dict[str, list[range]]  # by the name of the sequence

# What a module may raise that is called with images and wants something else. That its values are
# needed, or that fake tensors have no such operation, is a RuntimeError.
_CANNOT_TAKE_THEM = (
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

_BY_NAME = "a loop calls its blocks, which belong in a ModuleList then"
_MORE = "its forward does more than to call one block after another"


def find_sequences(model: nn.Module) -> dict[str, nn.Module]:
    """Return what may contain runs: lists, Sequentials, and dictionaries that call what is in them.

    Nobody knows what a Sequential does that has a forward of its own.
    """
    return {name: module for name, module in model.named_modules() if _is_sequence(module)}


def find_chains(model: nn.Module) -> dict[str, nn.Module]:
    """Return what may call its children in turn, in code of its own."""
    return {
        name: module
        for name, module in model.named_modules()
        if not _is_sequence(module) and len([*module.children()]) > 1
    }


def list_blocks(sequence: nn.Module) -> list[nn.Module]:
    """Return its blocks, also one that comes twice."""
    return [block for block in sequence._modules.values() if block is not None]


def search(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Runs, dict[str, str]]:
    """Return the runs in the sequences of ``model``, and why there are none where there could be.

    No run is inside a block of another. Of two inside one another the longer counts: what is kept
    beside the blocks is kept once a run. Sequentials that are called are listed without runs too.
    """
    found: Runs = {}
    refused: dict[str, str] = {}
    for prefix, part, seen in _observe(model, inputs, refused):
        chains, reasons = _search_chains(prefix, part, seen)
        found |= chains
        refused |= reasons
        for inner, sequence in find_sequences(part).items():
            name, blocks = _join(prefix, inner), list_blocks(sequence)
            # A loop over a list finds each block; see momentum/loops.py.
            with_own = isinstance(sequence, nn.ModuleList)
            runs = group_runs(blocks, seen.calls, with_own=with_own)
            if runs if has_loop(sequence) else seen.calls[sequence]:
                found[name] = runs
            elif runs:
                refused[name] = _BY_NAME
            if not runs and len({*map(type, blocks)}) < len(blocks):
                refused[name] = explain_no_run(blocks, seen.calls)
    for name in sorted(found, key=_depth, reverse=True):
        found[name] = [run for run in found[name] if _outweighs(model, found, name, run)]
    # A Sequential without runs may be around others, but a loop stays the model's own.
    kept = {n: runs for n, runs in found.items() if runs or not has_loop(model.get_submodule(n))}
    if not (refused or any(kept.values())):
        refused[""] = "no two modules of one class follow one another in a sequence that it calls"
    return kept, refused


def _search_chains(prefix: str, part: nn.Module, seen: Observation) -> tuple[Runs, dict[str, str]]:
    """Return the runs of blocks that code of their owner calls, and why others are none."""
    found: Runs = {}
    refused: dict[str, str] = {}
    for inner, chain in find_chains(part).items():
        name, blocks = _join(prefix, inner), list_blocks(chain)
        runs = group_runs(blocks, seen.calls)
        if runs and is_chain(chain, blocks, seen.calls):
            found[name] = runs
        elif runs:
            refused[name] = _BY_NAME if isinstance(chain, nn.ModuleDict) else _MORE
        elif has_neighbours(blocks, seen.calls):
            refused[name] = explain_no_run(blocks, seen.calls)
    return found, refused


def has_loop(sequence: nn.Module) -> bool:
    """Return whether somebody's code calls the blocks, rather than that of ``nn.Sequential``."""
    return type(sequence).forward is not nn.Sequential.forward


def list_operations(model: nn.Module, inputs: Sequence[Tensor], *, in_order: bool) -> list[object]:
    """Return what ``model`` computes: its operations, and the shapes of their inputs.

    In evaluation, then in training: what is between two blocks may depend on that.
    """
    passes: list[object] = []
    for mode in (in_eval_mode, in_training_mode):
        with mode(model):
            seen = _observe(model, inputs, {})
        for prefix, _, one in seen:
            operations = one.operations if in_order else sorted(one.operations)
            passes.append((prefix, operations, one.shapes))
    return passes


def _observe(
    model: nn.Module, inputs: Sequence[Tensor], refused: dict[str, str], prefix: str = ""
) -> list[tuple[str, nn.Module, Observation]]:
    """Return a pass through ``model``, or through those of its parts that take the inputs.

    A detector wants a list of images, for example, but has a backbone.
    """
    sequences = (find_sequences(model) | find_chains(model)).values()
    watched = [module for sequence in sequences for module in (sequence, *sequence.children())]
    try:
        with _quiet():
            return [(prefix, model, observe(model, watched, inputs))]
    except _CANNOT_TAKE_THEM as error:
        if is_exhaustion(error):
            raise
        if not prefix:
            shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in inputs)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            refused[""] = f"cannot be called with {shapes} (set by inputs=[…]): {reason}"
        children = [(n, child) for n, child in model.named_children() if find_sequences(child)]
        return [
            part
            for n, child in children
            for part in _observe(child, inputs, refused, _join(prefix, n))
        ]


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs a traceback of what is refused, which is explained to the user in a line."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _outweighs(model: nn.Module, found: Runs, name: str, run: range) -> bool:
    """Return whether ``run`` is no shorter than those inside its blocks, which are then dropped."""
    sequence = model.get_submodule(name)
    leaves = [*sequence._modules][run.start : run.stop]
    blocks = [_join(name, leaf) for leaf in leaves]
    inside = [n for n in found if any(f"{n}.".startswith(f"{b}.") for b in blocks)]
    if any(len(inner) > len(run) for n in inside for inner in found[n]):
        return False
    for n in inside:
        found[n] = []
    return True


def _is_sequence(module: nn.Module) -> bool:
    forward = type(module).forward
    if isinstance(module, nn.ModuleDict):
        return forward is not nn.ModuleDict.forward
    return isinstance(module, nn.ModuleList) or forward is nn.Sequential.forward


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
