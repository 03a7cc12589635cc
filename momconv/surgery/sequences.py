"""The sequences of a network in which residual blocks follow one another."""

from collections.abc import Sequence

from torch import Tensor, nn

from momconv.momentum.runs import Observation, group_runs, observe

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


def find_sequences(model: nn.Module) -> dict[str, nn.Module]:
    """What may contain runs: each ModuleList and each Sequential without a forward of its own."""
    return {name: module for name, module in model.named_modules() if _is_sequence(module)}


def list_blocks(sequence: nn.Module) -> list[nn.Module]:
    """Its blocks, also one that comes twice."""
    return [block for block in sequence._modules.values() if block is not None]


def search(model: nn.Module, inputs: Sequence[Tensor]) -> Runs:
    """The runs in the sequences of ``model``, of which none is inside a block of another.

    Of two inside one another the longer counts: what is kept beside the blocks is kept once a run.
    """
    found: Runs = {}
    for prefix, part, seen in _observe(model, inputs):
        for name, sequence in find_sequences(part).items():
            if runs := group_runs(list_blocks(sequence), seen.calls):
                found[_join(prefix, name)] = runs
    for name in sorted(found, key=_depth, reverse=True):
        found[name] = [run for run in found[name] if _outweighs(model, found, name, run)]
    return {name: runs for name, runs in found.items() if runs}


def computes_the_same(model: nn.Module, other: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether both run the same operations in the same order, with outputs of the same shapes."""
    pairs = zip(_observe(model, inputs), _observe(other, inputs), strict=True)
    return all(
        seen.operations == theirs.operations and seen.shapes == theirs.shapes
        for (_, _, seen), (_, _, theirs) in pairs
    )


def _observe(
    model: nn.Module, inputs: Sequence[Tensor], prefix: str = ""
) -> list[tuple[str, nn.Module, Observation]]:
    """A pass through ``model`` or, where it cannot take the inputs, those of its parts that can.

    A detector wants a list of images, for example, but has a backbone.
    """
    sequences = find_sequences(model).values()
    blocks = [block for sequence in sequences for block in sequence.children()]
    try:
        return [(prefix, model, observe(model, blocks, inputs))]
    except _CANNOT_TAKE_THEM:
        children = [(n, child) for n, child in model.named_children() if find_sequences(child)]
        return [part for n, child in children for part in _observe(child, inputs, _join(prefix, n))]


def _outweighs(model: nn.Module, found: Runs, name: str, run: range) -> bool:
    """Whether ``run`` is no shorter than those inside its blocks, which are then dropped."""
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
    return isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
