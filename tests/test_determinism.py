import torch

from momconv.determinism import deterministic


def test_deterministic_algorithms_are_asked_for_and_given_back() -> None:
    with deterministic(wanted=True):
        assert torch.get_deterministic_debug_mode() == 1
    assert torch.get_deterministic_debug_mode() == 0
    with deterministic(wanted=False):
        assert torch.get_deterministic_debug_mode() == 0
