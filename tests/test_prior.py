"""Prices of gates, pins, and the size of the published penalty."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateValues, QuantizedNetwork, quantize
from pyro_bbits.cost import tensor_macs
from pyro_bbits.inference import HardConcreteGuide
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import VGG7, LeNet5


@pytest.fixture(scope="module")
def lenet() -> QuantizedNetwork:
    return quantize(LeNet5().eval(), torch.rand(2, 1, 28, 28))


@pytest.fixture
def network() -> QuantizedNetwork:
    """Tensors `0.weight`, `2.weight`, `4.weight`, `2.input`, `4.input`; 4 + 3 channel gates."""
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return quantize(net, torch.rand(6, 5), bits=(2, 4, 8))


def test_gates_cost_their_width_times_the_macs_of_their_tensor(lenet: QuantizedNetwork) -> None:
    mu, m = 0.3, tensor_macs(lenet)
    prior = GatePrior(lenet, mu)
    torch.testing.assert_close(prior.strength, mu * m[:, None] * torch.tensor([4.0, 8.0, 16.0, 32.0]))
    expected = torch.cat([torch.full((c,), mu * 2 * m[row].item() / c) for row, c in enumerate((32, 64, 512))])
    torch.testing.assert_close(prior.channel_strength, expected)


def test_the_constant_rule_prices_every_gate_alike(lenet: QuantizedNetwork) -> None:
    prior = GatePrior(lenet, 0.3, cost="constant")
    torch.testing.assert_close(prior.strength, torch.full((7, 4), 0.3))
    expected = torch.cat([torch.full((c,), 0.3 / c) for c in (32, 64, 512)])
    torch.testing.assert_close(prior.channel_strength, expected)


def test_prices_follow_the_ladder(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 1.0)
    m = torch.tensor([20, 12, 6, 12, 6]) / 20
    torch.testing.assert_close(prior.strength, m[:, None] * torch.tensor([4.0, 8.0]))
    torch.testing.assert_close(prior.channel_strength, torch.tensor([2.0 / 4] * 4 + [2 * 0.6 / 3] * 3))


def published_penalty(network: QuantizedNetwork, init: float | dict[int, float]) -> float:
    """The paper's sum of R_k at initial logits; its tensors without channel gates have a constant 1 that ours lack."""
    mu, num_data = 0.1, 1000
    prior = GatePrior(network, mu, simplified=True)
    guide = HardConcreteGuide(prior, init=init)
    without_channels = len(network.layout.tensors) - len(network.layout.groups)
    return gate_kl_nats(guide, prior, num_data) / (mu * num_data) + without_channels


def test_lenet5_starts_at_the_published_penalty(lenet: QuantizedNetwork) -> None:
    penalty = published_penalty(lenet, {2: 6.0, 4: 6.0, 8: 6.0, 16: -6.0, 32: -6.0})
    assert penalty == pytest.approx(36.6, abs=0.05)


@pytest.mark.slow
def test_vgg7_starts_at_the_published_penalty() -> None:
    network = quantize(VGG7().eval(), torch.rand(2, 3, 32, 32))
    assert published_penalty(network, 6.0) == pytest.approx(503.3, abs=0.05)


def test_the_simplified_penalty_is_linear_in_the_chain_of_inclusion_probabilities(network: QuantizedNetwork) -> None:
    """SUM_k R_k written out, with random logits."""
    prior = GatePrior(network, 0.2, simplified=True)
    guide = HardConcreteGuide(prior)
    with torch.no_grad():
        guide.channel_logits.normal_()
        guide.tensor_logits.normal_()
    q, strength = guide.probabilities(), prior.strength
    penalty = (q.channels * prior.channel_strength).sum()
    roots = [q.channels[:4].mean(), q.channels[4:].mean(), torch.ones(()), torch.ones(()), torch.ones(())]
    for row, root in enumerate(roots):
        q4, q8 = q.tensors[row]
        penalty = penalty + root * (q4 * strength[row, 0] + q4 * q8 * strength[row, 1])
    assert gate_kl_nats(guide, prior, 50) == pytest.approx(50 * penalty.item(), rel=1e-5)


