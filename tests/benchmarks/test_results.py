from pathlib import Path

import pytest

from benchmarks.memory import KEY, VALUE, present
from benchmarks.results import DOCUMENT, find_losses, pivot, render, render_table, spread
from benchmarks.tables import Log, Row


def row(method: str, cell: str, batch: str = "8") -> Row:
    case = {"network": "net", "resolution": "32", "batch": batch, "precision": "fp32"}
    return case | {"method": method, VALUE: cell}


@pytest.fixture
def rows() -> list[Row]:
    return [
        row("store all", "40.0"),
        row("checkpoint each block", "20.0"),
        row("checkpoint √L blocks", "10.0"),
        row("theirs 1.0", "failed: KeyError: 'x'"),
        row("others 1.0", "–"),
        row("momconv", "15.0"),
        row("store all", "1.0", batch="16"),
    ]


def test_ratios_are_to_the_storing_and_the_best_checkpointing_of_the_same_case(
    rows: list[Row],
) -> None:
    ours = next(shown for shown in present(rows) if shown["method"] == "momconv")
    assert ours["of store all"] == "0.38"
    assert ours["of best checkpointing"] == "1.50"


def test_losses_name_the_methods_with_smaller_numbers_in_the_same_case(
    rows: list[Row], tmp_path: Path
) -> None:
    log = Log(tmp_path / "memory_machine_torch-2.11.0.csv")
    log.merge(rows, KEY)
    assert list(find_losses(log, VALUE, KEY[:-1])) == [
        "* MiB per image, net 32 8 fp32: momconv 15; checkpoint √L blocks 10 (machine)"
    ]


def test_a_table_is_markdown() -> None:
    assert render_table([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert render_table([{"a": "1|2"}]).endswith("| 1\\|2 |")
    assert render_table([]) == "No rows."


def test_a_pivot_has_a_row_for_each_case_and_a_column_for_each_method(rows: list[Row]) -> None:
    shown = pivot(rows, ("network", "batch"), "method", VALUE)
    assert [(cells["batch"], cells["store all"]) for cells in shown] == [
        ("8", "40.0"),
        ("16", "1.0"),
    ]
    assert shown[0]["theirs 1.0"] == "failed"
    assert shown[1]["momconv"] == "–"


def test_a_spread_leaves_out_what_failed(rows: list[Row]) -> None:
    (few, many) = spread(rows, ("batch",), (VALUE,))
    assert few == {
        "batch": "8",
        "cases": "6",
        f"{VALUE}: least, median, greatest": "10.00, 17.50, 40.00",
    }
    assert many["cases"] == "1"


def test_the_document_is_what_the_files_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render()
