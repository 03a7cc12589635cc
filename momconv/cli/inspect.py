"""``momconv inspect``."""

from momconv.cli._console import out, print_json
from momconv.cli._options import ArgumentOption, JsonOption, ModelArgument, NetworkOption
from momconv.cli._own import Function


def inspect(
    *,
    file: ModelArgument,
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what a model file holds: network, classes, input, origin, stages, certificate, scores."""
    from momconv.reports.inspection import inspect_file

    found = inspect_file(file, Function(network, arg).make_for(file))
    if json_output:
        print_json({"ok": True, **found.to_json()})
        return
    for part in found.show():
        out.print(part, soft_wrap=True)