def test_reach_is_the_probability_of_a_channel_left(network: QuantizedNetwork) -> None:
    q = torch.tensor([0.1, 0.5, 0.2, 0.3, 0.9, 0.4, 0.6])
    full, simplified = (GatePrior(network, 0.1, simplified=s).reach(torch.logit(q)) for s in (False, True))
    left = [1 - 0.9 * 0.5 * 0.8 * 0.7, 1 - 0.1 * 0.6 * 0.4]
    torch.testing.assert_close(full, torch.tensor([*left, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(simplified, torch.tensor([1.1 / 4, 1.9 / 3, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("simplified", [False, True])
def test_reach_of_pinned_channels_is_certain(network: QuantizedNetwork, simplified: bool) -> None:
    prior = GatePrior(network, 0.1, simplified=simplified)
    on, off = (torch.full((7,), sign * math.inf) for sign in (1, -1))
    assert prior.reach(on).tolist() == [1.0] * 5
    assert prior.reach(off).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_residual_gates_exist_while_a_channel_is_left(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0.1)
    assert prior.any_on(torch.tensor([0, 0, 0.2, 0, 0, 0, 0])).tolist() == [True, False, True, True, True]


def test_mu_0_pins_everything_on(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0)
    assert not prior.strength.any() and not prior.channel_strength.any()
    gates = HardConcreteGuide(prior, init=-9.0).hard_gates()
    assert all((g == 1).all() for g in gates)
    assert gate_kl_nats(HardConcreteGuide(prior), prior, 100) == 0.0


def test_pins_fix_a_width(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0.1)
    before = prior.strength.clone()
    assert prior.pin("?.input", bits=4).pin("4.weight", bits=2) is prior
    inf = math.inf
    assert prior.strength[2:].tolist() == [[inf, inf], [0.0, inf], [0.0, inf]]
    assert torch.equal(prior.strength[:2], before[:2])
    assert (prior.channel_strength > 0).all() and prior.channel_strength.isfinite().all()
    bits = network.layout.bits(HardConcreteGuide(prior, init=0.0).hard_gates())
    assert bits[2:] == (2, 4, 4)
    prior.pin("*", bits=8)
    assert not prior.strength.any()


def test_the_only_width_of_a_ladder_can_be_pinned() -> None:
    network = quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(5, 4), bits=(8,))
    assert GatePrior(network, 0.1).pin("*", bits=8).strength.shape == (3, 0)


def test_channels_are_pinned_by_layer(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0.1)
    assert prior.pin_channels("2") is prior
    assert (prior.channel_strength[:4] > 0).all() and not prior.channel_strength[4:].any()
    assert not prior.pin_channels().channel_strength.any()
    assert (prior.strength > 0).all()


def test_a_network_without_channel_gates_has_none_to_pin() -> None:
    prior = GatePrior(quantize(nn.Linear(3, 2), torch.rand(6, 3)), 0.1)
    assert prior.pin_channels().channel_strength.shape == (0,)
    with pytest.raises(ValueError, match=r"pattern 'fc' matches no prunable layer; there are none\."):
        prior.pin_channels("fc")


def test_hard_gates_are_pinned_as_they_are(network: QuantizedNetwork) -> None:
    gates = GateValues(*((torch.rand_like(g) < 0.5).float() for g in network.open_gates()))
    prior = GatePrior(network, 0.1)
    assert prior.pin_gates(gates) is prior
    for strength, gate in ((prior.channel_strength, gates.channels), (prior.strength, gates.tensors)):
        assert torch.equal(strength == 0, gate == 1) and torch.equal(strength.isinf(), gate == 0)
    hard = HardConcreteGuide(prior, init=0.0).hard_gates()
    assert torch.equal(hard.channels, gates.channels)
    assert torch.equal(hard.tensors.cumprod(1), gates.tensors.cumprod(1))


class Shared(nn.Module):
    """Two layers with one weight, both prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.a(x)) + F.relu(self.b(x.flip(1))))
        return logits


def test_layers_with_one_weight_share_the_price_of_its_first_rung() -> None:
    network = quantize(Shared(), torch.rand(6, 3))
    prior = GatePrior(network, 0.5)
    assert network.layout.owner.tolist() == [0] * 8
    torch.testing.assert_close(prior.channel_strength, torch.full((8,), 0.5 * 2 * 2.0 / 8))
    assert prior.any_on(torch.tensor([0.0] * 7 + [1.0])).all()


@pytest.mark.parametrize("mu", [-0.1, math.nan, math.inf])
def test_mu_must_be_a_finite_number_from_0(network: QuantizedNetwork, mu: float) -> None:
    with pytest.raises(ValueError, match=r"mu must be a finite number of at least 0 .*got (-0\.1|nan|inf)"):
        GatePrior(network, mu)


def test_a_price_of_bops_needs_gates_that_are_not_pinned(network: QuantizedNetwork) -> None:
    with pytest.raises(ValueError, match="a price of BOPs needs a mu above 0, such as 1e-6"):
        GatePrior(network, 0.0, bops=1.0)


def test_the_cost_rule_must_be_known(network: QuantizedNetwork) -> None:
    with pytest.raises(ValueError, match="cost must be one of bops, constant; got 'macs'"):
        GatePrior(network, 0.1, cost="macs")  # type: ignore[arg-type]


def test_pins_that_fit_nothing_are_refused(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0.1)
    with pytest.raises(ValueError, match=r"pattern 'conv\*' matches no tensor; there are 0\.weight, 2\.weight"):
        prior.pin("conv*", bits=8)
    with pytest.raises(ValueError, match=r"16 is not a width of the ladder \(2, 4, 8\)"):
        prior.pin("*", bits=16)
    with pytest.raises(ValueError, match="pattern '4' matches no prunable layer; there are 0, 2"):
        prior.pin_channels("4")
    torch.testing.assert_close(prior.strength, GatePrior(network, 0.1).strength)


def test_prices_are_saved_with_their_pins(network: QuantizedNetwork) -> None:
    prior, other = GatePrior(network, 0.1).pin("2.*", bits=4).pin_channels("0"), GatePrior(network, 0.7)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.strength, prior.strength)
    assert torch.equal(other.channel_strength, prior.channel_strength)


def test_allowed_rungs_follow_the_pins(network: QuantizedNetwork) -> None:
    prior, rungs = GatePrior(network, mu=0.1), len(network.layout.ladder.residuals)
    assert prior.allowed_rungs() == [list(range(rungs + 1))] * len(network.layout.tensors)
    prior.strength[0, 0] = 0.0  # the first gate always open, the last one never
    prior.strength[0, -1] = torch.inf
    prior.strength[1] = torch.inf
    prior.strength[2] = 0.0
    assert prior.allowed_rungs()[:3] == [list(range(1, rungs)), [0], [rungs]]


def test_repr_tells_price_and_pins(network: QuantizedNetwork) -> None:
    prior, layout = GatePrior(network, mu=0.25, cost="constant"), network.layout
    sizes = f"tensors={len(layout.tensors)}, bits={layout.ladder.bits}, channels={layout.num_channels}"
    assert repr(prior) == f"GatePrior(mu=0.25, cost='constant', {sizes})"
    gates = layout.num_channels + prior.strength.numel()
    prior.pin_channels()
    assert f"{sizes}, pinned={layout.num_channels} of {gates} gates)" in repr(prior)
    assert repr(GatePrior(network, mu=0.1, simplified=True)).endswith("simplified=True)")


def test_a_float_network_has_no_gates_to_price() -> None:
    with pytest.raises(TypeError, match=r"made for a quantized network, quantize\(net, example_inputs\); got Linear"):
        GatePrior(nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]
