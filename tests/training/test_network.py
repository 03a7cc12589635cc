from momconv.recipe import MomentumRecipe
from momconv.surgery.conversion import convert
from momconv.training import network
from momconv.zoo.networks import build


def test_gamma_is_read_from_the_blocks_that_follow_the_rule() -> None:
    plain = build("cifar_resnet20")
    assert network.read_gamma(plain) == 0
    assert network.read_gamma(convert(plain, gamma=0)) == 0
    assert network.read_gamma(convert(plain, MomentumRecipe().gamma)) == 0.9
