from benchmarks.pictures import advantage, collect, draw_batches, draw_depth, draw_ladder, growth
from benchmarks.tables import Row


def row(method: str, depth: int, cell: str) -> Row:
    return {"method": method, "depth": str(depth), "MiB": cell}


ROWS = [
    row("store all", 100, "200.0"),
    row("store all", 10, "20.0"),
    row("momentumnet 0.10", 10, "failed: KeyError: 'x'"),
    row("momconv", 10, "8.0"),
    row("momconv", 100, "10.0"),
]


def test_points_are_in_order_and_failures_left_out() -> None:
    series = collect(ROWS, "depth")
    assert series == {
        "store all": [(10.0, 20.0), (100.0, 200.0)],
        "momconv": [(10.0, 8.0), (100.0, 10.0)],
    }


def test_titles_say_what_the_numbers_say() -> None:
    series = collect(ROWS, "depth")
    assert growth(series) == (
        "100 blocks take 1.2× the memory of 10 with momconv,\n10× with everything stored"
    )
    assert advantage(series) == "momconv needs 5% of store all"


def test_pictures_have_a_line_for_each_method_and_axes_with_units() -> None:
    (axes,) = draw_depth(ROWS).axes
    assert len(axes.lines) == 2
    assert "MiB" in axes.get_ylabel()


def test_each_network_has_a_panel() -> None:
    rows = [
        {"network": network, "resolution": "32", "batch": "2", "method": method, "MiB": "1.0"}
        for network in ("shallow", "deep")
        for method in ("store all", "momconv")
    ]
    assert len(draw_batches(rows).axes) == 2


def test_a_ladder_has_memory_and_time_for_each_network() -> None:
    rows = [{"network": "net", "seconds": "0.1"} | row for row in ROWS]
    memory, seconds = draw_ladder(rows).axes
    assert "MiB" in memory.get_ylabel()
    assert "seconds" in seconds.get_ylabel()
    assert len(memory.lines) == 2
    assert len(seconds.lines) == 3  # also of a method whose memory is not known
