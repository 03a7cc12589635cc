"""``momconv doctor``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from momconv.cli._console import describe_error, out, print_json, progress
from momconv.cli._options import JsonOption
from momconv.errors import ResourceError
from momconv.exhaustion import is_exhaustion

if TYPE_CHECKING:
    from momconv.diagnosis import HealthCheck

_WIDTH = 14  # of a name


def doctor(
    *,
    json_output: JsonOption = False,
) -> None:
    """Look whether this machine has what is needed, and try a small network; to report a bug."""
    try:
        from momconv.diagnosis import diagnose
    except (ImportError, OSError) as error:
        if is_exhaustion(error):
            raise
        raise ResourceError(
            f"a library that momconv needs cannot be loaded: {error}",
            kind="doctor.import",
            fix="pip install --force-reinstall momconv",
        ) from error

    with progress("looking", 1) as report:
        findings = diagnose(lambda done, total: report(done // total, ""))
    broken = [finding for finding in findings if finding.is_broken]
    failure = _fail(broken) if broken else None
    if json_output:
        failed = {"error": describe_error(failure)} if failure else {}
        found = [finding.to_json() for finding in findings]
        print_json({"ok": failure is None, **failed, "findings": found})
        raise typer.Exit(failure.exit_code if failure else 0)
    for finding in findings:
        _print(finding)
    if failure:
        raise failure


def _fail(broken: Sequence["HealthCheck"]) -> ResourceError:
    return ResourceError(
        "\n".join(f"{finding.name}: {finding.found}" for finding in broken),
        kind="doctor.broken",
        fix="\n".join(finding.fix for finding in broken if finding.fix),
    )


def _print(finding: "HealthCheck") -> None:
    """Print the checks; ``✗`` needs to be mended, ``!`` only where it matters to you."""
    mark, style = ("✗", "red") if finding.is_broken else ("!", "yellow")
    if finding.ok:
        mark, style = "✓", "green"
    found = f" {finding.name:<{_WIDTH}} {finding.found}"
    out.print(Text.assemble((mark, style), found), soft_wrap=True)
    if finding.fix and not finding.ok:
        out.print(Text(f"  {'fix:':>{_WIDTH}} {finding.fix}", style="green"), soft_wrap=True)
