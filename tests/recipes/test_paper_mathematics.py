"""The claims of the paper about small networks, at the smallest scale that shows them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes.paper import bits, fig1, fig4, fig5, fig10, prop1, report
from recipes.paper.report import Claim
from recipes.paper.tied import make_network, trace


def test_a_report_says_for_each_claim_whether_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    figure, _ = report.panels(1)
    report.report("name", [{"n": "1"}], figure, Claim("so", holds=True), Claim("no", holds=False))
    assert capsys.readouterr().out.endswith("holds: so\ndoes not hold: no\n")
    assert (tmp_path / "name.png").is_file()


def test_a_path_begins_at_the_input_and_ends_at_the_output() -> None:
    network, x = make_network(2, 0.9, seed=0), torch.randn(3, 2).double()
    path = trace(network, x)
    assert path.shape == (16, 3, 2)
    torch.testing.assert_close(path[0], x, atol=1e-9, rtol=0)
    assert torch.equal(path[-1], network(x))


def test_a_residual_network_of_small_steps_does_not_cross_and_momentum_does() -> None:
    resnet, momentum = fig1.train(0.0, steps=60), fig1.train(0.99, steps=60)
    assert resnet.crossings == 0
    assert momentum.crossings == 36
    assert fig1.judge([resnet, momentum]).holds
    assert not fig1.judge([momentum, resnet]).holds
    assert len(fig1.draw([resnet, momentum]).axes) == 2


def test_momentum_arrives_at_a_fixed_point_and_a_revnet_does_not() -> None:
    results = prop1.analyse(draws=3, depth=150)
    momentum, revnet = results
    product = momentum.eigenvalues.prod(1)
    torch.testing.assert_close(product.real, torch.full((3,), 0.9**4, dtype=torch.float64))
    torch.testing.assert_close(revnet.eigenvalues.prod(1).real, torch.ones(3, dtype=torch.float64))
    assert prop1.judge(results).holds
    assert not prop1.judge([revnet, momentum]).holds
    assert len(prop1.draw(results).axes) == 2


def test_the_remainder_grows_by_the_bits_of_the_theory() -> None:
    results = [bits.measure(gamma, depth=40) for gamma in (0.5, 0.9)]
    assert bits.judge(results).holds
    assert results[0].slope == pytest.approx(1, rel=0.02)
    wrong = bits.Result(0.5, results[1].bits, is_exact=True)
    assert not bits.judge([wrong]).holds
    assert len(bits.draw(results).axes) == 2


def test_the_series_is_the_solution_and_its_smallest_eigenvalue_that_of_theorem_1() -> None:
    ode, shallow, deep = fig4.compare(1.0, depths=(20, 200))
    assert ode < 1e-9
    assert deep < shallow / 5
    for epsilon in (0.5, 2.0):
        thetas = torch.linspace(-30, 5, 2000, dtype=torch.float64)[:, None, None]
        assert fig4.series(thetas, epsilon).min() == pytest.approx(fig4.smallest(epsilon), abs=1e-4)
    assert -1 < fig4.smallest(50.0) < -0.95


def test_a_search_finds_the_maps_that_theorem_1_allows() -> None:
    bound = fig4.smallest(1.0)
    allowed = [(0.5, 0.2), (bound + 0.1, 0.5), (-1.0, -1.0)]
    others = [(bound - 0.2, 0.5), (-1.0, -0.8)]
    errors = fig4.search(torch.tensor(allowed + others, dtype=torch.float64), 1.0, steps=300)
    assert (errors < fig4.TOLERANCE).tolist() == [True] * 3 + [False] * 2


def test_regions_are_drawn_and_judged() -> None:
    region = fig4.explore(1.0, side=3, starts=1, steps=1)
    perfect = fig4.Region(1.0, region.targets, (~region.predicted).double())
    assert perfect.agreement == 1
    assert [claim.holds for claim in fig4.judge([[1e-12, 0.05, 0.005]], [perfect])] == [True, True]
    assert not any(claim.holds for claim in fig4.judge([[1e-3, 0.05, 0.005]], [region]))
    assert len(fig4.draw([region]).axes) == 2


def test_rings_are_sampled_trained_on_and_judged() -> None:
    x, y = fig5.sample(50)
    assert y.bincount().tolist() == [100, 100]
    assert 1.5 <= x.norm(dim=1).min() <= x.norm(dim=1).max() <= 6.6
    results = [fig5.train(gamma, seed=0, steps=2, points=5) for gamma in fig5.GAMMAS]
    assert all(0 <= result.folds <= 1 for result in results)
    assert len(fig5.draw(results).axes) == 12
    nearly, fully = (
        fig5.Result(gamma, accuracy, 0.0, results[0].path, results[0].classes)
        for gamma, accuracy in ((0.0, 0.8), (0.99, 0.99))
    )
    assert fig5.judge([nearly, fully]).holds
    assert not fig5.judge([replace(nearly, accuracy=0.97), fully]).holds


def test_a_layer_that_mirrors_the_plane_folds_it_everywhere() -> None:
    network = make_network(2, 0.0, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network[0].first.weight[0, 0] = 1e-3
        network[0].second.weight[0, 0] = -2e3  # x + f(x) = (−x₁, x₂)
    path = trace(network, torch.randn(5, 2).double())
    assert fig5.fold(network, path) == 1


def test_a_layer_of_learned_ista_begins_as_an_iteration_of_ista() -> None:
    problem = fig10.make_problem()
    y = problem.sample(20)
    solution = problem.solve(y, iterations=2000)
    iteration = fig10.Iteration(problem)
    torch.testing.assert_close(iteration(solution, y), solution, atol=1e-6, rtol=0)
    assert (problem.matrix.norm(dim=0) - 1).abs().max() < 1e-12
    assert problem.value(solution, y) < problem.value(torch.zeros_like(solution), y)


def test_deeper_learned_ista_is_better_with_momentum_and_not_as_a_revnet() -> None:
    losses = fig10.measure(range(2, 9, 6), steps=15)
    assert fig10.judge(losses).holds
    assert all(math.isfinite(x) and x > 0 for values in losses.values() for x in values)
    assert losses["momentum LISTA"] != losses["LISTA"]
    assert not fig10.judge(dict(zip(losses, reversed(losses.values()), strict=True))).holds
    assert len(fig10.draw(losses, range(2, 9, 6)).axes[0].lines) == 3
