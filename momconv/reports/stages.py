"""The stages of a network as a table."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from momconv.surgery.certificate import Certificate, StageCertificate
from momconv.surgery.conversion import Stage
from momconv.words import printable


def tabulate_stages(
    stages: Sequence[Stage], parameters: int, certificate: Certificate | None
) -> Table:
    """A row for each stage of a network with so many ``parameters`` in all."""
    table = Table("stage", box=None, pad_edge=False)
    for title in ("blocks", "with momentum", "parameters", "γ", "headroom", "bits a block"):
        table.add_column(title, justify="right")
    certificates = {stage.name: stage for stage in certificate.stages} if certificate else {}
    for stage in stages:
        momentum = format_spans(stage.momentum) or "none"
        figures = (str(stage.blocks), momentum, f"{stage.parameters:,}", f"{stage.gamma:g}")
        measured = _measured(certificates.get(stage.name))
        table.add_row(Text(printable(stage.name)), *figures, *measured)
    rest = parameters - sum(stage.parameters for stage in stages)
    table.add_row("the rest", "", "", f"{rest:,}")
    table.add_row("all", "", "", f"{parameters:,}")
    return table


def format_spans(numbers: Sequence[int]) -> str:
    """Ascending numbers with neighbours drawn together.

    >>> format_spans([1, 2, 3, 5])
    '1-3, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def _measured(stage: StageCertificate | None) -> tuple[str, ...]:
    if stage is None:
        return ()
    return f"{stage.headroom_bits:.1f} bits", f"{stage.remainder_bits:.2g}"
