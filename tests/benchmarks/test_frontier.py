from benchmarks.cases import Case
from benchmarks.frontier import RATIO, plan_points, present
from benchmarks.memory import VALUE
from benchmarks.pictures import draw_frontier
from benchmarks.tables import Row


def row(method: str, mib: str, ratio: str, network: str = "net") -> Row:
    return {"network": network, "method": method, VALUE: mib, RATIO: ratio}


ROWS = [
    row("store all", "40.0", "1.000"),
    row("checkpoint each block", "20.0", "1.300"),
    row("checkpoint √L blocks", "10.0", "1.400"),
    row("momentumnet 0.10", "failed: KeyError: 'x'", "failed: KeyError: 'x'"),
    row("momconv", "20.0", "1.200"),
    row("momconv", "5.0", "1.350"),
    row("momconv, plain", "19.0", "1.250"),
    row("momconv, plain", "18.0", "1.240"),
    row("checkpoint each block", "1.0", "0.100", network="other"),
]


def test_each_point_is_beside_what_is_fastest_within_its_memory() -> None:
    assert [[*shown.values()][1:] for shown in present(ROWS)] == [
        ["20.0", "1.200", "1.240", "1.300", "–"],
        ["5.0", "1.350", "–", "–", "–"],
    ]


def test_each_network_has_a_panel_and_a_line_for_each_method_with_numbers() -> None:
    first, second = draw_frontier(ROWS).axes
    assert (len(first.lines), len(second.lines)) == (5, 1)


def test_points_use_more_memory_for_less_work() -> None:
    points = plan_points(Case("cifar_resnet20", 32, 8), "momconv")
    budgets = [float(point.budget) for point in points]
    assert budgets == sorted(set(budgets))
    assert dict(points[-1].ways) == {f"layer{n}": "store" for n in (1, 2, 3)}
    assert "momentum" in str(points[0].ways)
